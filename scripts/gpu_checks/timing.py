"""Time on the device."""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import jax

Carry = TypeVar("Carry")


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
