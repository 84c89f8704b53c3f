"""The processes that send a load, as one: started together, watched, and their outcomes put together."""

import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Self

import numpy as np

from benchmarks.load.client import Part
from benchmarks.load.outcome import Outcome
from benchmarks.load.targets import Address
from benchmarks.workers import client_environment, python_module

LINE_BYTES = 1 << 26
"""Longest line of a client: the outcome of one request."""
LEAD = 0.5
"""Seconds between telling the clients of a load and its beginning."""
STREAMS_A_PROCESS = 256
"""Open streams that one client process handles with ease."""
BUSY = 0.85
"""Share of a core above which a client, not the server, may be what is measured."""
SLIP = 0.05
"""Seconds by which the p99 of sending may be late."""


@dataclass
class Run:
    """What the clients saw of one load."""

    outcomes: list[Outcome] = field(default_factory=list)
    cpu_share: float = 0.0
    """Of one core, that of the busiest client."""
    cpu_seconds: float = 0.0
    late_p99: float = 0.0
    """Seconds by which requests were sent late."""

    @property
    def client_bound(self) -> str:
        """Why the client may be what was measured; empty where it was not."""
        reasons = []
        if self.cpu_share > BUSY:
            reasons.append(f"a client used {100 * self.cpu_share:.0f} % of a core")
        if self.late_p99 > SLIP:
            reasons.append(f"1 % of the requests were sent more than {1e3 * self.late_p99:.0f} ms late")
        return "; ".join(reasons)


def processes_for(streams: float) -> int:
    """Client processes for so many open streams: more than one only where one would be too few."""
    return max(1, min(math.ceil(streams / STREAMS_A_PROCESS), os.cpu_count() or 1))


class Clients:
    """Client processes of one address. Use it as an async context manager."""

    def __init__(self, address: Address, count: int):
        self._address = address
        self._count = count
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        for _ in range(self._count):
            self._processes.append(
                await asyncio.create_subprocess_exec(
                    *python_module("benchmarks.load.client"),
                    stdin=pipe,
                    stdout=pipe,
                    limit=LINE_BYTES,
                    env=client_environment(),
                )
            )
        for process in self._processes:
            await _write(process, asdict(self._address))
        for process in self._processes:
            assert process.stdout is not None
            if not await process.stdout.readline():
                raise RuntimeError(f"a client ended with exit code {await process.wait()} before it was ready")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.returncode is None and error is not None:
                process.kill()
            elif process.stdin is not None:
                process.stdin.close()
            await process.wait()

    async def run(self, part: Part) -> Run:
        """Runs a load, a part of it on each client."""
        run, progress = Run(), Progress(part.load)
        start = time.monotonic() + LEAD
        parts = [replace(part, start=start, part=number, parts=self._count) for number in range(self._count)]
        await asyncio.gather(
            *(_write(process, asdict(one)) for process, one in zip(self._processes, parts, strict=True))
        )
        dones = await asyncio.gather(*(self._read(number, run, progress) for number in range(self._count)))
        progress.end()
        run.cpu_seconds = sum(done["cpu_seconds"] for done in dones)
        run.cpu_share = max(done["cpu_seconds"] / max(done["seconds"], 1e-9) for done in dones)
        run.late_p99 = float(np.percentile([late for done in dones for late in done["late"]], 99))
        run.outcomes.sort(key=lambda outcome: outcome.index)
        return run

    async def _read(self, number: int, run: Run, progress: "Progress") -> dict:
        reader = self._processes[number].stdout
        assert reader is not None
        while line := await reader.readline():
            match json.loads(line):
                case {"outcome": outcome}:
                    run.outcomes.append(Outcome(**outcome))
                case {"progress": counts}:
                    progress.show(number, counts, run.outcomes)
                case {"done": done}:
                    return done
        raise RuntimeError(f"client {number} ended with exit code {await self._processes[number].wait()}")


async def _write(process: asyncio.subprocess.Process, value: object) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(value).encode() + b"\n")
    await process.stdin.drain()


class Progress:
    """A line on standard error: rewritten in place on a terminal, a new one every 10 seconds elsewhere."""

    def __init__(self, title: str):
        self._title = title
        self._counts: dict[int, dict[str, int]] = {}
        self._began = time.monotonic()
        self._live = sys.stderr.isatty()
        self._shown = self._began
        self._tokens = (self._began, 0)
        self._rate = 0.0

    def show(self, number: int, counts: dict[str, int], outcomes: Sequence[Outcome]) -> None:
        """Takes in what a client says of itself."""
        self._counts[number] = counts
        now = time.monotonic()
        if now - self._shown < (0.4 if self._live else 10.0):
            return
        self._shown = now
        sent, open_, tokens = (sum(one[name] for one in self._counts.values()) for name in ("sent", "open", "tokens"))
        then, before = self._tokens
        if now - then >= 1.0:
            self._rate, self._tokens = (tokens - before) / (now - then), (now, tokens)
        broken = sum(bool(outcome.broken) for outcome in outcomes)
        refused = sum(outcome.ending == "refused" for outcome in outcomes)
        text = (
            f"{self._title}  {now - self._began:5.0f} s  sent {sent}  open {open_}  ended {len(outcomes)}  "
            f"refused {refused}  broken {broken}  {self._rate:7.0f} tokens/s"
        )
        sys.stderr.write(f"\r\x1b[2K{text}" if self._live else text + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leaves the line."""
        if self._live:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
