"""How long a small request takes, on a machine that others use."""

import time
from collections.abc import Awaitable, Callable

ROUNDS, ASKED = 3, 100


async def p99(ask: Callable[[], Awaitable[object]]) -> float:
    """The 99th percentile of seconds, of the best of a few rounds: what others do to the machine spoils a round, what
    the server does spoils each."""
    best = float("inf")
    for _ in range(ROUNDS):
        seconds: list[float] = []
        for _ in range(ASKED):
            began = time.perf_counter()
            await ask()
            seconds.append(time.perf_counter() - began)
        best = min(best, sorted(seconds)[int(ASKED * 0.99) - 1])
    return best
