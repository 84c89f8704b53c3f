"""Whoever stops listening stops the work: cancelled, killed, late, aborted, or asleep."""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import grpc.aio
import pytest
from raw_http2 import SHUT_HELLO, call_headers, data_frames, headers_frame, message, raw_connection
from scripted_engine import ScriptedEngine, expected_ids
from serving import back_to_the_start, eventually, serving

from jaxserve.events import FinishReason
from jaxserve.request import Request
from rpc.call_runner import INLINE_CHARACTERS, INLINE_TOKENS, _are_quick
from rpc.server_config import ServerConfig
from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc

pytestmark = pytest.mark.asyncio


def endless_engine(slots: int = 8) -> ScriptedEngine:
    """One whose requests end by themselves long after a test has lost its patience: who ends them is what is tested."""
    return ScriptedEngine(slots, max_context=1 << 20, stream_buffer_tokens=1 << 20)


async def test_leaving_the_loop_early_ends_the_request() -> None:
    engine = endless_engine()
    async with serving(engine) as (server, client):
        async for _ in client.generate("hello"):
            break
        await back_to_the_start(engine, server)
        held = client.generate("hello")  # still referenced after the loop
        async for _ in held:
            break
        await back_to_the_start(engine, server)


async def test_cancel_ends_the_iteration_without_an_error() -> None:
    engine = endless_engine()
    async with serving(engine) as (server, client):
        generation = client.generate("hello")
        seen = 0
        async for _ in generation:
            seen += 1
            if seen == 3:
                generation.cancel()
        assert seen >= 3
        assert generation.finished is None
        await back_to_the_start(engine, server)


async def test_cancelling_the_reading_task_ends_the_request() -> None:
    engine = endless_engine()
    async with serving(engine) as (server, client):
        for reading in (client.generate("hello").text(), client.generate_once("hello")):
            task = asyncio.ensure_future(reading)
            await eventually(lambda: engine.loads().running == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await back_to_the_start(engine, server)


async def test_a_task_that_is_cancelled_after_its_generation_is_cancelled_as_well() -> None:
    engine = endless_engine()
    async with serving(engine) as (server, client):
        generation = client.generate("hello")
        task = asyncio.ensure_future(generation.text())
        await eventually(lambda: engine.loads().running == 1)
        generation.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await back_to_the_start(engine, server)


async def test_a_task_that_goes_on_after_it_was_cancelled_may_cancel_a_generation() -> None:
    async with serving(endless_engine()) as (_, client):
        generation = client.generate("hello")

        async def read_while_cleaning_up() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                async for _ in generation:
                    generation.cancel()

        task = asyncio.create_task(read_while_cleaning_up())
        await asyncio.sleep(0)
        task.cancel()
        await task
        assert generation.started is not None


async def test_cancel_while_queued_takes_no_slot() -> None:
    engine = endless_engine(slots=1)
    async with serving(engine) as (server, client):
        first = asyncio.ensure_future(client.generate("hello").text())
        await eventually(lambda: engine.loads().running == 1)
        second = asyncio.ensure_future(client.generate("hello").text())
        await eventually(lambda: engine.loads().waiting == 1)
        second.cancel()
        await eventually(lambda: engine.loads().waiting == 0)
        assert engine.loads().running == 1
        first.cancel()
        await back_to_the_start(engine, server)


async def test_a_client_that_leaves_while_its_long_prompt_is_tokenized_leaves_nothing() -> None:
    engine = endless_engine()
    engine.may_submit.clear()
    async with serving(engine) as (server, client):
        task = asyncio.ensure_future(client.generate("x" * 3000).text())
        await eventually(lambda: len(server.calls) == 1)
        task.cancel()
        await eventually(lambda: len(server.calls) == 0)
        engine.may_submit.set()
        await eventually(lambda: engine.submitted == 1)  # nobody wants it any more
        await back_to_the_start(engine, server)


async def test_a_long_prompt_does_not_hold_up_the_event_loop() -> None:
    engine = endless_engine()
    engine.may_submit.clear()
    async with serving(engine) as (server, client):
        slow = asyncio.ensure_future(client.generate_once("x" * 3000, max_tokens=1))
        await eventually(lambda: len(server.calls) == 1)
        assert await client.is_ready()
        assert not slow.done()
        engine.may_submit.set()
        assert (await slow).text == "a"


async def test_prompts_that_come_together_are_tokenized_on_the_event_loop_only_where_all_of_them_are_short() -> None:
    half = Request(prompt="x" * (INLINE_CHARACTERS // 2)), Request(token_ids=(1,) * (INLINE_TOKENS // 2))
    assert _are_quick([*half, *half])
    assert not _are_quick([half[0]] * 3)
    assert not _are_quick([half[1]] * 3)


async def test_a_deadline_ends_the_request_in_mid_stream() -> None:
    engine = endless_engine()
    async with serving(engine) as (server, client):
        generation = client.generate("hello", timeout=0.3)
        tokens: list[int] = []
        with pytest.raises(TimeoutError):
            async for delta in generation:
                tokens += delta.token_ids
        assert tokens == expected_ids(len(tokens))
        assert tokens
        await back_to_the_start(engine, server)
        with pytest.raises(TimeoutError):
            await client.generate_once("hello", timeout=0.1)
        await back_to_the_start(engine, server)


async def test_the_servers_own_deadline_status_follows_the_terminal_event() -> None:
    """As a client sees it whose clock runs behind: the engine's deadline passes before the call's."""
    engine = endless_engine()
    submit_all = engine.submit_all

    def submit_with_less_time(requests: Sequence[Request]):
        (request,) = requests
        assert request.deadline is not None
        assert request.deadline == pytest.approx(time.monotonic() + 5, abs=4)
        return submit_all([replace(request, deadline=time.monotonic() + 0.1)])

    engine.submit_all = submit_with_less_time
    async with serving(engine) as (server, client):
        generation = client.generate("hello", timeout=5)
        with pytest.raises(TimeoutError, match="the work was stopped"):
            await generation.text()
        assert generation.finished is not None and generation.finished.finish_reason is FinishReason.DEADLINE
        await back_to_the_start(engine, server)


async def test_a_deadline_that_passes_in_the_queue_is_exceeded_and_never_started() -> None:
    engine = endless_engine(slots=1)
    async with serving(engine) as (server, client):
        first = asyncio.ensure_future(client.generate("hello").text())
        await eventually(lambda: engine.loads().running == 1)
        late = client.generate("late", timeout=0.1)
        with pytest.raises(TimeoutError):
            await late.text()
        assert late.started is None
        await eventually(lambda: engine.loads().waiting == 0)
        first.cancel()
        await back_to_the_start(engine, server)


@pytest.mark.parametrize("timeout", [math.inf, 1e12, 10**400])
async def test_a_timeout_that_never_comes_is_none(timeout: float) -> None:
    async with serving(endless_engine()) as (_, client):
        assert (await client.generate_once("hello", timeout=timeout, max_tokens=3)).text == "abc"
        assert await client.generate("hello", timeout=timeout, max_tokens=3).text() == "abc"
        assert not await client.abort("nobody's", timeout=timeout)


async def test_an_expired_deadline_is_refused() -> None:
    engine = endless_engine()
    async with serving(engine) as (_, client):
        with pytest.raises(TimeoutError):
            await client.generate(Request(prompt="hello", deadline=time.monotonic() - 1)).text()
        assert engine.loads().steps == 0


async def test_abort_ends_a_stream_with_finish_reason_abort_and_status_ok() -> None:
    engine = endless_engine()
    async with serving(engine) as (server, client):
        generation = client.generate("hello")
        seen = 0
        async for _ in generation:
            seen += 1
            if seen == 3:
                assert await client.abort(generation.request_id)
        assert seen >= 3
        assert generation.finished is not None and generation.finished.finish_reason is FinishReason.ABORT
        await back_to_the_start(engine, server)
        once = asyncio.ensure_future(client.generate_once(Request(prompt="a", request_id="once")))
        await eventually(lambda: engine.loads().running == 1)
        await client.abort("once")
        assert (await once).finish_reason is FinishReason.ABORT
        assert not await client.abort("once")  # it has ended


async def test_abort_ends_a_request_whose_long_prompt_is_still_tokenized() -> None:
    engine = endless_engine()
    engine.may_submit.clear()
    async with serving(engine) as (server, client):
        generation = client.generate("x" * 3000)
        reading = asyncio.ensure_future(generation.text())
        await eventually(lambda: len(server.calls) == 1)
        assert not await client.abort("nobody")
        assert await client.abort(generation.request_id)
        engine.may_submit.set()
        await reading
        assert generation.finished is not None and generation.finished.finish_reason is FinishReason.ABORT
        await back_to_the_start(engine, server)


SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
"""A client that takes at most 64 KiB ahead of its reader, so that a server notices soon that nobody reads."""


async def test_a_slow_reader_is_aborted_at_the_buffers_bound_and_still_told() -> None:
    engine = ScriptedEngine(step_time=0.0, max_context=1 << 20, stream_buffer_tokens=200)
    async with (
        serving(engine) as (server, client),
        grpc.aio.insecure_channel(client.address, options=SMALL_WINDOW) as channel,
    ):
        call = jaxserve_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="hello"))
        responses = aiter(call)
        await anext(responses)
        # Nothing is read now: the transport's window fills, then the engine's buffer for this stream.
        await eventually(lambda: engine.loads().running == 0 and engine.loads().steps > 200)
        assert engine.loads().available_pages == engine.total_pages
        assert len(server.calls) == 1
        received = [response async for response in responses]
        tokens = [token for response in received for token in response.delta.token_ids]
        finished = received[-1].finished
        assert finished.finish_reason == FinishReason.ABORT
        assert tokens == expected_ids(finished.usage.completion_tokens)
        await back_to_the_start(engine, server)


async def test_a_reader_that_stalls_is_aborted_at_the_stall_limit() -> None:
    engine = ScriptedEngine(step_time=0.0, max_context=1 << 24, stream_buffer_tokens=1 << 24)
    config = ServerConfig(grpc_port=0, stall_limit=0.3)
    async with (
        serving(engine, config) as (server, client),
        grpc.aio.insecure_channel(client.address, options=SMALL_WINDOW) as channel,
    ):
        call = jaxserve_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="hello"))
        await call.read()
        await back_to_the_start(engine, server)
        assert await client.generate("other", max_tokens=3).text() == "abc"
        assert not call.done()
        call.cancel()


async def test_an_answer_in_one_message_that_nobody_takes_is_waited_for_until_the_stall_limit() -> None:
    engine = ScriptedEngine()
    config = ServerConfig(grpc_port=0, stall_limit=0.3)
    async with serving(engine, config) as (server, client), raw_connection(client.address, SHUT_HELLO) as reader:
        asked = pb.GenerateRequest(text="hello", stopping=pb.Stopping(max_tokens=3)).SerializeToString()
        headers = headers_frame(1, call_headers("/jaxserve.v1.Inference/GenerateOnce"))
        await reader.write(headers + data_frames(1, message(asked)))
        await eventually(lambda: engine.submitted == 1)
        await back_to_the_start(engine, server)
