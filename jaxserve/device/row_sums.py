"""Sums over the vocabulary that do not depend on how many rows there are."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def row_sums(values: Float[Array, "row ..."]) -> Float[Array, "row ..."]:
    """Sums over the last axis in a fixed order: its eighths are added to each other until one element is left.

    The order of XLA's own sums follows the shape of the whole, and with it the number of rows.
    """
    while (size := values.shape[-1]) > 1:
        part = -(-size // 8)
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 8 * part - size)])
        parts = [values[..., start : start + part] for start in range(0, 8 * part, part)]
        while len(parts) > 1:
            parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
        values = parts[0]
    return values[..., 0]
