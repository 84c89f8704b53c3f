"""Reliability 3, 9 and 10: nobody starves, pressure on pages does not thrash, and a cancel ends a request once in any
phase of its life (`tests/e2e/test_cancels.py` has 1,000 of them, wherever they fall)."""

import random
from collections.abc import Callable

import pytest
from scripted_device import ScriptedDevice, scripted_token, submit

from jaxserve.core.messages import Submit
from jaxserve.scheduling import sequence as sequences
from jaxserve.scheduling.scheduler import Scheduler


def random_scheduler(random_: random.Random) -> Scheduler:
    return Scheduler(
        slots=random_.randint(1, 6),
        num_pages=random_.randint(24, 48),
        page_size=4,
        prefill_chunks=random_.choice(((4,), (8, 32))),
        prefix_cache=random_.random() < 0.8,
        host_pages=random_.choice((0, 10, 100)),
    )


def steps_of(request: Submit, scheduler: Scheduler, depth: int) -> int:
    """Steps that a request takes once nobody is before it: its tokens, computed anew at most once since then, its
    output, and the steps in flight when it began and when it ended."""
    output = request.max_length - len(request.token_ids)
    return -(-request.max_length // scheduler.prefill_chunks[0]) + output + 2 * (depth + 1)


@pytest.mark.parametrize("seed", range(100))
def test_a_giant_request_in_an_endless_flood_starts_when_those_before_it_have_ended(
    seed: int, monkeypatch: pytest.MonkeyPatch
):
    """The bound that README states: those before it in order, and those that held a slot when it came."""
    monkeypatch.setattr(sequences, "PRIORITY_LEAD", 6)
    random_ = random.Random(seed)
    scheduler, depth = random_scheduler(random_), random_.choice((0, 1, 2))
    device = ScriptedDevice(scheduler, depth)
    tokens = (scheduler.allocator.num_pages - 1) * scheduler.page_size
    flood: dict[int, Submit] = {}

    def small() -> Submit:
        """The next of the flood; some of it has a higher priority than the giant."""
        handle = len(flood) + 1
        priority = random_.choice((0, 0, 0, 1, 2))
        flood[handle] = submit(handle, random_.randint(1, 12), random_.randint(1, 24), priority=priority)
        return flood[handle]

    for _ in range(random_.randint(1, 30)):
        scheduler.submit(small())
    for _ in range(random_.randint(0, 20)):
        device.step()
    holders = {one.handle for one in scheduler.slots.running}
    output = random_.randint(1, 8)
    giant = submit(0, tokens - output, output)
    arrival = len(flood)
    scheduler.submit(giant)
    steps = 0
    while not device.outputs.get(0):
        for _ in range(random_.randint(0, 3)):
            scheduler.submit(small())
        device.step()
        steps += 1
        ahead = [
            request
            for handle, request in flood.items()
            if handle in holders
            # Arrivals count from 0, and the giant's own is among them.
            or (handle - 1 if handle <= arrival else handle) - 6 * request.priority < arrival
        ]
        bound = sum(steps_of(request, scheduler, depth) for request in ahead)
        assert steps <= bound + -(-len(giant.token_ids) // scheduler.prefill_chunks[0]) + 2 * (depth + 1)
    later = [handle for handle in flood if handle > arrival + 12]
    begun = [handle for handle in later if device.outputs.get(handle)]
    assert not begun, "nobody overtakes it but those that came at most two levels times the lead after it"


@pytest.mark.parametrize("seed", range(40))
def test_four_times_the_pages_that_there_are_all_finish_with_bounded_preemptions(seed: int):
    random_ = random.Random(seed)
    scheduler = Scheduler(
        slots=16,
        num_pages=41,
        page_size=4,
        prefill_chunks=random_.choice(((8,), (8, 32))),
        prefix_cache=random_.random() < 0.5,
        host_pages=random_.choice((0, 20, 1000)),
    )
    device = ScriptedDevice(scheduler, random_.choice((0, 1, 2)))
    demand, grown, requests = 0, 0, {}
    while demand < 4 * 40:
        handle, prompt, output = len(requests), random_.randint(1, 20), random_.randint(10, 60)
        requests[handle] = (prompt, output)
        demand += -(-(prompt + output) // 4)
        grown += -(-(prompt + output) // 4) - -(-prompt // 4)
        scheduler.submit(submit(handle, prompt, output))
    silent = 0
    tokens = 0
    while not scheduler.is_idle or device.pending:
        device.step()
        now = sum(len(device.tokens(handle)) for handle in requests)
        # Prompt tokens are progress that is not seen here: the longest of them takes so many steps.
        silent = 0 if now > tokens else silent + 1
        assert silent <= 16 * 80 // 8
        tokens = now
    for handle, (prompt, output) in requests.items():
        assert device.reason(handle) == "length"
        assert device.tokens(handle) == [scripted_token(handle, place) for place in range(prompt, prompt + output)]
    assert 0 < scheduler.preemptions <= grown, "each gives at least one page to one that stays ahead of it"
    assert scheduler.allocator.available == 40


Phase = Callable[[ScriptedDevice, int], bool]


def _sequence(device: ScriptedDevice, handle: int):
    return device.scheduler._live.get(handle)


def _has_slot(device: ScriptedDevice, handle: int) -> bool:
    sequence = _sequence(device, handle)
    return sequence is not None and sequence.slot >= 0


PHASES: dict[str, Phase] = {
    "queued": lambda device, handle: not device.outputs.get(handle) and not _has_slot(device, handle),
    "prefill": lambda device, handle: (
        _has_slot(device, handle) and 0 < _sequence(device, handle).computed < _sequence(device, handle).prefill_end
    ),
    "decode": lambda device, handle: _has_slot(device, handle) and bool(device.outputs.get(handle)),
    "preempted": lambda device, handle: (
        not _has_slot(device, handle)
        and (sequence := _sequence(device, handle)) is not None
        and sequence.cached is not None
        and not sequence.in_flight
        and sequence.computed == 0
    ),
    "final step": lambda device, handle: (
        (sequence := _sequence(device, handle)) is not None
        and sequence.in_flight > 0
        and sequence.computed >= sequence.max_length - 1
    ),
}


@pytest.mark.parametrize("phase", PHASES)
def test_50_seeded_cancels_in_each_phase_end_their_request_once_and_return_its_pages(phase: str):
    cancelled = 0
    for seed in range(2000):
        random_ = random.Random(f"{phase} {seed}")
        scheduler = Scheduler(
            slots=4,
            num_pages=21,
            page_size=4,
            prefill_chunks=(8,),
            prefix_cache=random_.random() < 0.5,
            host_pages=random_.choice((0, 100)),
        )
        device = ScriptedDevice(scheduler, random_.choice((1, 2)))
        lengths = {handle: (random_.randint(1, 40), random_.randint(2, 30)) for handle in range(7)}
        for handle, (prompt, output) in lengths.items():
            scheduler.submit(submit(handle, prompt, output))
        target, wait = random_.randrange(7), random_.randint(0, 3)
        while not scheduler.is_idle or device.pending:
            if PHASES[phase](device, target) and device.reason(target) is None:
                if wait == 0:
                    scheduler.abort(target, device.now)
                    scheduler.abort(target, device.now)  # the second is no event
                    cancelled += 1
                    device.run()
                    assert device.reason(target) == "abort"
                    break
                wait -= 1
            device.step()
        for handle, (prompt, output) in lengths.items():
            got = device.tokens(handle)
            assert got == [scripted_token(handle, place) for place in range(prompt, prompt + len(got))]
            assert device.reason(handle) == ("length" if len(got) == output else "abort")
            assert len([one for one in device.outputs[handle] if one.finish_reason is not None]) == 1
        assert scheduler.allocator.available == 20
        if cancelled == 50:
            return
    raise AssertionError(f"only {cancelled} were cancelled in this phase")
