"""The sequences that wait for a slot, in the order in which they get one."""

import heapq

from jaxserve.scheduling.sequence import Sequence


class WaitingQueue:
    """By the order of `Sequence`. The head is never overtaken."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def head(self) -> Sequence:
        """The next to get a slot."""
        return self._heap[0][1]

    def add(self, *sequences: Sequence) -> None:
        """Each takes the place that its order gives it, which for one that gave way is near the head."""
        for sequence in sequences:
            heapq.heappush(self._heap, (sequence.order, sequence))

    def pop(self) -> Sequence:
        """Takes the head out."""
        return heapq.heappop(self._heap)[1]

    def discard(self, sequence: Sequence) -> None:
        """Takes a sequence out, if it is there."""
        entry = (sequence.order, sequence)
        if entry in self._heap:
            self._heap.remove(entry)
            heapq.heapify(self._heap)
