"""Sums over the vocabulary that do not depend on how many rows there are."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

PARTS = 8
"""Of fewer a sum takes more passes; of 16, XLA on CPU makes code that is five times slower."""


def row_sums(
    values: Float[Array, "row summed ..."], addend: Callable[[Array], Array] = lambda part: part
) -> Float[Array, "row ..."]:
    """Sums over the second axis in a fixed order: its eighths are added to each other until one element is left.

    The order of XLA's own sums follows the shape of the whole, and with it the number of rows.

    Args:
        values: float32.
        addend: what is summed, element by element, of a part of the axis. XLA stores what is made of the whole before
            it cuts it.
    """
    width = -(-values.shape[1] // PARTS)
    parts = [_filled(addend(values[:, start : start + width]), width) for start in range(0, PARTS * width, width)]
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0][:, 0] if width == 1 else row_sums(parts[0])


def _filled(part: Array, width: int) -> Array:
    missing = width - part.shape[1]
    return jnp.pad(part, [(0, 0), (0, missing)] + [(0, 0)] * (part.ndim - 2)) if missing else part
