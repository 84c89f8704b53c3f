"""What the records of an engine's steps say of its device and its host."""

from collections.abc import Sequence
from itertools import pairwise

from jaxserve.core.messages import StepRecord

Interval = tuple[float, float]
"""Start and end, in seconds."""


def simulated_intervals(records: Sequence[StepRecord], step_seconds: float) -> list[Interval]:
    """When a simulated device worked: a step starts when it is dispatched or the one before it is done."""
    intervals: list[Interval] = []
    free = 0.0
    for record in records:
        start = max(record.dispatched, free)
        free = start + step_seconds
        intervals.append((start, free))
    return intervals


def observed_intervals(records: Sequence[StepRecord]) -> list[Interval]:
    """When a real device may have worked, as the host saw it: at most this. Its idle time is at least the rest."""
    intervals: list[Interval] = []
    before = 0.0
    for record in records:
        intervals.append((max(record.dispatched, before), record.retired))
        before = record.retired
    return intervals


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same time without overlaps, in order.

    Example: (0, 2), (1, 3), (5, 6) are (0, 3), (5, 6).
    """
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def busy_seconds(intervals: Sequence[Interval]) -> float:
    """Length of the union."""
    return sum(end - start for start, end in union(intervals))


def idle_ratio(intervals: Sequence[Interval]) -> float:
    """The part of the time from the first start to the last end that no interval covers."""
    merged = union(intervals)
    return 1 - busy_seconds(merged) / (merged[-1][1] - merged[0][0])


def gaps(intervals: Sequence[Interval]) -> list[float]:
    """Seconds from the end of each step to the start of the next; 0 where it was there in time."""
    return [max(0.0, after[0] - before[1]) for before, after in pairwise(intervals)]


def step_seconds(records: Sequence[StepRecord], rows: int | None, mixed: bool) -> list[float]:
    """Seconds from a step's retiring to the next one's, for next ones of a kind: with a piece of a prompt where
    `mixed` and without one else, and of `rows` sequences unless that is None."""
    return [
        step.retired - before.retired
        for before, step in pairwise(records)
        if (step.chunk_tokens > 0) == mixed and rows in (None, step.sequences) and step.step == before.step + 1
    ]


def window_seconds(records: Sequence[StepRecord]) -> float:
    """From the first dispatch to the last retirement."""
    return records[-1].retired - records[0].dispatched


def host_intervals(records: Sequence[StepRecord]) -> list[Interval]:
    """When the step loop worked and did not wait, about: from one step's retirement to its wait for the next."""
    return [(before.retired, record.retired - record.wait_seconds) for before, record in pairwise(records)]


def reuse_lags(records: Sequence[StepRecord], first_piece: bool = False) -> list[int]:
    """For each slot that was freed and given again: steps from its owner's last token to its next owner, who holds it
    from then on; with `first_piece`, to the step that has the next owner's first prompt tokens, of which a step takes
    only so many.

    1 is the least that there can be. Only meaningful while requests wait for slots.
    """
    freed: dict[int, int] = {}
    lags = []
    for record in records:
        for slot in record.taken_slots if first_piece else record.given_slots:
            if slot in freed:
                lags.append(record.step - freed.pop(slot))
        freed.update(dict.fromkeys(record.freed_slots, record.step))
    return lags


def full_range(records: Sequence[StepRecord], slots: int) -> slice:
    """Where the steps from the first to the last in which every slot took part are: the engine at its load.

    Raises ValueError where there are fewer than two.
    """
    full = [index for index, record in enumerate(records) if record.sequences == slots]
    if len(full) < 2:
        raise ValueError(f"no step had all {slots} slots: send more requests")
    return slice(full[0], full[-1] + 1)
