"""The highest rate that a server keeps: by bisection between one that it keeps and one that it does not."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.summary import Figure

RESOLUTION = 0.05
"""Part of the rate to which it is found."""


@dataclass(frozen=True)
class Trial:
    """One rate that was tried."""

    rate: float
    kept: bool
    figures: dict[str, Figure | list[str]]


def parse_range(word: str) -> tuple[float, float]:
    """Reads LOW:HIGH. Raises ValueError."""
    low, _, high = word.partition(":")
    try:
        rates = float(low), float(high)
    except ValueError as error:
        raise ValueError(f"{word!r}: must be LOW:HIGH") from error
    if not 0 < rates[0] < rates[1]:
        raise ValueError(f"{word!r}: LOW must be less than HIGH, and more than 0")
    return rates


async def highest_rate(
    attempt: Callable[[float], Awaitable[Trial]], low: float, high: float
) -> tuple[float | None, list[Trial]]:
    """The highest rate between two that is kept; None where not even the lowest is. If the highest is kept it is the
    answer, and the server may keep more.

    Example: of 1 to 8, where 5 is kept and more is not: 1, 8, 4.5, 6.25, 5.375, 4.937, 5.156.
    """
    trials = [await attempt(low)]
    if not trials[0].kept:
        return None, trials
    trials.append(await attempt(high))
    if trials[1].kept:
        return high, trials
    while high - low > RESOLUTION * high:
        middle = (low + high) / 2
        trials.append(await attempt(middle))
        if trials[-1].kept:
            low = middle
        else:
            high = middle
    return low, trials
