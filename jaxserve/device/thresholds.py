"""Where top-k and top-p cut the distributions of a step's rows, by XLA; on CPU a native kernel is faster."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.device.row_sums import row_sums

Weights = Float[Array, "row vocab"]
Thresholds = Float[Array, " row"]
FindThresholds = Callable[[Weights, Int32[Array, " row"] | None, Float[Array, " row"] | None], Thresholds]
"""From weights in [0, 1], top-k and top-p to thresholds, as `pallas_kernels.sampling_thresholds` says."""


def xla_thresholds(
    weights: Weights, top_k: Int32[Array, " row"] | None, top_p: Float[Array, " row"] | None
) -> Thresholds:
    """See `sampling_thresholds`. Every row is searched for what is given."""
    thresholds = jnp.zeros(weights.shape[0], weights.dtype)
    if top_k is not None:
        thresholds = _kth(weights, top_k, thresholds)
    if top_p is not None:
        thresholds = _nucleus(weights, top_p, thresholds)
    return thresholds


def _kth(weights: Weights, top_k: Int32[Array, " row"], start: Thresholds) -> Thresholds:
    def count(part: Array, kept: Array) -> Array:
        return kept.astype(jnp.float32)  # exact: a vocabulary has fewer than 2**24 tokens

    found = _largest_threshold(weights, count, top_k.astype(jnp.float32), start)
    return jnp.where(top_k < weights.shape[1], found, start)


def _nucleus(weights: Weights, top_p: Float[Array, " row"], start: Thresholds) -> Thresholds:
    def mass(part: Array, kept: Array) -> Array:
        return jnp.where(kept, part, 0.0)

    total = row_sums(weights, lambda part: mass(part, part >= start[:, None]))
    return jnp.where(top_p < 1.0, _largest_threshold(weights, mass, top_p * total, start), start)


def _largest_threshold(
    weights: Weights,
    mass: Callable[[Array, Bool[Array, "row part"]], Array],
    target: Float[Array, " row"],
    start: Thresholds,
) -> Thresholds:
    """The largest threshold of each row at which the mass of what it keeps reaches the target, as it does at `start`.

    Between 0 and 1 the order of floats is that of their bits: 30 halvings of the bits find it.
    """
    low = lax.bitcast_convert_type(start, jnp.int32)
    high = jnp.full(weights.shape[0], lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        threshold = lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        enough = row_sums(weights, lambda part: mass(part, part >= threshold)) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = lax.fori_loop(0, 30, halve, (low, high))
    return lax.bitcast_convert_type(low, jnp.float32)
