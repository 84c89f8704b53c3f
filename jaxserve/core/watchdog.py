"""Notices that the step loop has stopped moving: a device that hangs raises nothing."""

import logging
import threading
import time
from collections.abc import Callable

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
        is_busy: whether there is work.
        progress: an object that is another one after each step.
    """

    def __init__(self, limit: float, is_busy: Callable[[], bool], progress: Callable[[], object]):
        self.is_hung = False
        """Whether the core hangs now; it may recover."""
        self._limit = limit
        self._is_busy = is_busy
        self._progress = progress
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="jaxserve-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    def _watch(self) -> None:
        tick = min(TICK, self._limit / 4)
        seen, silent = self._progress(), 0.0
        before = time.monotonic()
        while not self._stopped.wait(tick):
            now = time.monotonic()
            silent += min(now - before, 2 * tick)
            before = now
            progress = self._progress()
            if progress is not seen or not self._is_busy():
                seen, silent = progress, 0.0
                if self.is_hung:
                    log.warning("the step loop moves again")
                self.is_hung = False
            elif silent > self._limit and not self.is_hung:
                log.error("no step has ended for %g s while requests are in flight: the device hangs", self._limit)
                self.is_hung = True
