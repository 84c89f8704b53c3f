"""A straight line through samples, with the error of its slope."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LONG_RUN = 900.0
"""Seconds of samples from which on a soak is held to the limit."""
LIMIT = 1.0
"""MB an hour that memory may grow in a long run."""
SHORT_RUN_LIMIT = 3000.0
"""MB an hour in a shorter one: a process that is a few minutes old still fills what it keeps in bounded number, records
of steps among them, at some hundred MB an hour. Less than most of a megabyte a second is not found."""


def memory_limit(seconds: float) -> float:
    """MB an hour that memory may grow where it was seen for so long after the warm-up."""
    return LIMIT if seconds >= LONG_RUN else SHORT_RUN_LIMIT


@dataclass(frozen=True)
class Trend:
    """Least squares over time.

    Attributes:
        slope: units a second.
        error: standard error of the slope, in the same unit, widened for neighbouring samples that are alike: the
            samples count for as many independent ones as their lag-one correlation leaves (Bartlett's formula).
    """

    slope: float
    error: float

    def exceeds(self, limit: float) -> bool:
        """Whether the slope is above a limit by more than twice its error."""
        return self.slope - 2 * self.error > limit


def trend_of(samples: Sequence[tuple[float, float]]) -> Trend | None:
    """The trend of (seconds, value); None for fewer than three samples."""
    count = len(samples)
    if count < 3:
        return None
    mean_time = sum(at for at, _ in samples) / count
    mean_value = sum(value for _, value in samples) / count
    spread = sum((at - mean_time) ** 2 for at, _ in samples)
    slope = sum((at - mean_time) * (value - mean_value) for at, value in samples) / spread
    rests = [value - mean_value - slope * (at - mean_time) for at, value in samples]
    total = sum(rest * rest for rest in rests)
    if total == 0:
        return Trend(slope, 0.0)
    correlation = sum(one * other for one, other in pairwise(rests)) / total
    correlation = min(max(correlation, 0.0), 0.99)
    widened = (1 + correlation) / (1 - correlation)
    return Trend(slope, math.sqrt(widened * total / (count - 2) / spread))
