"""The sequences that have not ended: by handle, by deadline, and the ones held until their constraint is compiled."""

import heapq
from collections.abc import Iterator
from dataclasses import replace

from jaxserve.core.messages import Submit
from jaxserve.scheduling.sequence import Sequence

MANY_DEADLINES = 256
"""Deadlines of sequences that have ended, at least, before it is worth while to look for them."""


class LiveSequences:
    """Every sequence from its submission to its end."""

    def __init__(self) -> None:
        self._by_handle: dict[int, Sequence] = {}
        self._held: dict[int, list[Sequence]] = {}
        """Of each request that is held, by its first handle."""
        self._deadlines: list[tuple[float, int]] = []
        """A heap; those of sequences that have ended are dropped when they have come, or are the most of it."""
        self._arrivals = 0

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_handle.values())

    def get(self, handle: int) -> Sequence | None:
        """The sequence of a handle, unless it has ended."""
        return self._by_handle.get(handle)

    def add(self, submit: Submit) -> list[Sequence]:
        """The sequences of a request, in the order of their handles, which must not be live."""
        forks = [
            replace(submit, handle=handle, seed=seed, fork_seeds=[], prompt_logprobs=-1)
            for handle, seed in enumerate(submit.fork_seeds, submit.handle + 1)
        ]
        return [self._add_one(one) for one in (submit, *forks)]

    def _add_one(self, submit: Submit) -> Sequence:
        assert submit.handle not in self._by_handle, f"handle {submit.handle} is active"
        sequence = Sequence(submit, self._arrivals)
        self._arrivals += 1
        self._by_handle[submit.handle] = sequence
        if submit.deadline is not None:
            heapq.heappush(self._deadlines, (submit.deadline, submit.handle))
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """It has ended."""
        del self._by_handle[sequence.handle]
        if len(self._deadlines) > MANY_DEADLINES + 2 * len(self._by_handle):
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._by_handle]
            heapq.heapify(self._deadlines)

    def hold(self, sequences: list[Sequence]) -> None:
        """Notes that the sequences of a request are not to be queued before `release`."""
        self._held[sequences[0].handle] = sequences
        for sequence in sequences:
            sequence.held = True

    def release(self, handle: int) -> list[Sequence]:
        """The sequences of a request that was held, without those that have ended."""
        sequences = [sequence for sequence in self._held.pop(handle) if not sequence.done]
        for sequence in sequences:
            sequence.held = False
        return sequences

    @property
    def are_all_held(self) -> bool:
        """Whether there is none that could run."""
        return not self._by_handle or bool(self._held and all(sequence.held for sequence in self))

    def next_deadline(self) -> float | None:
        """Monotonic seconds of the earliest deadline, whose sequence may have ended."""
        return self._deadlines[0][0] if self._deadlines else None

    def take_expired(self, now: float) -> list[int]:
        """Handles whose deadline has passed; some may have ended."""
        handles = []
        while self._deadlines and self._deadlines[0][0] <= now:
            handles.append(heapq.heappop(self._deadlines)[1])
        return handles
