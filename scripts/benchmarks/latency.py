"""When the messages of a stream arrive, and the figures that follow from it."""

import asyncio
import time
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.summary import percentiles
from jaxserve.request import Delta, Event, Finished, Request


@dataclass
class StreamTimes:
    """One request as its client saw it. Times are monotonic seconds."""

    sent: float
    """When it was sent, or should have been: a client that is late does not make the engine faster."""
    arrivals: list[float] = field(default_factory=list)
    """Of each message with tokens."""
    token_ids: list[int] = field(default_factory=list)
    ended: float = 0.0
    """When the terminal message came."""
    finished: Finished | None = None

    def to_json(self) -> dict[str, float | list[float] | list[int]]:
        """What of it passes between processes, which share the clock."""
        return {"sent": self.sent, "arrivals": self.arrivals, "token_ids": self.token_ids, "ended": self.ended}

    @property
    def first_token(self) -> float:
        """Seconds from sending to the first token: TTFT."""
        return self.arrivals[0] - self.sent

    @property
    def total(self) -> float:
        """Seconds from sending to the last token."""
        return self.arrivals[-1] - self.sent

    @property
    def per_token(self) -> float | None:
        """Mean seconds of a token after the first: TPOT; None for a single token."""
        count = len(self.token_ids)
        return (self.arrivals[-1] - self.arrivals[0]) / (count - 1) if count > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between messages, which may carry more than one token: ITL."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def delivery_lag(self) -> float:
        """Seconds from the end of the step that made the last token to its receipt.

        At most: the engine's clock starts when it has accepted the request, this one when the request is sent.
        """
        assert self.finished is not None
        return self.ended - (self.sent + self.finished.timings.total)


async def follow(events: AsyncIterable[Event], sent: float) -> StreamTimes:
    """Reads a stream to its end. Raises RuntimeError where the request failed."""
    times = StreamTimes(sent)
    async for event in events:
        now = time.monotonic()
        if isinstance(event, Delta) and event.token_ids:
            times.arrivals.append(now)
            times.token_ids += event.token_ids
        elif isinstance(event, Finished):
            times.ended, times.finished = now, event
            if event.error is not None:
                raise RuntimeError(f"request {event.request_id} failed: {event.error}")
    return times


async def closed_loop(
    send: Callable[[Request], AsyncIterable[Event]], requests: Iterable[Request], concurrency: int
) -> list[StreamTimes]:
    """Sends requests so that `concurrency` streams are open until there are no more; in the order in which they end."""
    streams: list[StreamTimes] = []
    waiting = iter(requests)

    async def send_in_turn() -> None:
        for request in waiting:
            sent = time.monotonic()
            streams.append(await follow(send(request), sent))

    await asyncio.gather(*(send_in_turn() for _ in range(concurrency)))
    return streams


def latency_figures(streams: Sequence[StreamTimes]) -> dict[str, float | None]:
    """Percentiles of TTFT, TPOT, ITL and the whole, in milliseconds."""
    return {
        **percentiles([stream.first_token for stream in streams], "ttft_ms", 1e3),
        **percentiles([value for stream in streams if (value := stream.per_token) is not None], "tpot_ms", 1e3),
        **percentiles([gap for stream in streams for gap in stream.gaps], "itl_ms", 1e3),
        **percentiles([stream.total for stream in streams], "e2e_ms", 1e3),
    }
