"""Notices that the step loop has stopped moving: a device that hangs raises nothing."""

import logging
import threading
import time
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

TICK = 0.25
"""Seconds between looks, at most."""


class Watchdog:
    """Says that the core hangs once `limit` seconds have passed with work and without a step.

    The core tells of every step, also of one that only reads part of a prompt, and nothing compiles once it is ready.
    So no legal work is silent for longer than its longest step.

    The seconds are counted in ticks of which none counts for much more than it should have taken: a process that was
    stopped, with its core or alone, does not find on waking that an hour of silence has passed.

    Args:
        limit: seconds.
        steps_at_work: by the name of each core that has work, an object that is another one after each of its steps.
    """

    def __init__(self, limit: float, steps_at_work: Callable[[], Mapping[int, object]]):
        self.is_hung = False
        """Whether a core hangs now; it may recover."""
        self._limit = limit
        self._steps_at_work = steps_at_work
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="jaxserve-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    def _watch(self) -> None:
        tick = min(TICK, self._limit / 4)
        silent: dict[int, tuple[object, float]] = {}
        """Of each core with work the step that was seen, and the seconds since."""
        before = time.monotonic()
        while not self._stopped.wait(tick):
            now = time.monotonic()
            passed = min(now - before, 2 * tick)
            before = now
            still: dict[int, tuple[object, float]] = {}
            for core, step in self._steps_at_work().items():
                seen, seconds = silent.get(core, (step, 0.0))
                still[core] = (step, seconds + passed if step is seen else 0.0)
            silent = still
            hung = any(seconds > self._limit for _, seconds in silent.values())
            if hung and not self.is_hung:
                log.error("no step has ended for %g s while requests are in flight: the device hangs", self._limit)
            elif self.is_hung and not hung:
                log.warning("the step loop moves again")
            self.is_hung = hung
