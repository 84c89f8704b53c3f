"""Sizes of the Hopper kernels, and which caches they take."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.quantized import LARGEST, is_quantized

BLOCK = 64
"""Keys of a block: the rows of a wgmma tile. Blocks start at multiples of it, so the order of sums is fixed."""
MAX_GROUP = 64
"""Query heads that may share a kv head."""
SHARED_BYTES = 227 * 1024 - 4096
"""Shared memory of a block of threads on Hopper, less what Mosaic and the barriers take."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of one layer's cache and of the queries that attend to it."""

    page_size: int
    kv_heads: int
    head_dim: int
    """Of the cache, padded: `padded_head_dim`."""
    group: int
    """Query heads a kv head."""
    dtype: str
    """Of the cache."""

    @property
    def quantized(self) -> bool:
        """Whether a scale goes with each token and head."""
        return is_quantized(self.dtype)

    @property
    def q_rows(self) -> int:
        """Query heads of a kv head, padded: the columns of a wgmma tile come in eights."""
        return -(-self.group // 8) * 8

    @property
    def pages_per_block(self) -> int:
        """Pages that a block of keys touches, or the part of one that it is."""
        return max(1, BLOCK // self.page_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's keys and values of one head, with their scales."""
        return 2 * BLOCK * (self.head_dim * jnp.dtype(self.dtype).itemsize + 4 * self.quantized)


def padded_head_dim(head_dim: int) -> int:
    """Of the cache: wgmma takes values in multiples of 64. 96 becomes 128: a third more memory and time."""
    return -(-head_dim // 64) * 64


def check_cache(page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> None:
    """Raises ValueError, naming the size and the limit, for a cache that the kernels do not take."""
    name = jnp.dtype(dtype).name
    if name != "bfloat16" and not is_quantized(name):
        raise ValueError(f"a cache on mosaic_gpu must be bfloat16, {' or '.join(LARGEST)}, got {name}")
    if head_dim > 256:
        raise ValueError(f"head_dim on mosaic_gpu must be at most 256, got {head_dim}")
    if page_size % 8 or page_size > 256 or (BLOCK % page_size and page_size % BLOCK):
        raise ValueError(f"page_size on mosaic_gpu must be 8, 16, 32, 64, 128, 192 or 256, got {page_size}")
    if is_quantized(name) and page_size < 32:
        # The copy engine writes to shared memory at multiples of 128 bytes: 32 scales.
        raise ValueError(f"page_size of a {name} cache on mosaic_gpu must be at least 32, got {page_size}")


def tiled(columns: int, dtype: DTypeLike) -> tuple[Any, Any]:
    """The arrangement in shared memory that wgmma reads: tiles of 8 rows, swizzled."""
    itemsize = jnp.dtype(dtype).itemsize
    width = tile_width(columns, dtype)
    # Concrete classes, whose base looks abstract to pyright.
    tiling, swizzling = plgpu.TilingTransform, plgpu.SwizzleTransform
    return tiling((8, width)), swizzling(width * itemsize)  # pyright: ignore[reportAbstractUsage]


def tile_width(columns: int, dtype: DTypeLike) -> int:
    """Columns of a tile of `tiled`."""
    itemsize = jnp.dtype(dtype).itemsize
    return next(size for size in (128, 64, 32) if columns * itemsize % size == 0) // itemsize
