"""What an engine is doing, for whoever schedules or watches it: its core's gauges beside what its front knows."""

from dataclasses import asdict, dataclass
from typing import Self

from jaxserve.core.messages import Gauges


@dataclass(frozen=True, slots=True)
class EngineLoads(Gauges):
    """What an engine is doing."""

    slots: int = 0
    total_pages: int = 0
    resumable_streams: int = 0
    """Streams kept to be taken up again, those of requests in flight included."""

    @classmethod
    def of(cls, gauges: Gauges, *, active: int, slots: int, total_pages: int, resumable_streams: int) -> Self:
        """The loads of an engine with `active` requests in flight, which the gauges are a step behind of."""
        now = {"running": min(gauges.running, active), "waiting": max(active - gauges.running, 0)}
        return cls(**asdict(gauges) | now, slots=slots, total_pages=total_pages, resumable_streams=resumable_streams)
