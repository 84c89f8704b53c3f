"""The policy on a scripted device: who runs when, who gives way, and that nothing is lost."""

import random

import pytest
from scripted_device import ScriptedDevice, scripted_token, submit

from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.scheduling.sequence import StepPlan


def make(slots: int = 4, num_pages: int = 65, page_size: int = 4, chunks: tuple[int, ...] = (8, 32), **fields):
    return Scheduler(slots=slots, num_pages=num_pages, page_size=page_size, prefill_chunks=chunks, **fields)


def expected(handle: int, prompt: int, output: int) -> list[int]:
    return [scripted_token(handle, position) for position in range(prompt, prompt + output)]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_each_request_gets_its_own_tokens_to_the_last(depth: int):
    scheduler = make()
    device = ScriptedDevice(scheduler, depth)
    for handle in range(10):
        scheduler.submit(submit(handle, prompt=1 + 3 * handle, output=1 + handle))
    device.run()
    for handle in range(10):
        assert device.tokens(handle) == expected(handle, 1 + 3 * handle, 1 + handle)
        assert device.reason(handle) == "length"
    assert scheduler.allocator.available == 64


def test_a_stop_id_ends_a_sequence_and_is_not_among_its_tokens():
    scheduler = make()
    device = ScriptedDevice(scheduler)
    device.stops[0] = 7
    scheduler.submit(submit(0, prompt=5, output=20))
    device.run()
    last = device.outputs[0][-1]
    assert (device.tokens(0), device.reason(0)) == (expected(0, 5, 2), "stop")
    assert (last.matched_stop, last.completion_tokens) == (scripted_token(0, 7), 3)
    assert scheduler.overrun_tokens == 1


def test_a_row_that_is_not_finite_fails_alone_and_nothing_of_it_is_cached():
    scheduler = make()
    device = ScriptedDevice(scheduler)
    device.failures[0] = 16
    scheduler.submit(submit(0, prompt=16, output=8))
    scheduler.submit(submit(1, prompt=16, output=8))
    device.run()
    assert (device.reason(0), device.reason(1)) == ("error", "length")
    scheduler.submit(submit(7, prompt=16, output=1))  # the same prompt as 0
    device.run()
    assert device.outputs[7][0].started == 0


def test_a_short_request_leaves_at_once_and_its_slot_has_an_owner_within_two_steps():
    scheduler = make(slots=10, num_pages=257, chunks=(64,))
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(0, prompt=4, output=8))
    for handle in range(1, 11):
        scheduler.submit(submit(handle, prompt=4, output=60))
    steps = 0
    while device.reason(0) is None:
        device.step()
        steps += 1
    assert max(len(device.tokens(handle)) for handle in range(1, 10)) < 16
    device.step()
    assert len(scheduler.slots.running) == 10  # request 10 has the slot
    device.run()


def test_a_stopped_sequence_gives_its_slot_within_two_steps():
    scheduler = make(slots=1)
    device = ScriptedDevice(scheduler)
    device.stops[0] = 9
    scheduler.submit(submit(0, prompt=4, output=30))
    scheduler.submit(submit(1, prompt=4, output=30))
    plans = []
    while device.reason(1) is None:
        plan = device.step()
        if plan is not None:
            plans.append([(s.submit.handle, end) for s, end in zip(plan.sequences, plan.ends, strict=True)])
    end = next(index for index, plan in enumerate(plans) if (0, 9) in plan)
    start = next(index for index, plan in enumerate(plans) if any(handle == 1 for handle, _ in plan))
    assert start - end <= 2


def test_an_equal_prompt_is_found_in_the_prefix_cache_unless_salted():
    scheduler = make()
    device = ScriptedDevice(scheduler)
    for handle, salt in ((0, ""), (7, ""), (14, "other")):  # equal prompts: handle % 7
        scheduler.submit(submit(handle, prompt=17, output=2, cache_salt=salt))
        device.run()
    assert [device.outputs[handle][0].started for handle in (0, 7, 14)] == [0, 16, 0]
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (51, 16)


def test_the_last_token_of_a_cached_prompt_is_still_computed():
    scheduler = make()
    device = ScriptedDevice(scheduler)
    for handle in (0, 7):
        scheduler.submit(submit(handle, prompt=16, output=2))
        device.run()
    assert device.outputs[7][0].started == 12


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("host_pages", [0, 8, 100])
def test_under_page_pressure_the_youngest_gives_way_and_all_finish_exactly(host_pages: int, prefix_cache: bool):
    scheduler = make(slots=4, num_pages=17, page_size=4, host_pages=host_pages, prefix_cache=prefix_cache)
    device = ScriptedDevice(scheduler)
    for handle in range(6):
        scheduler.submit(submit(handle, prompt=8, output=32))
    device.run()
    assert scheduler.preemptions > 0
    assert (scheduler.gauges(0).restored_pages > 0) == (host_pages > 0)
    assert scheduler.gauges(0).saved_pages == 0
    for handle in range(6):
        assert device.tokens(handle) == expected(handle, 8, 32)
    assert scheduler.allocator.available == 16


@pytest.mark.parametrize("host_pages", [0, 100])
def test_what_gave_way_is_counted_and_timed_from_its_first_admission(host_pages: int):
    scheduler = make(slots=4, num_pages=17, page_size=4, host_pages=host_pages)
    device = ScriptedDevice(scheduler)
    for handle in range(4):
        scheduler.submit(submit(handle, prompt=8, output=32))
    device.run()
    assert scheduler.preemptions > 0
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (4 * 8, 0)
    for handle in range(4):
        first, last = device.outputs[handle][0], device.outputs[handle][-1]
        assert first.times is not None and last.times is not None and first.started == 0
        assert last.times[:2] == first.times[:2] == (1.0, first.times[1])


@pytest.mark.parametrize(("host_pages", "computed_again"), [(100, 1), (4, 1), (3, 17)])
def test_what_gave_way_goes_on_from_its_saved_pages_where_all_of_them_have_room(host_pages: int, computed_again: int):
    scheduler = make(slots=2, num_pages=9, page_size=4, host_pages=host_pages, prefix_cache=False)
    device = ScriptedDevice(scheduler)
    for handle in range(2):
        scheduler.submit(submit(handle, prompt=8, output=16))
    pieces = []
    while not scheduler.is_idle or device.pending:
        plan = device.step()
        pieces += [len(piece.token_ids) for piece in plan.pieces] if plan else []
    assert scheduler.preemptions == 1
    assert pieces == [8, 8, computed_again]


@pytest.mark.parametrize("after", range(1, 30, 3))
def test_a_failed_step_loses_and_repeats_no_token(after: int):
    scheduler = make(slots=3)
    device = ScriptedDevice(scheduler)
    for handle in range(5):
        scheduler.submit(submit(handle, prompt=10, output=12))
    for _ in range(after):
        device.step()
    device.fail()
    device.run()
    for handle in range(5):
        assert device.tokens(handle) == expected(handle, 10, 12)


def test_pages_that_a_lost_step_was_to_save_are_computed_again(monkeypatch: pytest.MonkeyPatch):
    scheduler = make(slots=2, num_pages=9, page_size=4, host_pages=8, prefix_cache=False)
    device = ScriptedDevice(scheduler)
    for handle in range(2):
        scheduler.submit(submit(handle, prompt=8, output=16))
    run = device._run

    def lose_saves(plan: StepPlan):
        if plan.saves:
            raise RuntimeError("injected")
        return run(plan)

    with monkeypatch.context() as failing:
        failing.setattr(device, "_run", lose_saves)
        with pytest.raises(RuntimeError, match="injected"):
            device.run()
    device.fail()
    device.run()
    assert [device.tokens(handle) for handle in range(2)] == [expected(handle, 8, 16) for handle in range(2)]


def test_higher_priority_goes_first():
    scheduler = make(slots=1)
    device = ScriptedDevice(scheduler)
    for handle, priority in ((0, 0), (1, 0), (2, 5)):
        scheduler.submit(submit(handle, priority=priority))
    order = []
    while not scheduler.is_idle or device.pending:
        device.step()
        order += [handle for handle in range(3) if device.reason(handle) and handle not in order]
    assert order == [2, 0, 1]


def test_the_last_page_goes_to_the_first_in_order_which_misses_no_step():
    scheduler = make(slots=2, num_pages=6, prefix_cache=False)
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(0, prompt=3, output=9))
    device.step()
    scheduler.submit(submit(1, prompt=4, output=8, priority=1))  # both fill their second page in the same step
    plans = [device.step() for _ in range(8)]
    assert scheduler.preemptions == 1
    assert all(plan is not None and 1 in [sequence.handle for sequence in plan.sequences] for plan in plans)
    device.run()


def test_nobody_gives_way_for_a_page_that_comes_back_with_the_last_token_of_another():
    scheduler = make(slots=2, num_pages=8, prefix_cache=False)
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(0, prompt=8, output=6))
    scheduler.submit(submit(1, prompt=7, output=12))  # needs a page when the last step of the other is on its way
    device.run()
    assert scheduler.preemptions == 0
    assert device.tokens(1) == expected(1, 7, 12)


def test_a_giant_request_in_a_flood_of_small_ones_starts_when_those_before_it_have_left():
    scheduler = make(slots=4, num_pages=33, page_size=4)
    device = ScriptedDevice(scheduler)
    for handle in range(1, 5):
        scheduler.submit(submit(handle, prompt=4, output=12))
    device.step()
    scheduler.submit(submit(0, prompt=100, output=20))
    for handle in range(5, 200):
        scheduler.submit(submit(handle, prompt=4, output=12))
    steps = 0
    while not device.outputs.get(0):
        device.step()
        steps += 1
    assert steps < 12 + 100 // 8 + 8
    device.run()


@pytest.mark.parametrize(("decoding", "waiting", "carried"), [(0, 1, 32), (2, 2, 32), (3, 2, 8), (3, 1, 8)])
def test_a_step_carries_the_larger_chunk_while_as_many_wait_for_their_prompt_as_decode(decoding, waiting, carried):
    scheduler = make(slots=5, num_pages=129)
    device = ScriptedDevice(scheduler)
    for handle in range(decoding):
        scheduler.submit(submit(handle, prompt=4, output=50))
    for _ in range(3):
        device.step()
    for handle in range(decoding, decoding + waiting):
        scheduler.submit(submit(handle, prompt=40))
    plan = device.step()
    assert plan is not None and plan.chunk_tokens == carried


def test_an_abort_during_prefill_returns_all_pages():
    scheduler = make(chunks=(4,))
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(0, prompt=40))
    device.step()
    device.step()
    scheduler.abort(0, device.now)
    device.run()
    assert device.reason(0) == "abort"
    assert scheduler.allocator.available == 64


@pytest.mark.parametrize("depth", [1, 2])
def test_pages_of_an_aborted_request_have_no_owner_before_the_steps_in_flight_have_retired(depth: int):
    scheduler = make(slots=2, num_pages=4, chunks=(4,), prefix_cache=False)
    device = ScriptedDevice(scheduler, depth)
    scheduler.submit(submit(0, prompt=4, output=8))
    for _ in range(3):
        device.step()
    scheduler.submit(submit(1, prompt=8, output=4))  # needs all pages
    scheduler.abort(0, device.now)
    starts = next(step for step in range(10) if device.step() is not None)
    assert starts == depth
    device.run()
    assert device.tokens(1) == expected(1, 8, 4)


def test_a_deadline_in_the_queue_ends_the_request_without_prefill():
    scheduler = make(slots=1)
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(0, output=30))
    scheduler.submit(submit(1, deadline=5.0))
    device.run()
    assert (device.reason(0), device.reason(1)) == ("length", "deadline")
    assert device.outputs[1][0].times == (0.0, 0.0, 5.0)


def test_what_gave_way_waits_for_its_token_in_flight_though_there_are_pages():
    scheduler = make(slots=3, num_pages=48, chunks=(4,), prefix_cache=False)
    device = ScriptedDevice(scheduler, depth=2)
    scheduler.submit(submit(0, prompt=4, output=40, priority=-1))
    device.step()
    for handle in (1, 2):
        scheduler.submit(submit(handle, prompt=80, output=4))
    while not scheduler.preemptions:
        device.step()
    scheduler.abort(2, device.now)  # it was in no step yet: its pages come back at once
    device.run()
    assert device.tokens(0) == expected(0, 4, 40)


def test_aborting_what_is_not_active_is_a_no_op():
    scheduler = make()
    scheduler.abort(3, 0.0)
    assert scheduler.take_ended() == []


@pytest.mark.parametrize("seed", range(1000))
def test_any_sequence_of_events_returns_every_page_and_ends_every_request_once(seed: int):
    random_ = random.Random(seed)
    depth = random_.choice((0, 1, 1, 2))
    scheduler = make(
        slots=random_.randint(1, 6),
        num_pages=random_.randint(12, 40),
        page_size=random_.choice((1, 4, 8)),
        chunks=random_.choice(((4,), (8, 32))),
        prefix_cache=random_.random() < 0.8,
        host_pages=random_.choice((0, 10, 100)),
    )
    tokens = (scheduler.allocator.num_pages - 1) * scheduler.page_size
    device = ScriptedDevice(scheduler, depth)
    submitted: dict[int, tuple[int, int]] = {}
    for _ in range(random_.randint(10, 60)):
        event = random_.random()
        if event < 0.35 and tokens >= 2:
            handle = len(submitted)
            prompt = random_.randint(1, tokens - 1)
            output = random_.randint(1, min(tokens - prompt, 24))
            submitted[handle] = (prompt, output)
            if random_.random() < 0.2:
                device.stops[handle] = prompt + random_.randint(0, output)
            if random_.random() < 0.05:
                device.failures[handle] = prompt + random_.randint(0, output)
            deadline = device.now + random_.randint(1, 30) if random_.random() < 0.15 else None
            priority = random_.choice((0, 0, 0, 1))
            scheduler.submit(submit(handle, prompt, output, deadline=deadline, priority=priority))
        elif event < 0.45 and submitted:
            scheduler.abort(random_.randrange(len(submitted)), device.now)
        elif event < 0.48:
            device.fail()
        else:
            device.step()
    device.run()
    assert scheduler.allocator.available == scheduler.allocator.num_pages - 1
    for handle, (prompt, output) in submitted.items():
        assert device.reason(handle) in ("length", "stop", "abort", "deadline", "error")
        got = device.tokens(handle)
        assert got == expected(handle, prompt, len(got))
        if device.reason(handle) == "length":
            assert len(got) == output


def test_a_held_request_starts_when_it_is_released_and_ends_where_it_waits():
    scheduler = Scheduler(slots=2, num_pages=20, page_size=4, prefill_chunks=(16,))
    device = ScriptedDevice(scheduler)
    scheduler.submit(submit(1), held=True)
    scheduler.submit(submit(2, fork_seeds=[7], deadline=1e6), held=True)
    assert scheduler.is_idle and scheduler.plan(0.0) is None
    scheduler.submit(submit(4))
    assert not scheduler.is_idle
    for _ in range(30):
        device.step()
    assert device.reason(4) == "length" and scheduler.is_idle
    assert [one.handle for one in scheduler.release(1)] == [1]
    for _ in range(30):
        device.step()
    assert device.reason(1) == "length"
    scheduler.expire(2e6)
    assert {(output.handle, output.finish_reason) for output in scheduler.take_ended()} == {
        (2, "deadline"),
        (3, "deadline"),
    }
    assert scheduler.release(2) == [] and scheduler.is_idle
    scheduler.check()
