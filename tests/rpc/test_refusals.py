"""Bad input over the wire: the right status, the field named, nothing allocated, nobody else disturbed."""

import asyncio
import inspect
import math

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from scripted_engine import ScriptedEngine
from serving import eventually, serving

from jaxserve.events import FinishReason
from jaxserve.request import Request, StoppingParams
from jaxserve.request_errors import DuplicateRequestId, InvalidRequest, ModelNotFound, QueueFull
from rpc.client import AsyncClient, Client
from rpc.v1 import jaxserve_pb2 as pb

pytestmark = pytest.mark.asyncio


def with_sampling(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="a", sampling=pb.Sampling(**fields))


def newer[M: Message](message: M) -> M:
    """The message as a client sends it whose interface has another field in it, 99."""
    return type(message).FromString(message.SerializeToString() + b"\x98\x06\x01")


def with_stopping(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="a", stopping=pb.Stopping(**fields))


def with_output(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="a", output=pb.Output(**fields))


OUT_OF_RANGE = [
    *[("sampling.temperature", with_sampling(temperature=value)) for value in (-0.1, 101, math.nan, math.inf)],
    *[("sampling.top_p", with_sampling(top_p=value)) for value in (0, -1, 1.5, math.nan, -math.inf)],
    ("sampling.top_k", with_sampling(top_k=-2)),
    *[("sampling.min_p", with_sampling(min_p=value)) for value in (-0.5, 2, math.nan)],
    *[("sampling.presence_penalty", with_sampling(presence_penalty=value)) for value in (-2.5, 2.5)],
    *[("sampling.frequency_penalty", with_sampling(frequency_penalty=value)) for value in (-2.5, math.inf)],
    *[("sampling.repetition_penalty", with_sampling(repetition_penalty=value)) for value in (0, -1, 101)],
    *[("sampling.seed", with_sampling(seed=value)) for value in (-1, 2**32)],
    *[("sampling.n", with_sampling(n=value)) for value in (-1, 0, 2, 10**9)],
    *[("sampling.logit_bias", with_sampling(logit_bias=value)) for value in ({-1: 1}, {256: 1}, {1: 101})],
    ("sampling.logit_bias", with_sampling(logit_bias=dict.fromkeys(range(256), 1.0) | {300: 1.0})),
    *[("stopping.max_tokens", with_stopping(max_tokens=value)) for value in (-1, 0, 2**31)],
    *[("stopping.min_tokens", with_stopping(min_tokens=value, max_tokens=4)) for value in (-1, 5)],
    *[("stopping.stop", with_stopping(stop=value)) for value in ([""], ["x" * 257], ["x"] * 17)],
    *[("stopping.stop_token_ids", with_stopping(stop_token_ids=value)) for value in ([-1], [256], [1] * 8)],
    *[("output.logprobs", with_output(logprobs=value)) for value in (-1, 21)],
    *[("output.prompt_logprobs", with_output(prompt_logprobs=value)) for value in (-1, 21)],
    ("constraint.regex", pb.GenerateRequest(text="a", constraint=pb.Constraint(regex=""))),
    ("constraint.choice", pb.GenerateRequest(text="a", constraint=pb.Constraint(choice=pb.Choices()))),
    ("constraint", pb.GenerateRequest(text="a", constraint=pb.Constraint(json_object=False))),
    ("constraint", pb.GenerateRequest(text="a", constraint=pb.Constraint())),
    ("prompt", pb.GenerateRequest()),
    ("text", pb.GenerateRequest(text="")),
    ("text", pb.GenerateRequest(text="x" * 4096)),
    ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds())),
    ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 256]))),
    ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1]))),
    ("messages", pb.GenerateRequest(messages=pb.ChatMessages())),
    ("request_id", pb.GenerateRequest(text="a", request_id="x" * 129)),
    ("99", newer(pb.GenerateRequest(text="a"))),
    ("sampling.99", pb.GenerateRequest(text="a", sampling=newer(pb.Sampling(logit_bias={1: 1.0})))),
    ("messages.messages.99", pb.GenerateRequest(messages=pb.ChatMessages(messages=[newer(pb.ChatMessage())]))),
]


async def refusal_of(client: AsyncClient, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    """The error of a stream that must fail before its first message."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for response in client._inference.Generate(request):
            raise AssertionError(f"a message before the refusal: {response}")
    return caught.value


def detail[Kind: (error_details_pb2.BadRequest, error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo)](
    error: grpc.aio.AioRpcError, kind: type[Kind]
) -> Kind:
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.message == error.details()
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    raise AssertionError(f"no {kind.__name__} in {status}")


async def test_every_field_out_of_range_is_an_invalid_argument_that_names_it() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as (server, client):
        for path, request in OUT_OF_RANGE:
            error = await refusal_of(client, request)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (path, error)
            (violation,) = detail(error, error_details_pb2.BadRequest).field_violations
            assert violation.field == path
            assert violation.description
            assert path in (error.details() or "")
            assert detail(error, error_details_pb2.ErrorInfo).reason == "INVALID_REQUEST"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client._inference.GenerateOnce(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        loads = engine.loads()
        assert (loads.steps, loads.running, loads.waiting) == (0, 0, 0)
        assert loads.available_pages == engine.total_pages
        await eventually(lambda: len(server.calls) == 0)


async def test_every_field_of_the_proto_is_read_or_refused() -> None:
    """A new field must not be dropped in silence: this list grows with the proto."""
    known = {
        "Sampling": "temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty seed "
        "logit_bias n",
        "Stopping": "max_tokens min_tokens stop stop_token_ids include_stop ignore_eos",
        "Output": "logprobs prompt_logprobs resumable return_text return_token_ids",
        "Constraint": "json_schema regex grammar choice json_object",
        "GenerateRequest": "request_id model text token_ids messages sampling stopping constraint output priority "
        "cache_salt",
    }
    for message, names in known.items():
        fields = pb.DESCRIPTOR.message_types_by_name[message].fields_by_name
        assert set(fields) == set(names.split()), message


async def test_an_unknown_model_is_not_found() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        error = await refusal_of(client, pb.GenerateRequest(text="a", model="gpt-17"))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "gpt-17" in (error.details() or "")
        assert detail(error, error_details_pb2.ErrorInfo).reason == "MODEL_NOT_FOUND"
        with pytest.raises(ModelNotFound):
            await client.generate_once("a", model="gpt-17")
        assert (await client.generate_once("a", model="scripted", max_tokens=1)).text == "a"


async def test_a_duplicate_of_an_active_id_already_exists() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as (_, client):
        first = client.generate(Request(prompt="a", request_id="same"))
        events = first.events()
        await anext(events)
        error = await refusal_of(client, pb.GenerateRequest(text="b", request_id="same"))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        with pytest.raises(DuplicateRequestId):
            await client.generate(Request(prompt="b", request_id="same")).text()
        assert engine.loads().running == 1  # the refused one did not end the first
        await events.aclose()
        await eventually(lambda: engine.loads().running == 0)
        assert (
            await client.generate_once(Request(prompt="b", request_id="same", stopping=StoppingParams(max_tokens=1)))
        ).text == "a"


async def test_a_full_queue_refuses_exactly_what_is_too_much_each_with_retry_info() -> None:
    engine = ScriptedEngine(slots=4, max_waiting=6)
    engine.paused.set()
    async with serving(engine) as (_, client):

        async def run() -> grpc.aio.AioRpcError | FinishReason:
            generation = client._inference.Generate(pb.GenerateRequest(text="a", stopping=pb.Stopping(max_tokens=3)))
            try:
                last = [response async for response in generation][-1]
            except grpc.aio.AioRpcError as error:
                return error
            return FinishReason(last.finished.finish_reason)

        runs = [asyncio.create_task(run()) for _ in range(4 + 6 + 25)]
        await eventually(lambda: sum(task.done() for task in runs) == 25)
        refused = [task.result() for task in runs if task.done()]
        for error in refused:
            assert isinstance(error, grpc.aio.AioRpcError)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert detail(error, error_details_pb2.RetryInfo).retry_delay.ToNanoseconds() == 250_000_000
        with pytest.raises(QueueFull) as caught:
            await client.generate_once("a")
        assert caught.value.limit == 10
        assert caught.value.retry_after == 0.25
        assert await client.is_ready()  # a health check is never refused by the admission limit
        engine.paused.clear()
        results = await asyncio.gather(*runs)
        assert results.count(FinishReason.LENGTH) == 10
        assert engine.loads().available_pages == engine.total_pages


async def test_client_names_fields_as_the_engine_does() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        for field, value in (("top_p", 7.0), ("max_tokens", 0), ("logprobs", 21), ("n", 2)):
            with pytest.raises(InvalidRequest) as caught:
                await client.generate_once("a", **{field: value})
            assert caught.value.field == field
        for prompt, field in (("x" * 4096, "prompt"), ({"token_ids": [999]}, "token_ids")):
            with pytest.raises(InvalidRequest) as caught:
                await client.generate_once(prompt)
            assert caught.value.field == field


async def test_client_refuses_what_no_message_can_carry() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        for field, value in (
            ("top_k", 2**40),
            ("logit_bias", {2**40: 1.0}),
            ("temperature", 10**400),
            ("model", 5),
            ("model", "\ud800"),
            ("request_id", "\ud800"),
            ("colour", "red"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                client.generate("a", **{field: value})
            assert caught.value.field == field
        for timeout in (float("nan"), "soon", True):
            with pytest.raises(InvalidRequest, match="timeout"):
                client.generate("a", timeout=timeout)  # pyright: ignore[reportArgumentType]
        for deadline in (float("nan"), "soon"):
            with pytest.raises(InvalidRequest, match="deadline"):
                client.generate(Request(prompt="a", deadline=deadline))
        for message in ({"role": "user", "content": "a", "mood": "good"}, {"role": "user"}, {"content": "a"}):
            with pytest.raises(InvalidRequest) as caught:
                client.chat([message])
            assert caught.value.field == "messages"
        with pytest.raises(InvalidRequest) as caught:
            client.generate(b"a")  # pyright: ignore[reportArgumentType]
        assert caught.value.field == "prompt"
        with Client(client.address) as plain:
            for call, field in (
                (lambda: plain.tokenize([{"role": "user", "content": 5}]), "messages"),
                (lambda: client.tokenize([{"role": "user", "content": "a", "mood": "good"}]), "messages"),
                (lambda: client.tokenize([{"role": "user", "content": None}]), "messages"),  # pyright: ignore
                (lambda: client.tokenize("\ud800"), "text"),
                (lambda: plain.detokenize([2**40]), "token_ids"),
                (lambda: client.detokenize([2**40]), "token_ids"),
                (lambda: plain.abort("\ud800"), "request_id"),
                (lambda: client.abort("\ud800"), "request_id"),
                (lambda: client.abort(None), "request_id"),  # pyright: ignore[reportArgumentType]
                (lambda: plain.attach("a", 2**70), "from_token"),
                (lambda: client.attach("a", 2**70), "from_token"),
                (lambda: plain.profile(10**400), "seconds"),
                (lambda: client.profile(10**400), "seconds"),
            ):
                with pytest.raises(InvalidRequest) as caught:
                    answer = call()
                    if inspect.isawaitable(answer):
                        await answer
                assert caught.value.field == field


async def test_an_error_that_quotes_the_request_still_reaches_the_client() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        with pytest.raises(ModelNotFound, match="🦜"):
            await client.generate_once("a", model="🦜" * 100_000)


async def test_long_prompts_that_wait_to_be_tokenized_are_bounded() -> None:
    engine = ScriptedEngine(slots=2, max_waiting=2)
    engine.may_submit.clear()
    async with serving(engine) as (_, client):
        runs = [asyncio.ensure_future(client.generate_once("x" * 3000, max_tokens=1)) for _ in range(10)]
        await eventually(lambda: sum(run.done() for run in runs) == 6)
        engine.may_submit.set()
        answers = await asyncio.gather(*runs, return_exceptions=True)
        assert sum(isinstance(answer, QueueFull) for answer in answers) == 6
        assert engine.loads().available_pages == engine.total_pages
