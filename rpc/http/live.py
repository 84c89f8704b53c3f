"""The feed of the built-in page: what the engine did since the last frame, five times a second, while anybody looks."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from jaxserve.core.messages import StepRecord
from jaxserve.front.statistics import Distribution, device_idle_ratio
from rpc.http.errors import HttpError
from rpc.lifecycle import Lifecycle, State
from rpc.served_engine import ServedEngine

FRAME_INTERVAL = 0.2
"""Seconds between frames."""
MAX_STEPS = 200
"""Steps that one frame tells of, of each replica: those of a millisecond since the frame before. A page that is opened,
for which the event loop of every stream follows all of them at once, begins with as many."""
MAX_VIEWERS = 16
"""Pages that may look at once."""
WINDOW = 10.0
"""Seconds over which latencies, the hit rate and the idle part of the device are told."""

EMPTY, PROMPT, DECODE = 0, 1, 2
"""What a slot does: nothing, a prompt's tokens, or a sequence's next token."""

Change = tuple[int, int, int, float]
"""A slot, what it does from now on, the number of its owner, and when: seconds."""


class Lanes:
    """What each slot does, followed from step to step.

    Args:
        slots: of one replica.
        replicas: whose slots are numbered through.
    """

    def __init__(self, slots: int, replicas: int = 1):
        self.kinds = [EMPTY] * (slots * replicas)
        self.owners = [0] * (slots * replicas)
        self._owners = 0
        self._latest: list[tuple[set[int], set[int]]] = [(set(), set())] * replicas
        """By replica: the slots that still had work after its latest step, and those that had a prompt's in it."""

    def follow(self, records: Iterable[StepRecord], epoch: float) -> list[Change]:
        """The changes that steps made, in order. `epoch`: monotonic seconds at which time begins."""
        changes: list[Change] = []
        for record in records:
            start, end = record.dispatched - epoch, record.retired - epoch
            working, prompts, taken = set(record.slots), set(record.prompt_slots), set(record.taken_slots)
            before, prompts_before = self._latest[record.replica]
            # Of a thousand slots, those that may do something else than in the step before.
            for slot in sorted((working ^ before) | prompts | prompts_before | taken):
                kind = PROMPT if slot in prompts else DECODE if slot in working else EMPTY
                if slot in taken:
                    self._owners += 1
                    self.owners[slot] = self._owners
                if kind != self.kinds[slot] or slot in taken:
                    self._change(changes, slot, kind, start)
            for slot in record.freed_slots:
                self._change(changes, slot, EMPTY, end)
            self._latest[record.replica] = working.difference(record.freed_slots), prompts
        return changes

    def clear(self, now: float) -> list[Change]:
        """Nothing runs: what ended outside a step has ended."""
        changes: list[Change] = []
        for slot, kind in enumerate(self.kinds):
            if kind != EMPTY:
                self._change(changes, slot, EMPTY, now)
        self._latest = [(set(), set())] * len(self._latest)
        return changes

    def _change(self, changes: list[Change], slot: int, kind: int, when: float) -> None:
        self.kinds[slot] = kind
        changes.append((slot, kind, self.owners[slot], round(when, 4)))


@dataclass(frozen=True)
class _Sample:
    """Counters at one time, from which rates are differences."""

    time: float
    ttft: tuple[int, ...]
    itl: tuple[int, ...]
    queries: int
    hits: int


class LiveFeed:
    """Frames for every viewer, made once. Lives on the event loop's thread."""

    def __init__(self, lifecycle: Lifecycle):
        self._lifecycle = lifecycle
        self._epoch = time.monotonic()
        self._viewers: set[asyncio.Queue[bytes]] = set()
        self._sampling: asyncio.Task[None] | None = None
        self._lanes = Lanes(0)
        self._seen: StepRecord | None = None
        """The latest step."""
        self._samples: deque[_Sample] = deque()

    async def frames(self) -> AsyncGenerator[bytes]:
        """Server-sent events until the server stops: first what is, then what changed. Raises HttpError at once where
        too many look already."""
        if len(self._viewers) >= MAX_VIEWERS:
            raise HttpError(429, f"{MAX_VIEWERS} pages look already (limit {MAX_VIEWERS})", "rate_limit_error")
        # A page that does not read misses frames; the next whole picture is a reload away.
        with self._viewing() as queue:
            yield _event(self._picture())
            while self._lifecycle.state is not State.STOPPED:
                yield await queue.get()

    @contextmanager
    def _viewing(self) -> Generator[asyncio.Queue[bytes]]:
        queue: asyncio.Queue[bytes] = asyncio.Queue(maxsize=25)
        if not self._viewers:
            self._catch_up()
            self._sampling = asyncio.create_task(self._sample())
        self._viewers.add(queue)
        try:
            yield queue
        finally:
            self._viewers.discard(queue)
            if not self._viewers and self._sampling is not None:
                self._sampling.cancel()

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(FRAME_INTERVAL)
            frame = _event(self._frame())
            for queue in self._viewers:
                if not queue.full():
                    queue.put_nowait(frame)

    def _now(self) -> float:
        return time.monotonic() - self._epoch

    def _catch_up(self) -> None:
        """Begins anew: nobody has looked for a while."""
        engine = self._lifecycle.engine
        self._samples.clear()
        self._lanes = Lanes(engine.config.slots, engine.config.replicas) if engine is not None else Lanes(0)
        self._seen = None

    def _picture(self) -> dict[str, object]:
        """All that a page needs to begin."""
        engine = self._lifecycle.engine
        picture: dict[str, object] = {"t": round(self._now(), 4), "state": self._lifecycle.state}
        if engine is not None:
            picture["model"] = engine.model_name
            # A platform may have one kind of device alone, of the same name.
            picture["device"] = ", ".join(dict.fromkeys((engine.device.platform, engine.device.device_kind)))
            picture["max_context"] = engine.max_context
            picture["page_size"] = engine.config.page_size
            picture["lanes"] = [list(lane) for lane in zip(self._lanes.kinds, self._lanes.owners, strict=True)]
        return picture

    def _frame(self) -> dict[str, object]:
        engine = self._lifecycle.engine
        now = self._now()
        frame: dict[str, object] = {"t": round(now, 4), "state": self._lifecycle.state}
        if engine is None:
            return frame
        if len(self._lanes.kinds) != engine.config.total_slots:  # the engine came while somebody looked
            self._catch_up()
            frame |= self._picture()
        records = _since(engine.step_records, self._seen, MAX_STEPS * engine.config.replicas)
        changes = self._lanes.follow(records, self._epoch)
        loads, statistics = engine.loads(), engine.statistics
        if records:
            self._seen = records[-1]
        if not loads.running:
            changes += self._lanes.clear(0.0 if self._seen is None else self._seen.retired - self._epoch)
        frame |= {
            "changes": changes,
            "running": loads.running,
            "waiting": loads.waiting,
            "slots": loads.slots,
            "pages": [loads.total_pages - loads.available_pages, loads.cached_pages, loads.total_pages],
            "generated": statistics.generation_tokens,
            "prompted": statistics.prompt_tokens,
            "finished": statistics.finished,
            "preemptions": loads.preemptions,
            "steps": loads.steps,
            "step_ms": _step_ms(records),
            "idle": round(device_idle_ratio(list(engine.step_records), time.monotonic(), WINDOW), 4),
        }
        return frame | self._recent(engine, now)

    def _recent(self, engine: ServedEngine, now: float) -> dict[str, object]:
        """Figures of the latest WINDOW seconds."""
        statistics, loads = engine.statistics, engine.loads()
        ttft, itl = statistics.time_to_first_token, statistics.inter_token_latency
        sample = _Sample(now, tuple(ttft.counts), tuple(itl.counts), loads.prefix_queries, loads.prefix_hits)
        self._samples.append(sample)
        while self._samples[0].time < now - WINDOW:
            self._samples.popleft()
        before = self._samples[0]
        queries = sample.queries - before.queries
        return {
            "ttft": _quantiles(ttft, before.ttft),
            "itl": _quantiles(itl, before.itl),
            "hit": (sample.hits - before.hits) / queries if queries else None,
        }


def _event(frame: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(frame, separators=(",", ":")).encode() + b"\n\n"


def _since(records: Sequence[StepRecord], seen: StepRecord | None, most: int) -> list[StepRecord]:
    """The records after one of them, oldest first, or the latest."""
    found: list[StepRecord] = []
    for record in islice(reversed(list(records)), most):
        if record is seen:
            break
        found.append(record)
    return found[::-1]


def _step_ms(records: Sequence[StepRecord]) -> float | None:
    """Mean time between steps of one replica; None where fewer than two were."""
    records = [record for record in records if record.replica == records[-1].replica]
    if len(records) < 2:
        return None
    return round(1e3 * (records[-1].retired - records[0].retired) / (len(records) - 1), 3)


def _quantiles(distribution: Distribution, before: Sequence[int]) -> list[float | None]:
    """Median and 99th percentile, in seconds, of what was observed since."""
    recent = Distribution(distribution.bounds)
    recent.counts = [count - old for count, old in zip(distribution.counts, before, strict=True)]
    return [recent.quantile(0.5), recent.quantile(0.99)]
