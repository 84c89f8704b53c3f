"""Reliability 21: a step that hangs makes the engine unready in time, and no legal work does."""

import threading
import time
from collections.abc import Callable

from jaxserve.core.watchdog import Watchdog
from jaxserve.engine import Engine
from jaxserve.front.completion import collect
from jaxserve.request import Request, StoppingParams

LIMIT = 1.5


def request(prompt_tokens: int, max_tokens: int) -> Request:
    stopping = StoppingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(token_ids=tuple(range(300, 300 + prompt_tokens)), stopping=stopping)


def wait_for(condition: Callable[[], bool], patience: float = 60.0) -> float:
    """Waits for what must come; the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < patience, "it never came true"
        time.sleep(0.01)
    return time.monotonic() - began


def test_a_step_that_hangs_makes_the_engine_unhealthy_until_it_moves_again():
    with Engine(simulated_step_ms=1.0, slots=4, max_context=256, watchdog_seconds=LIMIT) as engine:
        runner = engine._core._loop._runner
        read, hanging, may_go_on = runner.read, threading.Event(), threading.Event()

        def hang(pending: object) -> object:
            hanging.set()
            may_go_on.wait()
            return read(pending)

        (before,) = engine.generate([request(4, 4)])
        runner.read = hang
        stream = engine.submit(request(4, 4))
        hanging.wait()
        assert engine.is_healthy
        took = wait_for(lambda: not engine.is_healthy)
        assert took >= LIMIT - 0.1  # and within a second more on a machine that does not pause
        may_go_on.set()
        after = collect(stream)
        assert after.token_ids == before.token_ids and after.finish_reason == "length"
        wait_for(lambda: engine.is_healthy)
        assert engine.loads().available_pages == engine.loads().total_pages


def test_a_long_prompt_in_slow_steps_is_no_hang():
    fields = {"simulated_step_ms": 300.0, "prefill_chunks": (16,), "max_context": 256, "watchdog_seconds": LIMIT}
    with Engine(slots=4, **fields) as engine:
        stream = engine.submit(request(160, 4))  # 14 steps, 4 seconds
        healthy = []
        while not engine.loads().steps or engine.loads().running:
            healthy.append(engine.is_healthy)
            time.sleep(0.05)
        assert collect(stream).finish_reason == "length"
        assert all(healthy)


class Clockless:
    """Two cores whose progress a test decides."""

    def __init__(self) -> None:
        self.busy = True
        self.step = object()

    def steps_at_work(self) -> dict[int, object]:
        """The second core always moves."""
        return {**({0: self.step} if self.busy else {}), 1: object()}


def test_silence_without_work_is_no_hang_and_work_that_begins_starts_the_count():
    core = Clockless()
    core.busy = False
    watchdog = Watchdog(0.2, core.steps_at_work)
    time.sleep(0.6)
    assert not watchdog.is_hung
    core.busy = True
    assert wait_for(lambda: watchdog.is_hung) >= 0.15
    core.step = object()
    wait_for(lambda: not watchdog.is_hung)
    wait_for(lambda: watchdog.is_hung)
    core.busy = False
    wait_for(lambda: not watchdog.is_hung)
    watchdog.stop()


def test_a_process_that_was_stopped_for_long_does_not_take_it_for_a_hang(monkeypatch):
    core, jump = Clockless(), [0.0]
    real = time.monotonic
    monkeypatch.setattr("jaxserve.core.watchdog.time.monotonic", lambda: real() + jump[0])
    watchdog = Watchdog(30.0, core.steps_at_work)
    time.sleep(0.3)
    jump[0] = 3600.0  # as after SIGSTOP and SIGCONT
    time.sleep(0.6)
    assert not watchdog.is_hung
    watchdog.stop()
