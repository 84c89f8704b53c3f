"""Time as a process has it on a machine that others use, and memory."""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

TICK = 0.005
"""Seconds between two looks."""


class RunningTime:
    """Seconds in which this process was let run, for figures that a busy machine must not spoil.

    Between two looks of a thread a few milliseconds apart, no more counts than twice that, or the processor time that
    this process took meanwhile if that is more: a pause of the machine does not count, and work that keeps the thread
    from looking does.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="running-time", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        looked, worked = time.monotonic(), time.process_time()
        while not self._stop.wait(TICK):
            now, work = time.monotonic(), time.process_time()
            self.seconds += min(now - looked, max(2 * TICK, work - worked))
            looked, worked = now, work


def resident_bytes(process: int | str = "self") -> int:
    """Resident memory of a process, this one if none is named."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096


def forget_peak(process: int | str = "self") -> None:
    """Lets `peak_resident_bytes` begin anew."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_resident_bytes(process: int | str = "self") -> int:
    """The most resident memory that a process has had."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
