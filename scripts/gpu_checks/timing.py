"""Time on the device."""

import math
import statistics
import time
from collections.abc import Callable

import jax
from benchmarks.device_trace import trace_device
from benchmarks.steps import gaps, union

MOST_OPERATIONS = 20
"""Lines of a profile."""
WARM_SECONDS = 0.3
"""Of calls before the first that counts: an idle device's clocks take a while to rise."""
ROUND_SECONDS = 0.05
"""At least: what a round's start and end cost the host is then next to nothing."""


def seconds_per_call[Carry](call: Callable[[Carry], Carry], carry: Carry, *, calls: int, rounds: int = 5) -> float:
    """Median over rounds of the time of a call, each call given what the last one gave: a donated carry stays in place.

    Calls are dispatched ahead, so a call's time is the device's as long as that exceeds the dispatch.

    Args:
        call: is compiled by its first call.
        carry: what that is given.
        calls: in a round, at least; as many more as make it last.
        rounds: after the warm-up.
    """

    def several(carry: Carry, count: int) -> Carry:
        for _ in range(count):
            carry = call(carry)
        return jax.block_until_ready(carry)

    carry, warm = several(carry, 1), 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < WARM_SECONDS:
        carry = several(carry, calls)
        warm += calls
    calls = max(calls, math.ceil(ROUND_SECONDS * warm / elapsed))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        carry = several(carry, calls)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def profile[Carry](
    step: str,
    call: Callable[[Carry], Carry],
    carry: Carry,
    *,
    calls: int,
    parts: int = 1,
    most: int = MOST_OPERATIONS,
) -> list[dict[str, str | float]]:
    """What a call consists of on the device: microseconds of each operation, longest first, of all, and between them.

    Where the profiler fails, one line that says so: it is not what is checked.

    Args:
        step: how the lines name the call.
        call: as of `seconds_per_call`.
        carry: likewise.
        calls: how many are traced.
        parts: that a call consists of; the figures are those of one.
        most: operations that have a line.
    """
    carry = jax.block_until_ready(call(carry))
    try:
        with trace_device() as trace:
            for _ in range(calls):
                carry = call(carry)
            jax.block_until_ready(carry)
    except Exception as error:
        return [{"step": step, "failed": f"{type(error).__name__}: {error}"[:500]}]
    lengths = [end - start for start, end in trace.intervals]
    between = sum(gaps(union(trace.intervals)))
    lines = [("(nothing)", 0, between), ("(all)", len(lengths), sum(lengths)), *trace.by_operation()[:most]]
    times = calls * parts
    return [
        {"step": step, "operation": name[:60], "times": count / times, "us": seconds * 1e6 / times}
        for name, count, seconds in lines
    ]
