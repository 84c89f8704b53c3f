"""What an engine counts of its work."""

import pytest

from jaxserve.core.messages import StepRecord
from jaxserve.events import Finished, FinishReason, Timings, Usage
from jaxserve.front.statistics import Distribution, Statistics, device_idle_ratio


def record(step: int, dispatched: float, retired: float, host: float = 0.0, **fields: object) -> StepRecord:
    changed = {"given_slots": [], "taken_slots": [], "freed_slots": [], **fields}
    return StepRecord(step, 2, 16, dispatched, retired, host, 0.0, **changed)


def test_a_value_is_counted_at_the_first_bound_that_is_not_below_it() -> None:
    values = Distribution((1, 2, 4))
    for value in (0, 1, 1.5, 2, 3, 4, 5):
        values.observe(value)
    assert values.counts == [2, 2, 2, 1]
    assert values.sum == 16.5


def test_quantiles_lie_within_their_bounds() -> None:
    values = Distribution((1, 2, 4))
    assert values.quantile(0.5) is None
    for _ in range(10):
        values.observe(1.5)
    assert values.quantile(0.5) == pytest.approx(1.5)
    values.observe(100)
    assert values.quantile(1.0) == 4


def test_tokens_are_counted_as_usage_has_them_and_first_ones_apart() -> None:
    statistics = Statistics()
    statistics.on_start(7)
    statistics.on_first_tokens(1, 0.25)
    for count in (1, 2):
        statistics.on_more_tokens(count, 0.125)
    finished = Finished("id", 0, FinishReason.STOP, Usage(7, 0, 5), Timings(0.1, 0.2, 0.3, 0.6))
    statistics.on_finish(finished, 4)
    assert (statistics.prompt_tokens, statistics.generation_tokens) == (7, 5)
    assert statistics.finished["stop"] == 1
    assert (sum(statistics.time_to_first_token.counts), statistics.time_to_first_token.sum) == (1, 0.25)
    assert (sum(statistics.inter_token_latency.counts), statistics.inter_token_latency.sum) == (2, 0.25)
    assert (statistics.e2e_latency.sum, statistics.decode_time.sum) == (0.6, 0.3)


def test_a_request_that_never_ran_has_no_prefill_and_no_decode() -> None:
    statistics = Statistics()
    statistics.on_finish(Finished("id", 0, FinishReason.ABORT, Usage(3, 0, 0), Timings(0.5, 0, 0, 0.5)), 0)
    assert sum(statistics.queue_time.counts) == 1
    assert sum(statistics.prefill_time.counts) == sum(statistics.decode_time.counts) == 0


def test_reuse_lag_counts_only_while_requests_wait() -> None:
    statistics = Statistics()
    statistics.on_step(record(1, 0, 1, freed_slots=[0, 1], waiting=1))
    statistics.on_step(record(3, 1, 2, given_slots=[0]))
    statistics.on_step(record(9, 2, 3, given_slots=[1]))
    assert statistics.slot_reuse_lag.sum == 2
    assert sum(statistics.slot_reuse_lag.counts) == 1


def test_reuse_lag_counts_only_while_requests_wait_in_the_same_replica() -> None:
    statistics = Statistics()
    statistics.on_step(record(1, 0, 1, freed_slots=[0], waiting=1))
    statistics.on_step(record(1, 0, 1, freed_slots=[1], replica=1))
    statistics.on_step(record(2, 1, 2, given_slots=[0]))
    statistics.on_step(record(9, 1, 2, given_slots=[1], replica=1))
    assert (statistics.slot_reuse_lag.sum, sum(statistics.slot_reuse_lag.counts)) == (1, 1)


def test_the_device_is_idle_where_the_host_worked_between_steps_and_not_where_there_was_nothing_to_do() -> None:
    steps = [record(1, 0.0, 1.0), record(2, 1.5, 2.0, host=0.5), record(3, 1.9, 3.0, host=0.1)]
    # Of 0.5 + 0.5 + 1.0 seconds after the first step, the host took 0.5.
    assert device_idle_ratio(steps, now=3.0) == pytest.approx(0.25)
    assert device_idle_ratio([steps[0], record(2, 101.0, 102.0, host=0.001)], now=102.0) == 0.0
    waited = [record(1, 100.0, 101.0), record(2, 140.0, 141.0, host=0.25)]
    assert device_idle_ratio(waited, now=141.0) == pytest.approx(0.2)
    assert device_idle_ratio([], now=0.0) == 0.0
