"""What the device can do: the rates that other figures are parts of."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from gpu_checks.timing import seconds_per_call


def copy_bandwidth(gigabytes: float) -> float:
    """Bytes a second, read and written, of a large elementwise pass."""
    array = jnp.zeros(int(gigabytes * 1e9) // 4, jnp.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    return 2 * array.nbytes / seconds_per_call(step, array, calls=10)


def matmul_rate(size: int) -> float:
    """bfloat16 operations a second of a square product of random numbers."""
    left, right = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    # Scaled so that the chain of products stays finite, and is no chain of zeros, which run faster.
    step = jax.jit(lambda x: (x @ right) * jnp.bfloat16(size**-0.5))
    return 2 * size**3 / seconds_per_call(step, left, calls=10)


def rates(rehearse: bool) -> dict[str, float]:
    """Bytes and operations a second."""
    bandwidth, rate = copy_bandwidth(0.01 if rehearse else 4.0), matmul_rate(256 if rehearse else 8192)
    return {"copy_gb_per_s": bandwidth / 1e9, "bf16_tflop_per_s": rate / 1e12}


def run(rehearse: bool) -> Iterator[dict]:
    """The rates."""
    yield rates(rehearse)
