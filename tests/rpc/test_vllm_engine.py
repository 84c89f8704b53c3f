"""`vllm.grpc.engine.VllmEngine`: what a gateway sends and is told, by the published messages."""

import asyncio
import hashlib
import io
import math
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
import tokenizers
from google.rpc import error_details_pb2
from scripted_engine import ScriptedEngine, expected_ids
from serving import back_to_the_start, eventually, lent, serving
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from test_refusals import detail, newer

from jaxserve.events import Delta, Finished, FinishReason, Started, Timings, Usage
from jaxserve.request import Constraint, Request
from jaxserve.request_errors import InvalidRequest
from rpc.server import Server
from rpc.vllm_convert import ResponseBuilder, request_from_vllm, zipped

if TYPE_CHECKING:
    from jaxserve.engine import Engine

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def vllm(engine: ScriptedEngine) -> AsyncIterator[tuple[Server, vllm_engine_pb2_grpc.VllmEngineStub]]:
    async with serving(engine) as (server, client), grpc.aio.insecure_channel(client.address) as channel:
        yield server, vllm_engine_pb2_grpc.VllmEngineStub(channel)


def asking(text: str = "hello", *, stream: bool = True, **params: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, stream=stream, sampling_params=pb.SamplingParams(**params))


async def test_a_stream_is_chunks_of_what_is_new_and_one_complete() -> None:
    async with vllm(ScriptedEngine()) as (_, stub):
        request = asking(max_tokens=6, logprobs=2)
        *chunks, last = [response async for response in stub.Generate(request)]
        assert [token for one in chunks for token in one.chunk.token_ids] == expected_ids(6)
        assert [one.WhichOneof("response") for one in chunks] == ["chunk"] * len(chunks)
        seen = 0
        for one in chunks:
            seen += len(one.chunk.token_ids)
            assert (one.chunk.prompt_tokens, one.chunk.completion_tokens, one.chunk.index) == (5, seen, 0)
        logprobs = [one.chunk.output_logprobs for one in chunks]
        assert [token for one in logprobs for token in one.token_ids] == expected_ids(6)
        assert {len(top.token_ids) for one in logprobs for top in one.top_logprobs} == {2}
        assert {round(value, 3) for one in logprobs for value in one.token_logprobs} == {-0.5}
        complete = last.complete
        assert list(complete.output_ids) == expected_ids(6)
        assert (complete.finish_reason, complete.prompt_tokens, complete.completion_tokens) == ("length", 5, 6)


async def test_without_stream_there_is_one_complete_and_nothing_else() -> None:
    async with vllm(ScriptedEngine()) as (_, stub):
        (only,) = [response async for response in stub.Generate(asking(stream=False, max_tokens=30, logprobs=1))]
        assert list(only.complete.output_ids) == expected_ids(30)
        assert list(only.complete.output_logprobs.token_ids) == expected_ids(30)
        assert (only.complete.finish_reason, only.complete.completion_tokens) == ("length", 30)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_token_that_ends_a_sequence_is_part_of_the_output(stream: bool) -> None:
    """As in vLLM, and so the tokens that a gateway counts are those of the usage."""
    builder = ResponseBuilder(pb.GenerateRequest(stream=stream))
    ended = Finished("id", 0, FinishReason.STOP, Usage(4, 0, 3), Timings(0, 0, 0, 0), matched_stop=2)
    messages = [
        *builder.messages(Started("id", 4, 0, 7)),
        *builder.messages(Delta("id", 0, (5, 6))),
        *builder.messages(ended),
    ]
    chunks = [list(one.chunk.token_ids) for one in messages if one.HasField("chunk")]
    assert chunks == ([[5, 6], [2]] if stream else [])
    complete = messages[-1].complete
    assert (list(complete.output_ids), complete.completion_tokens, complete.matched_token_id) == ([5, 6, 2], 3, 2)


async def test_unset_fields_take_the_defaults_of_the_protocols_adapter() -> None:
    request = request_from_vllm(pb.GenerateRequest(text="a"), "id")
    assert request.sampling == Request(prompt="a").sampling
    assert request.stopping == Request(prompt="a").stopping
    assert (request.sampling.temperature, request.sampling.n, request.output.logprobs) == (1.0, 1, None)
    assert request_from_vllm(asking(temperature=0.0), "id").sampling.temperature == 0.0


async def test_every_field_reaches_the_engine() -> None:
    params = pb.SamplingParams(
        temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, frequency_penalty=1.5, presence_penalty=-0.5,
        repetition_penalty=2.0, max_tokens=9, min_tokens=3, stop=["x", "yz"], stop_token_ids=[4, 5], ignore_eos=True,
        n=1, logprobs=3, seed=11, include_stop_str_in_output=True, logit_bias={3: 1.5},
        skip_special_tokens=True, spaces_between_special_tokens=True, grammar_from_first_token=True,
    )  # fmt: skip
    message = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(original_text="ignored", input_ids=[1, 2]), sampling_params=params, stream=True
    )
    request = request_from_vllm(message, "id", deadline=5.0)
    sampling, stopping = request.sampling, request.stopping
    assert (request.token_ids, request.prompt, request.request_id, request.deadline) == ((1, 2), None, "id", 5.0)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 7, 0.125)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (1.5, -0.5, 2.0)
    assert (sampling.seed, sampling.n, sampling.logit_bias) == (11, 1, {3: 1.5})
    assert (stopping.max_tokens, stopping.min_tokens, stopping.stop) == (9, 3, ("x", "yz"))
    assert (stopping.stop_token_ids, stopping.include_stop, stopping.ignore_eos) == ((4, 5), True, True)
    assert request.output.logprobs == 3


@pytest.mark.parametrize(
    "params, constraint",
    [
        ({"json_schema": "{}"}, Constraint(json_schema="{}")),
        ({"regex": "a+"}, Constraint(regex="a+")),
        ({"grammar": "start: 'a'"}, Constraint(grammar="start: 'a'")),
        ({"json_object": True}, Constraint(json_object=True)),
        ({"choice": pb.ChoiceConstraint(choices=["a", "b"])}, Constraint(choice=("a", "b"))),
        ({}, None),
    ],
)
async def test_a_constraint_reaches_the_engine(params: dict[str, object], constraint: Constraint | None) -> None:
    assert request_from_vllm(asking(**params), "id").constraint == constraint


@pytest.mark.parametrize("stream", [True, False])
async def test_log_probabilities_of_the_prompt_name_every_token_of_it(engine: "Engine", stream: bool) -> None:
    ids = engine.tokenizer.encode("The lighthouse keeper wrote down the weather")
    (expected,) = await asyncio.to_thread(
        engine.generate, [{"token_ids": ids}], temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=2
    )
    assert expected.prompt_logprobs is not None
    async with serving(lent(engine)) as (_, client), grpc.aio.insecure_channel(client.address) as channel:
        params = pb.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=2)
        request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=ids), sampling_params=params, stream=stream)
        first, *others = [one async for one in vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(request)]
        message = (first.chunk if stream else first.complete).input_logprobs
        assert list(message.token_ids) == ids
        values = [one.value if one.HasField("value") else None for one in message.token_logprobs]
        assert values[0] is None
        assert values[1:] == pytest.approx([entry.logprob for entry in expected.prompt_logprobs])
        assert [len(top.token_ids) for top in message.top_logprobs] == [0] + [2] * (len(ids) - 1)
        assert not any(one.chunk.HasField("input_logprobs") for one in others)


async def test_several_sequences_come_each_under_its_index(engine: "Engine") -> None:
    wanted = {"temperature": 0.75, "seed": 5, "max_tokens": 12, "ignore_eos": True}
    (expected,) = await asyncio.to_thread(engine.generate, ["The sea"], n=3, **wanted)
    ids = [list(output.token_ids) for output in expected.outputs]
    async with serving(lent(engine)) as (server, client), grpc.aio.insecure_channel(client.address) as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        params = pb.SamplingParams(n=3, **wanted)
        streamed = [[], [], []]
        completes = []
        async for one in stub.Generate(pb.GenerateRequest(text="The sea", stream=True, sampling_params=params)):
            if one.HasField("chunk"):
                streamed[one.chunk.index] += one.chunk.token_ids
            else:
                completes.append(one.complete)
        assert streamed == [list(one.output_ids) for one in sorted(completes, key=lambda one: one.index)]
        assert sorted(one.index for one in completes) == [0, 1, 2]
        whole = [
            one.complete async for one in stub.Generate(pb.GenerateRequest(text="The sea", sampling_params=params))
        ]
        assert [list(one.output_ids) for one in sorted(whole, key=lambda one: one.index)] == streamed
        assert streamed == ids
        assert len({tuple(one) for one in ids}) == 3
        await back_to_the_start(engine, server)


async def test_what_is_not_supported_is_refused_by_name() -> None:
    refused = {
        "prompt_logprobs": asking(prompt_logprobs=1),  # of a text, whose tokens the client does not know
        "truncate_prompt_tokens": asking(truncate_prompt_tokens=3),
        "structural_tag": asking(structural_tag="{}"),
        "kv_transfer_params": pb.GenerateRequest(text="a", kv_transfer_params=pb.KvTransferParams(remote_port=1)),
        "kv_transfer_params_json": pb.GenerateRequest(text="a", kv_transfer_params_json="{}"),
        "mm_inputs": pb.GenerateRequest(text="a", mm_inputs=pb.MultimodalInputs(mm_hashes=["a"])),
        "extra_mm_inputs": pb.GenerateRequest(text="a", extra_mm_inputs=[pb.MultimodalInputs()]),
        "media_refs": pb.GenerateRequest(text="a", media_refs=pb.MediaRefs()),
        "data_parallel_rank": pb.GenerateRequest(text="a", data_parallel_rank=1),
    }
    for name, message in refused.items():
        with pytest.raises(InvalidRequest) as caught:
            request_from_vllm(message, "id")
        assert caught.value.field == name


async def test_every_field_of_the_published_messages_is_read_or_refused() -> None:
    """A newer smg-grpc-proto may have more; what is not known is refused where set, and this list is then looked at."""
    known = {
        "SamplingParams": "temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty "
        "max_tokens min_tokens stop stop_token_ids skip_special_tokens spaces_between_special_tokens ignore_eos n "
        "logprobs prompt_logprobs seed include_stop_str_in_output logit_bias truncate_prompt_tokens "
        "grammar_from_first_token json_schema regex grammar structural_tag json_object choice",
        "GenerateRequest": "request_id tokenized text sampling_params stream kv_transfer_params mm_inputs "
        "extra_mm_inputs kv_transfer_params_json data_parallel_rank media_refs",
        "TokenizedInput": "original_text input_ids",
    }
    for message, names in known.items():
        assert set(pb.DESCRIPTOR.message_types_by_name[message].fields_by_name) == set(names.split()), message


async def test_a_value_out_of_range_is_an_invalid_argument_that_names_its_path() -> None:
    wrong = {
        "sampling_params.top_p": asking(top_p=1.5),
        "sampling_params.temperature": asking(temperature=math.nan),
        "sampling_params.max_tokens": asking(max_tokens=0),
        "sampling_params.min_tokens": asking(min_tokens=5, max_tokens=4),
        "sampling_params.logprobs": asking(logprobs=-1),
        "sampling_params.seed": asking(seed=-1),
        "sampling_params.stop": asking(stop=[""]),
        "sampling_params.n": asking(n=10**9),
        "sampling_params.structural_tag": asking(structural_tag="{}"),
        "tokenized.input_ids": pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[1, 2**31])),
        "media_refs": pb.GenerateRequest(text="a", media_refs=pb.MediaRefs()),
        "sampling_params.99": pb.GenerateRequest(text="a", sampling_params=newer(pb.SamplingParams(n=1))),
        "input": pb.GenerateRequest(),
        "text": asking("x" * 5000),
    }
    engine = ScriptedEngine()
    async with vllm(engine) as (_, stub):
        for path, request in wrong.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for response in stub.Generate(request):
                    raise AssertionError(f"a message before the refusal: {response}")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (path, caught.value)
            (violation,) = detail(caught.value, error_details_pb2.BadRequest).field_violations
            assert violation.field == path or (path == "input" and violation.field == "prompt")
        assert engine.loads().steps == 0


async def test_bytes_that_do_not_parse_are_an_invalid_argument() -> None:
    async with serving(ScriptedEngine()) as (_, client), grpc.aio.insecure_channel(client.address) as channel:
        for method in ("/vllm.grpc.engine.VllmEngine/Generate", "/jetstream_proto.Orchestrator/Decode"):
            call = channel.unary_stream(method)(b"\x0a\xff")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_abort_ends_the_stream_with_its_last_message_and_status_ok() -> None:
    """A gateway whose client has gone sends Abort and leaves the call open."""
    engine = ScriptedEngine()
    async with vllm(engine) as (server, stub):
        request = asking()
        request.request_id = "mine"
        call = stub.Generate(request)
        responses = aiter(call)
        await anext(responses)
        steps = engine.loads().steps
        await stub.Abort(pb.AbortRequest(request_ids=["nobody", "mine"]))
        *_, last = [response async for response in responses]
        assert last.complete.finish_reason == FinishReason.ABORT
        assert list(last.complete.output_ids) == expected_ids(last.complete.completion_tokens)
        assert await call.code() is grpc.StatusCode.OK
        await back_to_the_start(engine, server)
        assert engine.loads().steps > steps
        await stub.Abort(pb.AbortRequest(request_ids=["mine"]))  # it has ended: no error


async def test_abort_ends_a_request_whose_long_prompt_is_still_tokenized() -> None:
    engine = ScriptedEngine()
    engine.may_submit.clear()
    async with vllm(engine) as (server, stub):
        request = asking("x" * 3000)
        request.request_id = "mine"
        call = stub.Generate(request)
        await eventually(lambda: len(server.calls) == 1)
        await stub.Abort(pb.AbortRequest(request_ids=["mine"]))
        engine.may_submit.set()
        *_, last = [response async for response in call]
        assert last.complete.finish_reason == FinishReason.ABORT
        await back_to_the_start(engine, server)


async def test_a_failed_request_is_told_by_the_status_alone() -> None:
    async with vllm(ScriptedEngine()) as (_, stub):
        received: list[pb.GenerateResponse] = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in stub.Generate(asking("break")):
                received.append(response)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert received and all(one.HasField("chunk") for one in received)


async def test_the_gateway_learns_the_model_the_server_and_its_load() -> None:
    engine = ScriptedEngine(slots=4)
    async with vllm(engine) as (_, stub):
        health = await stub.HealthCheck(pb.HealthCheckRequest())
        assert (health.healthy, health.message) == (True, "ready")
        model = await stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.served_model_name, model.max_context_length, model.vocab_size) == ("scripted", 4096, 256)
        assert model.is_generation and not model.supports_vision
        engine.paused.set()
        call = stub.Generate(asking())
        await eventually(lambda: engine.loads().waiting == 1)
        server = await stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (server.active_requests, server.max_num_seqs, server.data_parallel_size) == (1, 4, 1)
        assert server.block_size == engine.config.page_size
        (load,) = (await stub.GetLoads(pb.GetLoadsRequest())).loads
        assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (0, 1, 1)
        assert (load.max_running_requests, load.token_usage, load.num_used_tokens) == (4, 0.0, 0)
        engine.paused.clear()
        await call.read()
        await call.read()
        (load,) = (await stub.GetLoads(pb.GetLoadsRequest())).loads
        assert load.num_running_reqs == 1
        assert load.num_used_tokens > 0 and 0 < load.token_usage < 1
        call.cancel()


async def test_the_tokenizer_comes_as_a_zip_with_its_fingerprint_on_the_last_chunk() -> None:
    engine = ScriptedEngine()
    async with vllm(engine) as (_, stub):
        chunks = [chunk async for chunk in stub.GetTokenizer(common_pb2.GetTokenizerRequest())]
        archive = b"".join(chunk.data for chunk in chunks)
        assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].sha256 == hashlib.sha256(archive).hexdigest()
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            assert files.testzip() is None
            tokenizer = tokenizers.Tokenizer.from_str(files.read("tokenizer.json").decode())
        assert tokenizer.encode("Grüße!").ids == engine.tokenizer.encode("Grüße!")
        again = [chunk async for chunk in stub.GetTokenizer(common_pb2.GetTokenizerRequest())]
        assert again[-1].sha256 == chunks[-1].sha256
        assert zipped(engine.tokenizer.to_files()) == archive


async def test_calls_that_make_no_sense_here_are_unimplemented_and_say_why() -> None:
    async with vllm(ScriptedEngine()) as (_, stub):
        calls = [
            stub.Embed(pb.EmbedRequest()),
            stub.FlushCache(common_pb2.FlushCacheRequest()),
            stub.StartProfile(common_pb2.StartProfileRequest()),
            stub.StopProfile(common_pb2.StopProfileRequest()),
            stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()).read(),
        ]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, grpc.aio.AioRpcError)
            assert result.code() is grpc.StatusCode.UNIMPLEMENTED
            assert result.details()
