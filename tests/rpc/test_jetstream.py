"""JetStream's `Orchestrator`, asked as JetStream's own clients ask: benchmark_serving, load_tester, requester."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc import error_details_pb2
from scripted_engine import ScriptedEngine, expected_ids
from serving import eventually, lent, serving
from test_refusals import detail, newer

from jaxserve.events import FinishReason
from rpc.jetstream import orchestrator_pb2 as pb
from rpc.jetstream import orchestrator_pb2_grpc
from rpc.jetstream_servicer import request_from_jetstream

if TYPE_CHECKING:
    from jaxserve.engine import Engine

pytestmark = pytest.mark.asyncio

Text = pb.DecodeRequest.TextContent
Tokens = pb.DecodeRequest.TokenContent


@asynccontextmanager
async def orchestrator(engine: ScriptedEngine) -> AsyncIterator[orchestrator_pb2_grpc.OrchestratorStub]:
    async with serving(engine) as (_, client), grpc.aio.insecure_channel(client.address) as channel:
        yield orchestrator_pb2_grpc.OrchestratorStub(channel)


async def test_token_ids_are_answered_with_token_ids() -> None:
    """As benchmark_serving does: tokenized by the client, which counts the ids of sample 0."""
    async with orchestrator(ScriptedEngine()) as stub:

        async def run(count: int) -> list[int]:
            request = pb.DecodeRequest(
                token_content=Tokens(token_ids=[104, 105]),
                max_tokens=count,
                metadata=pb.DecodeRequest.Metadata(start_time=12.5),
            )
            received: list[int] = []
            async for response in stub.Decode(request):
                assert response.stream_content.samples[0].text == ""
                assert response.stream_content.samples[0].token_ids
                received += response.stream_content.samples[0].token_ids
            return received

        counts = range(1, 17)
        assert await asyncio.gather(*map(run, counts)) == [expected_ids(count) for count in counts]


async def test_text_is_answered_with_text() -> None:
    async with orchestrator(ScriptedEngine()) as stub:
        request = pb.DecodeRequest(text_content=Text(text="AB"), max_tokens=5, num_samples=1)
        responses = [response async for response in stub.Decode(request)]
        assert "".join(response.stream_content.samples[0].text for response in responses) == "abcde"


async def test_the_end_of_sequence_id_is_part_of_the_answer(engine: "Engine") -> None:
    """benchmark_serving waits for a first response for ever, so even an empty answer must have one."""
    ends = engine.tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    (alone,) = await asyncio.to_thread(engine.generate, [{"token_ids": ends}], temperature=0.0, max_tokens=200)
    assert alone.finish_reason is FinishReason.STOP and isinstance(alone.matched_stop, int)
    all_said = [*ends, *alone.token_ids]
    async with serving(lent(engine)) as (_, client), grpc.aio.insecure_channel(client.address) as channel:
        request = pb.DecodeRequest(token_content=Tokens(token_ids=all_said), max_tokens=5)
        responses = [response async for response in orchestrator_pb2_grpc.OrchestratorStub(channel).Decode(request)]
    (only,) = responses
    assert list(only.stream_content.samples[0].token_ids) == [alone.matched_stop]


async def test_samples_stand_at_their_place(engine: "Engine") -> None:
    """As requester reads them: sample i of a response is what is new of sequence i."""
    async with serving(lent(engine)) as (_, client), grpc.aio.insecure_channel(client.address) as channel:
        request = pb.DecodeRequest(text_content=Text(text="The sea"), max_tokens=8, num_samples=2)
        texts = ["", ""]
        async for response in orchestrator_pb2_grpc.OrchestratorStub(channel).Decode(request):
            for place, sample in enumerate(response.stream_content.samples):
                texts[place] += sample.text
    assert texts[0] == texts[1] != ""  # greedy both


async def test_the_numbers_on_the_wire_are_those_of_jetstream() -> None:
    published = {
        "max_tokens": 4, "text_content": 5, "token_content": 6, "metadata": 7, "num_samples": 8, "lora_adapter_id": 9,
        "has_bos": 10,
    }  # fmt: skip
    assert {field.name: field.number for field in pb.DecodeRequest.DESCRIPTOR.fields} == published
    stream = pb.DecodeResponse.StreamContent.DESCRIPTOR
    assert pb.DecodeResponse.DESCRIPTOR.fields_by_name["stream_content"].number == 3
    assert stream.fields_by_name["samples"].number == 1
    sample = stream.nested_types_by_name["Sample"].fields
    assert {field.name: field.number for field in sample} == {"text": 1, "token_ids": 2}


async def test_it_decodes_greedily() -> None:
    request = request_from_jetstream(pb.DecodeRequest(text_content=Text(text="a"), max_tokens=5), "id", None)
    assert (request.sampling.temperature, request.sampling.n, request.stopping.max_tokens) == (0.0, 1, 5)


async def test_health() -> None:
    engine = ScriptedEngine()
    async with orchestrator(engine) as stub:
        assert (await stub.HealthCheck(pb.HealthCheckRequest())).is_live
        engine.is_healthy = False

        async def is_live() -> bool:
            return (await stub.HealthCheck(pb.HealthCheckRequest())).is_live

        while await is_live():
            await asyncio.sleep(0.02)


async def test_what_is_wrong_is_named() -> None:
    wrong = {
        "max_tokens": pb.DecodeRequest(text_content=Text(text="a")),
        "lora_adapter_id": pb.DecodeRequest(text_content=Text(text="a"), max_tokens=1, lora_adapter_id="x"),
        "has_bos": pb.DecodeRequest(text_content=Text(text="a"), max_tokens=1, has_bos=True),
        "num_samples": pb.DecodeRequest(text_content=Text(text="a"), max_tokens=1, num_samples=-1),
        "99": newer(pb.DecodeRequest(text_content=Text(text="a"), max_tokens=1)),
        "prompt": pb.DecodeRequest(max_tokens=1),
        "token_content.token_ids": pb.DecodeRequest(token_content=Tokens(token_ids=[256]), max_tokens=1),
        "text_content": pb.DecodeRequest(text_content=Text(text=""), max_tokens=1),
    }
    async with orchestrator(ScriptedEngine()) as stub:
        for path, request in wrong.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for response in stub.Decode(request):
                    raise AssertionError(f"a message before the refusal: {response}")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (path, caught.value)
            (violation,) = detail(caught.value, error_details_pb2.BadRequest).field_violations
            assert violation.field == path


async def test_a_client_that_leaves_ends_its_request() -> None:
    engine = ScriptedEngine()
    async with orchestrator(engine) as stub:
        call = stub.Decode(pb.DecodeRequest(text_content=Text(text="a"), max_tokens=1000))
        await call.read()
        call.cancel()
        await eventually(lambda: engine.loads().running == 0)
        assert engine.loads().available_pages == engine.total_pages
