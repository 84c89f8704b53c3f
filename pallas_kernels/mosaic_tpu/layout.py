"""How a layer's cache lies in a TPU's memory, and the sizes of what the kernels keep in VMEM.

A page holds its kv heads one after the other, each [page_size, lanes]: one DMA fetches all heads of a page. A TPU's
arrays have 128 lanes, so head_dim is padded to a multiple of 128: a head of 96 takes a third more memory. Heads of 64
and less put a token's key and value side by side in the same 128 lanes, and waste nothing at 64.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.interface import LayerCache, check_sizes, separate_layout
from pallas_kernels.quantized import is_quantized

LANES = 128
MAX_HEAD_DIM = 256
MAX_KV_HEADS = 32
MAX_PAGE_SIZE = 256
VMEM_LIMIT = 40 << 20
"""Bytes of VMEM that a kernel may take: of the least, 64 MiB on tpu7x."""
MAX_PAGE_BYTES = 3 << 20
"""Of a page in one array: the write kernel holds twelve such, keys and values, new, old and written, two of each."""
BUFFER_BYTES = 4 << 20
"""Of the blocks in VMEM: one is computed on while the others arrive."""


@dataclass(frozen=True)
class PageLayout:
    """The cache of one layer: sizes in tokens, elements and pages."""

    page_size: int
    kv_heads: int
    head_dim: int
    dtype: np.dtype
    block_tokens: int
    """At most so many in a block."""
    block_bytes: int
    """Of a block's keys and values, at most where 128 tokens fit in it."""

    @property
    def shared(self) -> bool:
        """Whether keys and values lie side by side in one array."""
        return 2 * self.head_dim <= LANES

    @property
    def lanes(self) -> int:
        """Of a token and head in an array."""
        return -(-self.head_dim // LANES) * LANES

    @property
    def value_lane(self) -> int:
        """Where a value begins within its lanes."""
        return self.head_dim if self.shared else 0

    @property
    def quantized(self) -> bool:
        """Whether there are scales."""
        return is_quantized(self.dtype)

    @property
    def scale_lanes(self) -> int:
        """Of a page and head in the arrays of scales: the page's tokens, padded."""
        return -(-self.page_size // LANES) * LANES

    @property
    def scale_heads(self) -> int:
        """Of a page in the arrays of scales: the kv heads, padded to what a tile of sublanes holds. In other shapes XLA
        has axis 1 outermost, and each call would copy all of the scales to have it where a page's are together."""
        return -(-self.kv_heads // 8) * 8 if self.kv_heads > 4 else 1 << (self.kv_heads - 1).bit_length()

    @property
    def token_bytes(self) -> int:
        """Bytes that attending to one token reads."""
        arrays = 1 if self.shared else 2
        scales = 8 * self.scale_heads * self.scale_lanes // self.page_size if self.quantized else 0
        return arrays * self.kv_heads * self.lanes * self.dtype.itemsize + scales

    @property
    def block_pages(self) -> int:
        """Pages of a block, over which one step of the softmax goes. It follows nothing but the layout: the order of
        sums is that of blocks at absolute positions."""
        tokens = min(self.block_tokens, max(LANES, self.block_bytes // self.token_bytes // LANES * LANES))
        return max(1, tokens // self.page_size)

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.block_pages * self.page_size

    @property
    def buffers(self) -> int:
        """Blocks that VMEM holds."""
        return min(8, max(2, BUFFER_BYTES // (self.token_bytes * self.block)))

    def written_part(self, array: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the least that is written of a page of an array of this shape: a tile's rows around a token, or all
        of its scales."""
        heads, tokens, *lanes = array[1:]
        return (heads, min(tokens, 32 // self.dtype.itemsize) if lanes else tokens, *lanes)

    def cache(self, num_pages: int) -> LayerCache:
        """Shapes and dtypes."""
        pages = (num_pages, self.kv_heads, self.page_size, self.lanes)
        layout = separate_layout(pages, (num_pages, self.scale_heads, self.scale_lanes), self.dtype)
        return layout._replace(v_pages=None) if self.shared else layout


def in_hbm(cache: LayerCache) -> LayerCache:
    """As operands of a kernel that stay where they are. XLA takes a kernel to read its operands whole, and would copy
    all of a small array to VMEM before a call and back after it."""
    return jax.tree.map(lambda array: pltpu.with_memory_space_constraint(array, pltpu.HBM), cache)


def check_page_layout(num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> None:
    """Raises ValueError naming the size and the limit where the kernels do not serve these sizes."""
    check_sizes(num_pages, page_size, kv_heads, head_dim, dtype)
    rows = 32 // jnp.dtype(dtype).itemsize
    tile = min(16, rows) if is_quantized(dtype) else rows
    if page_size % tile or page_size > MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two in [{tile}, {MAX_PAGE_SIZE}] on a TPU, got {page_size}")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM} on a TPU, got {head_dim}")
    if kv_heads > MAX_KV_HEADS:
        raise ValueError(f"kv_heads must be at most {MAX_KV_HEADS} on a TPU, got {kv_heads}")
    page_bytes = page_size * kv_heads * -(-head_dim // LANES) * LANES * jnp.dtype(dtype).itemsize
    if page_bytes > MAX_PAGE_BYTES:
        most = 1 << (page_size * MAX_PAGE_BYTES // page_bytes).bit_length() - 1
        raise ValueError(f"page_size must be at most {most} on a TPU, got {page_size}: {page_bytes} bytes of keys")
