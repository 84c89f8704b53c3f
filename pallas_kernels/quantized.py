"""Keys and values in 8 bits: each vector of a head is stored with one float32 scale.

A scale is by token and head, not by page: a page's scale would change as the page fills, and with it the stored values
of earlier tokens, so that results would depend on how a prompt is cut.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Num

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The quantised dtypes, and the largest number that each holds."""


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether a cache of this dtype has scales."""
    return jnp.dtype(dtype).name in LARGEST


def quantize(
    x: Float[Array, "token kv_head head_dim"], dtype: DTypeLike
) -> tuple[Num[Array, "token kv_head head_dim"], Float32[Array, "token kv_head"]]:
    """Symmetric: x is about `values * scale[..., None]`. A vector that is not finite has scale NaN; one whose scale is
    less than a normal float32 becomes zeros."""
    dtype = jnp.dtype(dtype)
    limit = LARGEST[dtype.name]
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    finite, scale = jnp.isfinite(largest), largest / limit
    scaled = x * jnp.where(finite & (scale >= jnp.finfo(jnp.float32).tiny), limit / largest, 0.0)[..., None]
    scaled = jnp.where(finite[..., None], scaled, 0.0)
    values = jnp.round(scaled) if dtype == jnp.int8 else jnp.clip(scaled, -limit, limit)
    return values.astype(dtype), jnp.where(finite, scale, jnp.nan)
