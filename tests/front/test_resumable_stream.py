"""What is kept for readers to come is bounded in number, size and time, and a running request is the last to give way."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from jaxserve.config import EngineConfig
from jaxserve.core.messages import Submit
from jaxserve.engine import Engine
from jaxserve.events import Delta, Finished, FinishReason, Started, Timings, TokenLogprob, Usage
from jaxserve.front import resumable_stream
from jaxserve.front.active_requests import ActiveRequests
from jaxserve.front.admission import Admission
from jaxserve.front.resumable_stream import EVENT_BYTES, LOGPROB_BYTES, ResumableStream, ResumableStreams, StreamReader
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams
from jaxserve.request_errors import DuplicateRequestId, InvalidRequest, QueueFull, StreamNotFound, StreamTaken


class Clock:
    """Seconds that pass by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(resumable_stream, "time", self)

    def monotonic(self) -> float:
        return self.now


class Kept:
    """Streams that are fed by hand."""

    def __init__(self, limit: int = 4, limit_bytes: int = 1 << 20, seconds: float = 100.0):
        self.streams = ResumableStreams(limit, limit_bytes, seconds)
        self.cancelled: list[str] = []

    def add(self, name: str, tokens: int = 0, owner: str = "") -> ResumableStream:
        stream = ResumableStream(name, owner, lambda: self.cancelled.append(name), 1)
        self.streams.add(stream)
        stream.is_accepted = True
        for token in range(tokens):
            stream.push(0, [token], "", None)
        return stream

    def has(self, name: str, owner: str = "") -> bool:
        try:
            self.streams.attach(name, owner, 0).leave()
        except StreamNotFound:
            return False
        return True


def end(stream: ResumableStream) -> None:
    usage, timings = Usage(1, 0, stream.tokens), Timings(0.0, 0.0, 0.0, 0.0, 0.0)
    stream.finish(Finished(stream.request_id, 0, FinishReason.LENGTH, usage, timings))


def test_past_their_number_those_that_ended_first_are_forgotten_and_then_a_request_is_refused():
    kept = Kept(limit=3)
    for name in "abc":
        kept.add(name)
    for stream in ("c", "a"):
        end(kept.streams._streams["", stream])
    kept.add("d")
    assert [kept.has(name) for name in "abcd"] == [True, True, False, True]
    kept.add("e")
    assert [kept.has(name) for name in "abde"] == [False, True, True, True]
    with pytest.raises(QueueFull) as full:
        kept.add("f")
    assert full.value.limit == 3 and len(kept.streams) == 3
    assert not kept.cancelled


def test_past_their_size_those_that_ended_first_are_forgotten_and_then_the_largest_is_aborted():
    kept = Kept(limit=10, limit_bytes=100 * EVENT_BYTES)
    ended = [kept.add(name, tokens=20) for name in "ab"]
    for stream in reversed(ended):
        end(stream)
    small, large = kept.add("small", tokens=20), kept.add("large", tokens=35)
    kept.streams.sweep()
    assert len(kept.streams) == 4 and not kept.cancelled  # 97 events
    for token in range(10):
        small.push(0, [token], "", None)
    kept.streams.sweep()
    assert [kept.has(name) for name in ("a", "b", "small", "large")] == [True, False, True, True]  # b ended first
    for token in range(80):
        large.push(0, [token], "", None)
    kept.streams.sweep()
    assert not kept.has("a") and kept.cancelled[0] == "large" and set(kept.cancelled) == {"large"}
    end(large)
    kept.streams.sweep()
    assert [kept.has(name) for name in ("small", "large")] == [True, False]


def test_a_reader_that_blocks_ends_when_another_thread_leaves_for_it():
    reader = Kept().add("a").attach(0)

    def read() -> None:
        with pytest.raises(StreamTaken):
            next(reader)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    while not reader._is_blocked:
        time.sleep(0.001)
    reader.leave()
    reading.join(10)
    assert not reading.is_alive()


def test_a_reader_that_is_awaited_ends_when_another_task_leaves_for_it():
    reader = Kept().add("a").attach(0)

    async def leave_while_it_waits() -> None:
        reading = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        reader.leave()
        with pytest.raises(StreamTaken):
            await asyncio.wait_for(reading, 10)

    asyncio.run(leave_while_it_waits())


def test_a_stream_is_taken_from_a_reader_whose_event_loop_has_closed():
    stream = Kept().add("a")
    reader = stream.attach(0)

    async def read_for_a_moment() -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(anext(reader), 0.01)

    asyncio.run(read_for_a_moment())
    end(stream)
    assert [type(event) for event in stream.attach(0)] == [Finished]


def test_after_its_end_a_stream_is_kept_its_time_from_the_last_reading_and_no_reader_holds_it(
    monkeypatch: pytest.MonkeyPatch,
):
    clock, kept = Clock(monkeypatch), Kept(seconds=10.0)
    read, slow, gone = (kept.add(name, tokens=3) for name in ("read", "slow", "gone"))
    readers = [stream.attach(0) for stream in (read, slow, gone)]
    next(readers[2])
    clock.now += 100.0  # while it runs, a reader may take its time
    kept.streams.sweep()
    assert len(kept.streams) == 3 and not kept.cancelled
    for stream in (read, slow, gone):
        end(stream)
    assert [type(event) for event in readers[0]] == [Delta, Finished]
    clock.now += 9.0
    next(readers[1])
    clock.now += 2.0
    kept.streams.sweep()
    assert [name for _, name in kept.streams._streams] == ["slow"]
    assert isinstance(kept.streams.attach("slow", "", 3), StreamReader)  # and nothing is ever read
    clock.now += 11.0
    kept.streams.sweep()
    assert len(kept.streams) == 0 and not kept.cancelled


def test_a_request_without_a_reader_runs_on_its_time_whichever_of_its_sequences_end(monkeypatch: pytest.MonkeyPatch):
    clock, kept = Clock(monkeypatch), Kept(seconds=10.0)
    stream = ResumableStream("a", "", lambda: kept.cancelled.append("a"), 2)
    kept.streams.add(stream)
    stream.attach(0).leave()
    clock.now += 9.0
    end(stream)
    clock.now += 2.0
    kept.streams.sweep()
    assert kept.cancelled == ["a"]


def test_text_and_log_probabilities_those_of_the_prompt_too_count_in_the_size():
    kept = Kept()
    stream = kept.add("a")
    entry = TokenLogprob(1, -1.0, ((1, -1.0), (2, -2.0)))
    stream.push(0, [1], "four", [entry])
    assert stream.bytes == EVENT_BYTES + 4 * len("four") + 3 * LOGPROB_BYTES
    stream.start(Started("a", 5, 0, 0, (entry,) * 4))
    assert stream.bytes == 2 * EVENT_BYTES + 4 * len("four") + 5 * 3 * LOGPROB_BYTES


def test_a_tenant_sees_its_own_streams_alone_whatever_their_ids():
    kept = Kept()
    kept.add("a", tokens=2, owner="mine")
    kept.add("a", tokens=5, owner="other")
    assert kept.streams.attach("a", "mine", 2) and kept.streams.attach("a", "other", 5)
    with pytest.raises(InvalidRequest):
        kept.streams.attach("a", "mine", 3)
    assert not kept.has("a", "")


def test_readers_by_iteration_get_every_event_from_their_token_and_give_way_to_the_next():
    kept = Kept()
    stream = kept.add("a", tokens=6)
    first = stream.attach(0)
    assert next(first) == Delta("a", 0, tuple(range(6)), "")
    second = stream.attach(4)
    with pytest.raises(StreamTaken):
        next(first)
    first.leave()  # late: the stream has a reader all the same
    assert stream.idle_since is None
    end(stream)
    delta, finished = second
    assert isinstance(delta, Delta) and delta.token_ids == (4, 5)
    assert isinstance(finished, Finished)


def request(name: str, tokens: int) -> Request:
    return Request(
        token_ids=tuple(range(300, 310)),
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=tokens, ignore_eos=True),
        output=OutputParams(resumable=True),
        request_id=name,
    )


def test_of_two_requests_with_one_id_at_once_one_is_refused_and_the_other_keeps_its_stream(
    monkeypatch: pytest.MonkeyPatch,
):
    both, prepare = threading.Barrier(2), Admission.prepare

    def at_once(self: Admission, request: Request, handle: int, arrival: float) -> Submit:
        both.wait()
        return prepare(self, request, handle, arrival)

    with Engine(simulated_step_ms=1.0, slots=8, max_context=1024) as engine, ThreadPoolExecutor(2) as threads:
        monkeypatch.setattr(Admission, "prepare", at_once)
        outcomes = [threads.submit(engine.submit, request("the same", 500)).exception for _ in range(2)]
        refusals = [error for outcome in outcomes if (error := outcome()) is not None]
        assert [type(refusal) for refusal in refusals] == [DuplicateRequestId]
        tokens = [event.token_ids for event in engine.attach("the same", 0) if isinstance(event, Delta)]
        assert sum(map(len, tokens)) == 500


def test_nobody_takes_up_a_stream_whose_request_is_not_accepted_yet(monkeypatch: pytest.MonkeyPatch):
    """It would wait for ever where the request is refused at last, and its abort could come before the request."""
    with Engine(simulated_step_ms=0.5, slots=2, max_context=64) as engine:

        def meanwhile(*_: object):
            with pytest.raises(StreamNotFound):
                engine.attach("early", 0)
            raise QueueFull(1, 1.0)

        monkeypatch.setattr(ActiveRequests, "add", meanwhile)
        with pytest.raises(QueueFull):
            engine.submit(request("early", 4))


def test_an_engine_keeps_within_its_bounds_while_requests_run():
    limits = EngineConfig(resumable_streams=3, resumable_bytes=600 * EVENT_BYTES)
    with Engine(limits, simulated_step_ms=1.0, slots=8, max_context=4096) as engine:
        long = [engine.submit(request(f"long {number}", 4000)) for number in range(3)]
        with pytest.raises(QueueFull):
            engine.submit(request("one more", 1))
        assert engine.loads().running + engine.loads().waiting == 3
        # Each makes 4,000 events; together they may have 600: one after the other is aborted.
        reasons = [next(event for event in stream if isinstance(event, Finished)).finish_reason for stream in long]
        assert reasons == [FinishReason.ABORT] * 3
        assert sum(isinstance(event, Finished) for event in engine.submit(request("one more", 1))) == 1
        assert len(engine._kept) <= 3
