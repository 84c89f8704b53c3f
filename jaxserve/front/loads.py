"""What an engine is doing, for whoever schedules or watches it: its core's gauges beside what its front knows."""

from dataclasses import dataclass
from typing import Self

from jaxserve.core.messages import Gauges


@dataclass(frozen=True)
class EngineLoads:
    """What an engine is doing."""

    running: int
    """Requests that hold a slot."""
    waiting: int
    """Requests accepted and not yet running."""
    slots: int
    available_pages: int
    """Pages free or evictable: all of them when nothing runs."""
    cached_pages: int
    """Pages held by no request whose content may be hit."""
    total_pages: int
    saved_pages: int
    """Pages of preempted requests in host memory."""
    restored_pages: int
    """Pages copied back from there so far."""
    resumable_streams: int
    """Streams kept to be taken up again, those of requests in flight included."""
    steps: int
    preemptions: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens found there."""
    overrun_tokens: int
    """Row-steps spent on sequences that had already ended."""
    compiles_after_warmup: int
    """More than 0 is a defect."""

    @classmethod
    def of(cls, gauges: Gauges, *, active: int, slots: int, total_pages: int, resumable_streams: int) -> Self:
        """The loads of an engine with `active` requests in flight, which the gauges are a step behind of."""
        return cls(
            running=min(gauges.running, active),
            waiting=max(active - gauges.running, 0),
            slots=slots,
            available_pages=gauges.available_pages,
            cached_pages=gauges.cached_pages,
            total_pages=total_pages,
            saved_pages=gauges.saved_pages,
            restored_pages=gauges.restored_pages,
            resumable_streams=resumable_streams,
            steps=gauges.step,
            preemptions=gauges.preemptions,
            prefix_queries=gauges.prefix_queries,
            prefix_hits=gauges.prefix_hits,
            overrun_tokens=gauges.overrun_tokens,
            compiles_after_warmup=gauges.compiles_after_warmup,
        )
