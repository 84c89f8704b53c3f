"""Where top-k and top-p cut the distributions of a step's rows: by the native kernel on CPU, by XLA elsewhere."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.device.row_sums import row_sums
from pallas_kernels import native_build
from pallas_kernels.sampling_thresholds import sampling_thresholds

Weights = Float[Array, "row vocab"]
Thresholds = Float[Array, " row"]
FindThresholds = Callable[[Weights, Int32[Array, " row"], Float[Array, " row"]], Thresholds]
"""From weights in [0, 1], top-k and top-p to thresholds, as `sampling_thresholds` says."""


def thresholds_for(platform: str) -> FindThresholds:
    """What finds them on a platform, which is given and not asked of JAX: steps are compiled for others too."""
    return sampling_thresholds if platform == "cpu" and native_build.available() else xla_thresholds


def xla_thresholds(weights: Weights, top_k: Int32[Array, " row"], top_p: Float[Array, " row"]) -> Thresholds:
    """See `sampling_thresholds`. What no row asks for is not looked for."""

    def none(weights: Weights, _: Array) -> Thresholds:
        return jnp.zeros(weights.shape[0], weights.dtype)

    def kth(weights: Weights, top_k: Int32[Array, " row"]) -> Thresholds:
        count = top_k.astype(jnp.float32)  # exact: a vocabulary has fewer than 2**24 tokens
        return _largest_threshold(weights, lambda kept: row_sums(kept.astype(jnp.float32)) >= count)

    def nucleus(weights: Weights, top_p: Float[Array, " row"]) -> Thresholds:
        target = top_p * row_sums(weights)
        found = _largest_threshold(weights, lambda kept: row_sums(jnp.where(kept, weights, 0.0)) >= target)
        return jnp.where(top_p < 1.0, found, 0.0)

    first = lax.cond(jnp.any(top_k < weights.shape[1]), kth, none, weights, top_k)
    within = weights * (weights >= first[:, None])
    return jnp.maximum(first, lax.cond(jnp.any(top_p < 1.0), nucleus, none, within, top_p))


def _largest_threshold(weights: Weights, is_enough: Callable[[Bool[Array, "row vocab"]], Array]) -> Thresholds:
    """The largest threshold of each row that keeps enough of it; 0 does.

    Between 0 and 1 the order of floats is that of their bits: 30 halvings of the bits find it.
    """
    low = jnp.zeros(weights.shape[0], jnp.int32)
    high = jnp.full(weights.shape[0], lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        enough = is_enough(weights >= lax.bitcast_convert_type(middle, jnp.float32)[:, None])
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = lax.fori_loop(0, 30, halve, (low, high))
    return lax.bitcast_convert_type(low, jnp.float32)
