"""What became of one request, and what about it broke a promise of the server."""

import time
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.latency import Arrivals, StreamTimes, follow
from benchmarks.load.plan import Planned
from benchmarks.load.targets import Target
from jaxserve.events import Delta, Event, FinishReason
from jaxserve.request import Request
from jaxserve.request_errors import EngineUnavailable, QueueFull

Ending = Literal["completed", "cancelled", "deadline", "refused", "failed"]


@dataclass
class Outcome(Arrivals):
    """One request as its client saw it; `tokens` are those in the messages."""

    index: int = 0
    ending: Ending = "failed"
    planned: str = "complete"
    """How it was to behave."""
    broken: list[str] = field(default_factory=list)
    """Promises that were broken."""
    error: str = ""


class _Left(Exception):
    """The client leaves its stream, as planned."""


async def run_planned(target: Target, planned: Planned, request: Request, sent: float) -> Outcome:
    """Sends a request, behaves as planned, and says what became of it. Raises nothing."""
    times = StreamTimes(sent)
    timeout = planned.amount if planned.behaviour == "deadline" else None
    outcome = Outcome(sent, index=planned.index, planned=planned.behaviour)
    try:
        async with aclosing(target.send(request, timeout)) as events:
            read = _until(events, planned.amount) if planned.behaviour == "cancel" else events
            await follow(read, sent, times, planned.amount if planned.behaviour == "slow" else 0.0)
        outcome.ending = "completed"
    except _Left:
        outcome.ending = "cancelled"
    except TimeoutError:
        outcome.ending = "deadline"
    except (QueueFull, EngineUnavailable) as error:
        outcome.ending, outcome.error = "refused", f"{type(error).__name__}: {error}"
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.arrivals, outcome.tokens = times.arrivals, len(times.token_ids)
    outcome.ended = time.monotonic()
    outcome.broken = broken_promises(outcome, planned, times)
    return outcome


async def _until(events: AsyncIterable[Event], tokens: float) -> AsyncGenerator[Event]:
    """The events until so many tokens have come; for 0, the first event. Raises _Left then."""
    count = 0
    async for event in events:
        yield event
        count += len(event.token_ids) if isinstance(event, Delta) else 0
        if count >= tokens:
            raise _Left


def broken_promises(outcome: Outcome, planned: Planned, times: StreamTimes) -> list[str]:
    """What an accepted request that was not left early must hold."""
    name = f"request {planned.index}"
    if outcome.ending == "failed":
        return [f"{name}: {outcome.error}"]
    if outcome.ending == "refused":
        return [] if not times.token_ids else [f"{name}: refused after {len(times.token_ids)} tokens: {outcome.error}"]
    if outcome.ending == "deadline":
        return [] if planned.behaviour == "deadline" else [f"{name}: a deadline passed that nobody set"]
    if outcome.ending == "cancelled":
        return [f"{name}: {times.terminals} terminal messages"] if times.terminals > 1 else []
    if times.terminals != 1 or times.finished is None:
        return [f"{name}: {times.terminals} terminal messages"]
    reason, usage = times.finished.finish_reason, times.finished.usage
    broken = []
    aborted_as_slow = planned.behaviour == "slow" and reason is FinishReason.ABORT
    if usage.completion_tokens != len(times.token_ids) and not aborted_as_slow:
        broken.append(f"{name}: {len(times.token_ids)} tokens in messages, {usage.completion_tokens} in usage")
    if reason is not FinishReason.LENGTH and not aborted_as_slow:
        broken.append(f"{name}: finish reason {reason}, not length")
    elif reason is FinishReason.LENGTH and usage.completion_tokens != planned.output_tokens:
        broken.append(f"{name}: {usage.completion_tokens} of {planned.output_tokens} tokens")
    return broken
