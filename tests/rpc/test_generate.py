"""Generate and GenerateOnce over a real server and connection, with a scripted engine."""

import asyncio
import threading
from collections import Counter

import grpc
import grpc.aio
import pytest
from breaking_proxy import BreakingProxy
from scripted_engine import ScriptedEngine, expected_ids
from serving import serving

from jaxserve.events import Delta, Finished, FinishReason, Started
from jaxserve.request import Request
from rpc.client import AsyncClient, RpcFailed
from rpc.server_config import ServerConfig
from rpc.thread_pool import started_pool
from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc

pytestmark = pytest.mark.asyncio


async def test_a_stream_starts_gives_deltas_and_finishes_once() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        generation = client.generate("hello", max_tokens=5, logprobs=2)
        events = [event async for event in generation.events()]
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    deltas = events[1:-1]
    assert all(isinstance(event, Delta) for event in deltas)
    assert [token for delta in deltas for token in delta.token_ids] == expected_ids(5)
    assert "".join(delta.text for delta in deltas) == "abcde"
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    assert [entry.token_id for entry in logprobs] == expected_ids(5)
    assert all(len(entry.top) == 2 for entry in logprobs)
    assert events[0].prompt_tokens == 5
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert events[-1].usage.completion_tokens == 5
    assert events[-1].timings.total > 0
    assert {event.request_id for event in events} == {generation.request_id}


async def test_the_seed_that_is_used_is_reported() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        generation = client.generate("hello", max_tokens=1, seed=2**32 - 1)
        await generation.text()
        once = await client._inference.GenerateOnce(
            pb.GenerateRequest(text="a", sampling=pb.Sampling(seed=41), stopping=pb.Stopping(max_tokens=1))
        )
    assert generation.started is not None and generation.started.seed == 2**32 - 1
    assert once.seed == 41


async def test_generate_once_gives_what_the_stream_gives() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        completion = await client.generate_once("hello", max_tokens=40, logprobs=1)
    assert completion.token_ids == tuple(expected_ids(40))
    assert completion.text == bytes(expected_ids(40)).decode()
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.usage.prompt_tokens == 5
    assert completion.usage.completion_tokens == 40
    assert completion.logprobs is not None and len(completion.logprobs) == 40


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("hello", 5), ({"token_ids": [1, 2, 3]}, 3), ({"messages": [{"role": "user", "content": "hi"}]}, 8)],
)
async def test_every_kind_of_prompt_is_taken(prompt: str | dict[str, object], tokens: int) -> None:
    async with serving(ScriptedEngine()) as (_, client):
        completion = await client.generate_once(prompt, max_tokens=1)
    assert completion.usage.prompt_tokens == tokens


async def test_text_or_ids_are_left_out_where_unwanted() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        only_text = await client.generate_once("a", max_tokens=3, return_token_ids=False)
        only_ids = await client.generate_once("a", max_tokens=3, return_text=False)
    assert (only_text.text, only_text.token_ids) == ("abc", ())
    assert (only_ids.text, only_ids.token_ids) == ("", tuple(expected_ids(3)))


async def test_a_request_without_an_id_gets_one() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        response = await client._inference.GenerateOnce(
            pb.GenerateRequest(text="a", stopping=pb.Stopping(max_tokens=1))
        )
    assert len(response.request_id) == 32


async def test_64_streams_at_once_each_get_their_tokens_and_one_finished() -> None:
    async def run(client: AsyncClient, number: int) -> Counter[str]:
        generation = client.generate(Request(prompt="x" * (number + 1), request_id=f"r{number}"))
        kinds: Counter[str] = Counter()
        tokens: list[int] = []
        async for event in generation.events():
            assert event.request_id == f"r{number}"
            kinds[type(event).__name__] += 1
            if isinstance(event, Delta):
                tokens += event.token_ids
        assert tokens == expected_ids(len(tokens))
        assert generation.finished is not None
        assert generation.finished.usage.completion_tokens == len(tokens) == 128 - number - 1
        return kinds

    engine = ScriptedEngine(slots=24, max_waiting=40, max_context=128, step_time=0.001)
    async with serving(engine) as (_, client):
        kinds = await asyncio.gather(*(run(client, number) for number in range(64)))
        assert all(kind["Finished"] == 1 and kind["Started"] == 1 for kind in kinds)
        assert engine.loads().available_pages == engine.total_pages


async def test_a_failing_request_is_internal_and_leaves_its_neighbours_alone() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        good = [client.generate_once("fine", max_tokens=50) for _ in range(4)]
        broken = client.generate("break")

        async def read_broken() -> None:
            with pytest.raises(RpcFailed, match="a scripted failure") as caught:
                await broken.text()
            assert caught.value.code is grpc.StatusCode.INTERNAL

        *completions, _ = await asyncio.gather(*good, read_broken())
        assert broken.finished is not None and broken.finished.finish_reason is FinishReason.ERROR
        assert all(completion.token_ids == tuple(expected_ids(50)) for completion in completions)
        with pytest.raises(RpcFailed, match="a scripted failure"):
            await client.generate_once("break")


@pytest.mark.parametrize("method", ["generate", "attach"])
async def test_an_unexpected_exception_is_internal_and_logged_with_the_request_id(
    method: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    engine = ScriptedEngine()
    monkeypatch.setattr(engine, "attach", fail)
    async with serving(engine) as (_, client):
        with pytest.raises(RpcFailed) as caught:
            if method == "generate":
                await client.generate(Request(prompt="raise", request_id="unlucky")).text()
            else:
                await client.attach("unlucky").text()
        assert caught.value.code is grpc.StatusCode.INTERNAL
        assert "a defect" not in caught.value.details  # what failed inside is for the log
        record = next(record for record in caplog.records if "unlucky" in record.getMessage())
        assert record.exc_info is not None
        assert await client.generate("fine", max_tokens=3).text() == "abc"


async def test_a_message_larger_than_the_limit_is_refused() -> None:
    config = ServerConfig(grpc_port=0, longest_context=16)
    async with serving(ScriptedEngine(), config) as (_, client):
        with pytest.raises(Exception, match="larger than the server takes"):
            await client.generate("x" * (config.max_request_bytes + 1)).text()
        assert await client.is_ready()


async def test_a_server_that_is_far_away_is_reached_by_the_first_call() -> None:
    async with (
        serving(ScriptedEngine()) as (server, _),
        BreakingProxy(server.port, delay=0.3) as far,
        AsyncClient(far.address) as client,
    ):
        assert list((await client.generate_once("hello", max_tokens=3)).token_ids) == expected_ids(3)


async def test_bytes_that_are_no_message_are_a_bad_request() -> None:
    async with (
        serving(ScriptedEngine()) as (server, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        for method in ("GenerateOnce", "Generate"):
            kind = channel.unary_stream if method == "Generate" else channel.unary_unary
            call = kind(f"/jaxserve.v1.Inference/{method}")
            # Field 3, two bytes that are no UTF-8; and a field that ends too early.
            for data in (b"\x1a\x02\xff\xfe", b"\x1a\x7f"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    if method == "Generate":
                        async for _ in call(data):
                            pass
                    else:
                        await call(data)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unknown_method_is_unimplemented() -> None:
    async with (
        serving(ScriptedEngine()) as (server, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/jaxserve.v1.Inference/Dream")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_generated_stub_alone_is_enough_for_a_client() -> None:
    async with (
        serving(ScriptedEngine()) as (server, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = jaxserve_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(text="hello", stopping=pb.Stopping(max_tokens=3))
        kinds = [response.WhichOneof("event") async for response in stub.Generate(request)]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"delta"}


async def test_long_prompts_are_served_where_the_system_gives_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    async with serving(ScriptedEngine()) as (_, client):
        with monkeypatch.context() as scarce:
            scarce.setattr("threading.Thread.start", refuse)
            texts = [await client.generate("long " * 600, max_tokens=3).text() for _ in range(3)]
    assert texts == ["abc"] * 3


async def test_a_server_that_gets_too_few_threads_says_so_and_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, list[threading.Thread]()

    def refuse_the_third(thread: threading.Thread) -> None:
        if thread.name.startswith("scarce"):
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    with monkeypatch.context() as scarce:
        scarce.setattr("threading.Thread.start", refuse_the_third)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            started_pool(8, "scarce")
    assert len(started) == 2
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)
