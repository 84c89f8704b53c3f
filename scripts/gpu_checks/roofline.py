"""What the device can do: the rates that other figures are parts of."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from gpu_checks.cases import Case, Options
from gpu_checks.timing import seconds_per_call


def copy_bandwidth(gigabytes: float) -> float:
    """Bytes a second, read and written, of a large elementwise pass."""
    array = jnp.zeros(int(gigabytes * 1e9) // 4, jnp.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    return 2 * array.nbytes / seconds_per_call(step, array, calls=10)


def read_bandwidth(gigabytes: float) -> float:
    """Bytes a second of a sum: what attention and the weights of a step are, a copy's writes are no part of them."""
    array = jnp.zeros((int(gigabytes * 1e9) // 4 // 8192, 8192), jnp.float32)
    # Of rows first, and with the last sum in it: no call is computed before the one it follows.
    step = jax.jit(lambda total, array: jnp.sum(jnp.sum(array, axis=1)) + total)
    return array.nbytes / seconds_per_call(lambda total: step(total, array), jnp.float32(0), calls=10)


def matmul_rate(size: int) -> float:
    """bfloat16 operations a second of a square product of random numbers."""
    left, right = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    # Scaled so that the chain of products stays finite, and is no chain of zeros, which run faster.
    step = jax.jit(lambda x: (x @ right) * jnp.bfloat16(size**-0.5))
    return 2 * size**3 / seconds_per_call(step, left, calls=10)


@functools.cache
def rates(rehearse: bool) -> dict[str, float]:
    """Bytes and operations a second. Measured once in a process."""
    size = 0.01 if rehearse else 4.0
    return {
        "copy_gb_per_s": copy_bandwidth(size) / 1e9,
        "read_gb_per_s": read_bandwidth(size) / 1e9,
        "bf16_tflop_per_s": matmul_rate(256 if rehearse else 8192) / 1e12,
    }


def of_bandwidths(gb_per_s: float, rehearse: bool) -> dict[str, float]:
    """A rate as parts of what a copy moves and of what a sum reads."""
    measured = rates(rehearse)
    return {"of_copy": gb_per_s / measured["copy_gb_per_s"], "of_read": gb_per_s / measured["read_gb_per_s"]}


def cases(options: Options) -> Iterator[Case]:
    """The rates."""
    yield "rates", lambda: {**rates(options.rehearse)}
