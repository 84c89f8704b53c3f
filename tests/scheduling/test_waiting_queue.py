"""Who waits comes up in order, whoever leaves the queue meanwhile."""

from hypothesis import given
from hypothesis import strategies as st
from scripted_device import submit

from jaxserve.scheduling.sequence import Sequence
from jaxserve.scheduling.waiting_queue import WaitingQueue


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=20))
def test_those_that_stay_come_up_in_their_order(waiting: list[tuple[int, bool]]):
    queue = WaitingQueue()
    sequences = [Sequence(submit(number, priority=priority), number) for number, (priority, _) in enumerate(waiting)]
    queue.add(*sequences)
    staying = [sequence for sequence, (_, stays) in zip(sequences, waiting, strict=True) if stays]
    for sequence in sequences:
        if sequence not in staying:
            queue.discard(sequence)
            queue.discard(sequence)  # it is not there: no-op
    popped = [queue.pop() for _ in range(len(queue))]
    assert [sequence.order for sequence in popped] == sorted(sequence.order for sequence in staying)
