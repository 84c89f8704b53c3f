"""A list of prompts is waited for as a whole, whatever else the engine does, and a stream is whole or says so."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxserve.engine import Engine
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams
from jaxserve.request_errors import EngineUnavailable, InvalidRequest, QueueFull, TenantBusy


@pytest.mark.parametrize("resumable", [False, True])
def test_outputs_longer_than_a_reader_may_leave_unread_are_whole(resumable: bool):
    with Engine(simulated_step_ms=1.0, slots=4, max_context=1024, stream_buffer_tokens=256) as engine:
        completions = engine.generate(["one", "two"], n=2, max_tokens=900, ignore_eos=True, resumable=resumable)
        outputs = [output for completion in completions for output in completion.outputs]
        assert [(output.finish_reason, len(output.token_ids)) for output in outputs] == [("length", 900)] * 4


@pytest.mark.parametrize("resumable", [False, True])
def test_a_reader_that_left_too_much_unread_is_told_and_the_log_once(resumable: bool, caplog: pytest.LogCaptureFixture):
    async def read_late(engine: Engine) -> None:
        stream = engine.generate("one", n=4, max_tokens=900, ignore_eos=True, resumable=resumable)
        await anext(stream)
        while len(engine._requests):
            await asyncio.sleep(0.01)
        async for _ in stream:
            pass

    with (
        Engine(simulated_step_ms=1.0, slots=4, max_context=1024, stream_buffer_tokens=64) as engine,
        pytest.raises(RuntimeError, match="aborted"),
    ):
        asyncio.run(read_late(engine))
    assert caplog.text.count("unread") == 1


def test_lists_that_fill_the_queue_for_each_other_are_all_served():
    with (
        Engine(simulated_step_ms=1.0, slots=2, max_waiting=6, max_context=256) as engine,
        ThreadPoolExecutor(3) as threads,
    ):
        lists = [threads.submit(engine.generate, ["one"] * 20, n=2, max_tokens=20, ignore_eos=True) for _ in range(3)]
        outputs = [output for each in lists for completion in each.result() for output in completion.outputs]
        assert [len(output.token_ids) for output in outputs] == [20] * 120


def request(n: int = 1, tenant: str = "") -> Request:
    stopping = StoppingParams(max_tokens=4000, ignore_eos=True)
    return Request(token_ids=(300,), sampling=SamplingParams(n=n), stopping=stopping, tenant=tenant)


def test_a_list_waits_for_streams_that_are_kept_and_a_request_alone_does_not():
    with Engine(simulated_step_ms=1.0, slots=8, max_context=256, resumable_streams=2) as engine:
        completions = engine.generate(["one"] * 7, max_tokens=20, ignore_eos=True, resumable=True)
        assert [len(completion.token_ids) for completion in completions] == [20] * 7
    with Engine(simulated_step_ms=1.0, slots=1, max_waiting=0, max_context=4096) as engine:
        running = engine.submit(request())
        with pytest.raises(QueueFull):
            engine.submit(request())
        running.cancel()


def test_a_list_ends_where_no_room_will_come():
    limits = {"slots": 4, "max_waiting": 0, "max_context": 4096, "max_tenant_requests": 2}
    with Engine(simulated_step_ms=1.0, **limits) as engine, ThreadPoolExecutor(1) as threads:
        with pytest.raises(TenantBusy):
            engine.generate([request(3, "tenant")])
        running = engine.submit(request(4))
        waiting = threads.submit(engine.generate, [request()])
        engine.drain()
        with pytest.raises(EngineUnavailable):
            waiting.result()
        running.cancel()


def test_an_output_without_a_token_has_no_log_probabilities_where_they_were_asked_for():
    with Engine(simulated_step_ms=1.0, slots=4, max_context=256) as engine:
        asked = Request(token_ids=(300,), output=OutputParams(logprobs=1), deadline=0.0)
        completions = engine.generate([asked, Request(token_ids=(300,), deadline=0.0)])
        assert [(completion.token_ids, completion.logprobs) for completion in completions] == [((), ()), ((), None)]


def test_a_list_is_refused_for_a_number_of_sequences_that_is_none():
    with Engine(simulated_step_ms=1.0, slots=4, max_context=256) as engine:
        for n in (0, 10**9, 1.5, "2"):
            with pytest.raises(InvalidRequest) as caught:
                engine.generate(["one", "two"], n=n)
            assert caught.value.field == "n"
