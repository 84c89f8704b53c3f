"""CPU time of processes and of the machine, from /proc. Where there is no /proc nothing is measured."""

import os
import time
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")
"""Seconds of one unit in /proc."""


def process_tree(pid: int) -> list[int]:
    """A process and all that descend from it, as they are now."""
    tree = [pid]
    for parent in tree:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                tree += map(int, children.read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue  # the thread has ended meanwhile
    return tree


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of processes so far, in seconds; of one that has ended, none."""
    total = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += (int(fields[11]) + int(fields[12])) * TICK
    return total


def resident_bytes(pids: list[int]) -> int:
    """Memory of processes; what they share counts for each."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids)


def descriptors(pids: list[int]) -> int:
    """Open files and sockets of processes."""
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def machine_seconds() -> float:
    """CPU time that all processes, the kernel and other guests of the host (stolen time) took so far, in seconds."""
    user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) * TICK


class OtherLoad:
    """How much of the machine processes other than the measured ones took, between its making and `share`.

    Timings on a machine that others use are noise, and unevenly so: an engine whose threads spin at a barrier loses far
    more to a neighbour than one whose threads sleep. A figure is worth as much as the machine was quiet.
    """

    def __init__(self, pids: list[int]):
        self._pids = list({*pids, os.getpid()})
        self._start = self._read()

    def _read(self) -> tuple[float, float] | None:
        if not Path("/proc/stat").exists():
            return None
        return time.monotonic(), machine_seconds() - cpu_seconds(self._pids)

    def share(self) -> float | None:
        """The part of all cores' time, 0..1; None where it cannot be known."""
        end = self._read()
        if end is None or self._start is None:
            return None
        elapsed = end[0] - self._start[0]
        return max(0.0, (end[1] - self._start[1]) / (elapsed * (os.cpu_count() or 1)))
