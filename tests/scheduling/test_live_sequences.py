"""What has ended leaves nothing behind, whoever has to look for it."""

import gc

from scripted_device import ScriptedDevice, submit

from jaxserve.scheduling.live_sequences import MANY_DEADLINES, LiveSequences
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.scheduling.sequence import Sequence


def test_sequences_that_have_ended_are_freed_without_the_garbage_collector():
    """It comes by once in thousands of requests: what waits for it would be some megabytes."""
    scheduler = Scheduler(slots=4, num_pages=65, page_size=4, prefill_chunks=(8, 32))
    device = ScriptedDevice(scheduler)
    gc.collect()
    gc.disable()
    try:
        for request in range(20):
            scheduler.submit(submit(10 * request, prompt=20, output=6, fork_seeds=[1, 2, 3]))
            scheduler.submit(submit(10 * request + 5, prompt=20, output=6))
            if request % 4 == 0:
                device.step()
                for handle in range(10 * request, 10 * request + 4):
                    scheduler.abort(handle, 0.0)
            device.run()
        assert not [kept for kept in gc.get_objects() if isinstance(kept, Sequence)]
    finally:
        gc.enable()


def test_far_deadlines_of_sequences_that_have_ended_are_dropped():
    live = LiveSequences()
    near = live.add(submit(0, deadline=1.0))
    for handle in range(1, 20 * MANY_DEADLINES):
        for sequence in live.add(submit(handle, deadline=1e9)):
            live.remove(sequence)
        assert len(live._deadlines) <= MANY_DEADLINES + 4
    assert live.next_deadline() == 1.0
    assert live.take_expired(2.0) == [near[0].handle]
