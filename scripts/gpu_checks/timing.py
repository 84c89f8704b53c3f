"""Time on the device."""

import statistics
import time
from collections.abc import Callable

import jax
from benchmarks.device_trace import trace_device
from benchmarks.steps import gaps, union

MOST_OPERATIONS = 20
"""Lines of a profile."""


def seconds_per_call[Carry](call: Callable[[Carry], Carry], carry: Carry, *, calls: int, rounds: int = 5) -> float:
    """Median over rounds of the time of a call, each call given what the last one gave: a donated carry stays in place.

    Calls are dispatched ahead, so a call's time is the device's as long as that exceeds the dispatch.
    """
    carry = jax.block_until_ready(call(carry))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            carry = call(carry)
        jax.block_until_ready(carry)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def profile[Carry](step: str, call: Callable[[Carry], Carry], carry: Carry, *, calls: int) -> list[dict]:
    """What a call consists of on the device: microseconds a call of each operation, longest first, and between them.

    Args:
        step: how the lines name the call.
        call: as of `seconds_per_call`.
        carry: likewise.
        calls: how many are traced.
    """
    carry = jax.block_until_ready(call(carry))
    with trace_device() as trace:
        for _ in range(calls):
            carry = call(carry)
        jax.block_until_ready(carry)
    between = sum(gaps(union(trace.intervals)))
    lines = [("(nothing)", 0, between), *trace.by_operation()[:MOST_OPERATIONS]]
    return [
        {"step": step, "operation": name[:60], "times": count / calls, "us": seconds * 1e6 / calls}
        for name, count, seconds in lines
    ]
