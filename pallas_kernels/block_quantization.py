"""Weights in blocks of 32 inputs: numbers of 4 or 8 bits with a scale and a minimum for each block.

An output is uint8 [blocks * (4 + 4 * bits)]: of each block the scale and the minimum, float16, then 32 numbers without
sign, so that a weight is number * scale + minimum. Of 4 bits, byte i holds number i in its lower half and number 16 + i
in its upper one. With 4 bits this is a row of GGUF's Q4_1, byte for byte; Q4_0 and Q8_0 have minimums that follow from
their scales. Where the inputs do not fill the last block, the rest of its numbers says nothing.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

BLOCK = 32
"""Inputs of a block."""
_HEADER = 4
"""Bytes of a block's scale and minimum."""


def row_width(size_in: int, bits: int) -> int:
    """Bytes of an output."""
    return -(-size_in // BLOCK) * (_HEADER + BLOCK * bits // 8)


def row_widths(size_in: int) -> tuple[int, int]:
    """`row_width` of 4 and of 8 bits."""
    return row_width(size_in, 4), row_width(size_in, 8)


def block_bits(width: int, size_in: int) -> int:
    """Of the numbers in outputs of `width` bytes. Raises ValueError for a width that `size_in` inputs do not have."""
    widths = row_widths(size_in)
    if width not in widths:
        raise ValueError(f"{size_in} inputs take {widths[0]} or {widths[1]} bytes in blocks, got {width}")
    return 4 if width == widths[0] else 8


def quantize_blocks(weight: Float[Array, "out in"], bits: int) -> UInt8[Array, "out width"]:
    """Each block's range in equal steps: the least weight becomes number 0, the largest the last one."""
    size_out, size_in = weight.shape
    padding = -size_in % BLOCK
    x = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, padding)), mode="edge").reshape(size_out, -1, BLOCK)
    minimum = jnp.min(x, axis=-1, keepdims=True)
    scale = ((jnp.max(x, axis=-1, keepdims=True) - minimum) / (2**bits - 1)).astype(jnp.float16)
    minimum = minimum.astype(jnp.float16)
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale.astype(jnp.float32), 1), 0.0)
    numbers = jnp.clip(jnp.round((x - minimum.astype(jnp.float32)) * inverse), 0, 2**bits - 1).astype(jnp.uint8)
    if bits == 4:
        low, high = jnp.split(numbers, 2, axis=-1)
        numbers = low | high << 4
    header = lax.bitcast_convert_type(jnp.concatenate([scale, minimum], axis=-1), jnp.uint8)
    return jnp.concatenate([header.reshape(size_out, -1, _HEADER), numbers], axis=-1).reshape(size_out, -1)


def dequantize_blocks(blocks: UInt8[Array, "out width"], size_in: int) -> Float32[Array, "out in"]:
    """The weights."""
    bits = block_bits(blocks.shape[1], size_in)
    rows = blocks.reshape(blocks.shape[0], -1, row_width(BLOCK, bits))
    header = rows[..., :_HEADER].reshape(*rows.shape[:2], 2, 2)
    scale, minimum = jnp.split(lax.bitcast_convert_type(header, jnp.float16).astype(jnp.float32), 2, axis=-1)
    numbers = rows[..., _HEADER:]
    if bits == 4:
        numbers = jnp.concatenate([numbers & 15, numbers >> 4], axis=-1)
    weights = numbers.astype(jnp.float32) * scale + minimum
    return weights.reshape(blocks.shape[0], -1)[:, :size_in]


def with_minimums(scales: np.ndarray, numbers: np.ndarray, zero: int) -> np.ndarray:
    """Blocks whose number `zero` stands for a weight of 0: exact, since `zero`, 8 or 128, only shifts the scale.

    Args:
        scales: float16 [..., block].
        numbers: uint8 [..., block, bytes], as they are stored here.
        zero: the number.

    Returns uint8 [..., block, 4 + bytes].
    """
    header = np.stack([scales, scales * np.float16(-zero)], axis=-1)
    return np.concatenate([header.view(np.uint8), numbers], axis=-1)
