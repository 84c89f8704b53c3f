"""Several sequences of one prompt on a scripted device: it is computed once, its pages are counted once and come back."""

import random

import pytest
from scripted_device import ScriptedDevice, scripted_token, submit

from jaxserve.scheduling.scheduler import Scheduler

PAGE_SIZE = 4


def make(slots: int = 4, num_pages: int = 65, **fields):
    return Scheduler(slots=slots, num_pages=num_pages, page_size=PAGE_SIZE, prefill_chunks=(8, 32), **fields)


def prompt_tokens(device: ScriptedDevice) -> int:
    """Runs to the end; prompt tokens that were computed on the way."""
    computed = 0
    while not device.scheduler.is_idle or device.pending:
        plan = device.step()
        computed += plan.chunk_tokens if plan is not None else 0
    return computed


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("prompt", [3, 16, 17, 30])
def test_each_sequence_computes_no_more_than_a_page_after_the_first(prompt: int, prefix_cache: bool):
    scheduler = make(prefix_cache=prefix_cache)
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(0, prompt=prompt, output=6, fork_seeds=[1, 2, 3, 4, 5]))
    shared = (prompt - 1) // PAGE_SIZE * PAGE_SIZE
    assert prompt_tokens(device) == prompt + 5 * (prompt - shared)
    for handle in range(6):
        assert device.tokens(handle) == [scripted_token(handle, position) for position in range(prompt, prompt + 6)]
        assert device.reason(handle) == "length"
    assert scheduler.allocator.available == 64
    assert scheduler.prefix_hits == 0


@pytest.mark.parametrize("prompt", [3, 30])
def test_only_the_first_of_a_requests_sequences_scores_its_prompt(prompt: int):
    scheduler = make()
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(0, prompt=prompt, output=4, fork_seeds=[1, 2], prompt_logprobs=0))
    scored = []
    while not scheduler.is_idle:
        plan = device.step()
        pieces = [] if plan is None else plan.pieces
        scored += [(plan.sequences[piece.row].handle, len(piece.targets)) for piece in pieces if piece.targets]
    assert {handle for handle, _ in scored} == {0}
    assert sum(count for _, count in scored) == prompt - 1


def test_shared_pages_are_counted_once():
    scheduler = make(slots=8, num_pages=65, prefix_cache=False)
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(0, prompt=41, output=3, fork_seeds=[1] * 7))
    fewest = 64
    while not scheduler.is_idle:
        device.step()
        fewest = min(fewest, scheduler.allocator.available)
    assert 64 - fewest <= 10 + 8  # ten full pages of the prompt, and one of each sequence's own


def test_others_run_while_a_prompt_is_computed_for_its_sequences():
    scheduler = make(slots=2)
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(0, prompt=40, output=4, fork_seeds=[1]))
    scheduler.submit(submit(10, prompt=4, output=1))
    device.run()
    assert [device.reason(handle) for handle in (0, 1, 10)] == ["length"] * 3


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_pages_kept_for_waiting_sequences_give_way_to_those_that_run(prefix_cache: bool):
    scheduler = make(slots=2, num_pages=12, prefix_cache=prefix_cache)
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(0, prompt=24, output=16, fork_seeds=[1, 2]))
    scheduler.submit(submit(10, prompt=30, output=14, priority=1))
    device.run()
    for handle, prompt, output in ((0, 24, 16), (1, 24, 16), (2, 24, 16), (10, 30, 14)):
        assert device.tokens(handle) == [scripted_token(handle, at) for at in range(prompt, prompt + output)]
    assert scheduler.allocator.available == 11


def test_pages_kept_for_waiting_sequences_stay_while_another_waits_for_what_runs():
    scheduler = make(slots=2, num_pages=17, prefix_cache=False)
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(0, prompt=17, output=8, fork_seeds=[1]))
    first = device.step()
    assert first is not None
    scheduler.submit(
        submit(10, prompt=40, output=4, priority=1)
    )  # has no room beside the first, and goes before its fork
    assert first.chunk_tokens + prompt_tokens(device) == 17 + 40 + 1


@pytest.mark.parametrize("seed", range(60))
def test_whatever_ends_when_every_sequence_ends_once_and_all_pages_return(seed: int):
    random_ = random.Random(seed)
    scheduler = make(slots=3, num_pages=random_.choice((16, 40)), prefix_cache=random_.random() < 0.5)
    device = ScriptedDevice(scheduler, depth=random_.randint(0, 2))
    groups: list[tuple[int, int]] = []
    handle = 0
    for _ in range(40):
        if random_.random() < 0.4:
            forks = random_.choice((0, 0, 1, 4))
            prompt, output = random_.randint(1, 30), random_.randint(1, 20)
            deadline = device.now + random_.randint(1, 40) if random_.random() < 0.1 else None
            priority = random_.randint(0, 1)
            request = submit(
                handle, prompt=prompt, output=output, fork_seeds=[1] * forks, priority=priority, deadline=deadline
            )
            if random_.random() < 0.2:
                device.stops[handle + random_.randint(0, forks)] = prompt + random_.randint(0, output)
            if random_.random() < 0.1:
                device.failures[handle] = prompt
            scheduler.submit(request)
            groups.append((handle, forks + 1))
            handle += forks + 1
        if groups and random_.random() < 0.1:
            first, count = random_.choice(groups)
            for each in range(first, first + random_.choice((1, count))):
                scheduler.abort(each, device.now)
        if random_.random() < 0.03:
            device.fail()
        device.step()
    device.run()
    assert all(device.reason(each) is not None for each in range(handle))
    assert scheduler.allocator.available == scheduler.allocator.num_pages - 1
