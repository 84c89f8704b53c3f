"""When the messages of a stream arrive, and the figures that follow from it."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.summary import percentiles
from jaxserve.events import Delta, Event, Finished
from jaxserve.request import Request


@dataclass
class Arrivals:
    """When a client sent a request, and when the messages of its stream came, in monotonic seconds."""

    sent: float
    """When it was sent, or should have been: a client that is late does not make the engine faster."""
    arrivals: list[float] = field(default_factory=list)
    """Of each message with tokens."""
    tokens: int = 0
    ended: float = 0.0
    """When the terminal message came, or the client left."""

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
        count = self.tokens
        return (self.arrivals[-1] - self.arrivals[0]) / (count - 1) if count > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between messages, which may carry more than one token: ITL."""
        return [after - before for before, after in itertools.pairwise(self.arrivals)]


@dataclass
class StreamTimes(Arrivals):
    """One request as its client saw it; `tokens` are as the usage says: not every protocol sends token ids."""

    token_ids: list[int] = field(default_factory=list)
    finished: Finished | None = None
    terminals: int = 0
    """Terminal messages; there must be one."""

    def to_json(self) -> dict[str, float | list[float] | list[int]]:
        """What of it passes between processes, which share the clock."""
        shared = ("sent", "arrivals", "token_ids", "tokens", "ended")
        return {name: getattr(self, name) for name in shared}

    @property
    def delivery_lag(self) -> float:
        """Seconds from the end of the step that made the last token to its receipt.

        At most: the engine's clock starts when it has accepted the request, this one when the request is sent.
        """
        assert self.finished is not None
        return self.ended - (self.sent + self.finished.timings.total)


async def follow(
    events: AsyncIterable[Event], sent: float, times: StreamTimes | None = None, pace: float = 0.0
) -> StreamTimes:
    """Reads a stream to its end. Raises RuntimeError where the request failed.

    Args:
        events: the stream.
        sent: when it was sent, or should have been.
        times: takes what comes as it comes, for who may stop reading early; None makes them.
        pace: seconds to wait after each message, as a slow reader does.
    """
    times = StreamTimes(sent) if times is None else times
    async for event in events:
        now = time.monotonic()
        # Text alone counts where a protocol sends no ids; else it is what was held back of tokens that have come.
        if isinstance(event, Delta) and (event.token_ids or (event.text and not times.token_ids)):
            times.arrivals.append(now)
            times.token_ids += event.token_ids
        elif isinstance(event, Finished):
            times.ended, times.finished, times.tokens = now, event, event.usage.completion_tokens
            times.terminals += 1
            if event.error is not None:
                raise RuntimeError(f"request {event.request_id} failed: {event.error}")
        if pace:
            await asyncio.sleep(pace)
    return times


async def in_turn[Item, Result](
    run: Callable[[Item, float], Awaitable[Result]], items: Iterable[Item], concurrency: int
) -> list[Result]:
    """A closed loop: runs `run(item, now)` so that `concurrency` of them are open until there are no more items; in the
    order in which they end."""
    results: list[Result] = []
    waiting = iter(items)

    async def run_in_turn() -> None:
        for item in waiting:
            results.append(await run(item, time.monotonic()))

    await asyncio.gather(*(run_in_turn() for _ in range(concurrency)))
    return results


async def at_times[Item, Result](
    run: Callable[[Item, float], Awaitable[Result]], items: Iterable[tuple[float, Item]]
) -> tuple[list[Result], list[float]]:
    """An open loop: runs `run(item, due)` at the monotonic second that stands with each item, however slow others are.

    Returns:
        The results, and by how many seconds each was late. Times count from when an item was due: waiting for a slow
        server is part of its latency.
    """
    tasks: list[asyncio.Future[Result]] = []
    late: list[float] = []
    for due, item in items:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        late.append(time.monotonic() - due)
        tasks.append(asyncio.ensure_future(run(item, due)))
    return await asyncio.gather(*tasks), late


def poisson_times(start: float, rate: float, count: int, seed: int) -> list[float]:
    """The arrivals of a Poisson process of `rate` a second, after `start`."""
    random_ = random.Random(seed)
    return list(itertools.accumulate((random_.expovariate(rate) for _ in range(count)), initial=start))[1:]


async def closed_loop(
    send: Callable[[Request], AsyncIterable[Event]], requests: Iterable[Request], concurrency: int
) -> list[StreamTimes]:
    """Sends requests so that `concurrency` streams are open until there are no more; in the order in which they end."""
    return await in_turn(lambda request, sent: follow(send(request), sent), requests, concurrency)


def latency_figures(streams: Sequence[Arrivals]) -> dict[str, float | None]:
    """Percentiles of TTFT, TPOT, ITL and the whole, in milliseconds."""
    return {
        **percentiles([stream.first_token for stream in streams], "ttft_ms", 1e3),
        **percentiles([value for stream in streams if (value := stream.per_token) is not None], "tpot_ms", 1e3),
        **percentiles([gap for stream in streams for gap in stream.gaps], "itl_ms", 1e3),
        **percentiles([stream.total for stream in streams], "e2e_ms", 1e3),
    }
