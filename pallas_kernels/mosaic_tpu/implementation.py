"""A call's operands are brought into the forms of the kernels, and back.

Decode rows are one call of the attention kernel, which writes their tokens too; a tile is a token. The prompt chunk is
a call of the write kernel and one of the attention kernel; a tile is as many tokens as fill the matrix unit's rows.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.interface import (
    Attended,
    AttentionNeeds,
    LayerCache,
    PagedAttention,
    Scoring,
    check_cache,
    stored_form,
)
from pallas_kernels.mosaic_tpu.attend import Kernel, attend
from pallas_kernels.mosaic_tpu.layout import LANES, PageLayout, check_page_layout
from pallas_kernels.mosaic_tpu.work import AttendUnits, chunk_units, chunk_writes, decode_units
from pallas_kernels.mosaic_tpu.write import write_pages

TILE_QUERIES = 256
"""Queries of a kv head that a chunk's tile has about: twice the rows of the matrix unit."""
TILE_BYTES = 4 << 20
"""Of a chunk's tile of queries over all kv heads, about: VMEM holds four such and the running sums."""
SUBLANES = 16
"""Queries are padded to a multiple of this: the rows of a bfloat16 tile in registers."""
TABLE_ENTRIES = 1 << 17
"""Page numbers that a call of the kernel reads from scalar memory, which has 1 MiB: half of it."""


@dataclass(frozen=True)
class MosaicTpuPagedAttention(PagedAttention):
    """Keys and values [num_pages, kv_heads, page_size, lanes], as `layout.PageLayout` tells.

    A token whose value is not finite gets a key of NaN and a value of zero: it poisons those that see it, as it should,
    and nobody else, since zero times it is zero.
    """

    name: str = "mosaic_tpu"
    kv_head_axis: int = 1
    block_tokens: int = 512
    """Keys that one step of the softmax takes, at most."""
    block_bytes: int = 1 << 20
    """Bytes of those keys and their values, at most where 128 tokens fit."""
    interpret: object = False
    """As of `pl.pallas_call`."""

    def missing(self, needs: AttentionNeeds) -> str | None:
        """Page tables of rows longer than scalar memory."""
        if needs.max_pages > TABLE_ENTRIES:
            return (
                f"a row takes at most {TABLE_ENTRIES} pages, not {needs.max_pages}: larger pages or a shorter context"
            )
        return None

    def cache_layout(
        self, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> LayerCache:
        """See `layout.PageLayout`."""
        return self._layout(num_pages, page_size, kv_heads, head_dim, dtype).cache(num_pages)

    def _layout(self, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> PageLayout:
        check_page_layout(num_pages, page_size, kv_heads, head_dim, dtype)
        return PageLayout(page_size, kv_heads, head_dim, jnp.dtype(dtype), self.block_tokens, self.block_bytes)

    def _write_and_attend(self, q, k, v, cache, page_table, token_row, position, scoring, sinks) -> Attended:
        num_pages, _, page_size, _ = cache.k_pages.shape
        layout = self._layout(num_pages, page_size, k.shape[1], k.shape[2], cache.k_pages.dtype)
        check_cache(cache, layout.cache(num_pages))
        rows, max_pages = page_table.shape
        new = _new_tokens(k, v, layout)
        of_chunk = slice(rows, None)
        has_chunk = q.shape[0] > rows

        if has_chunk:
            units, source = chunk_writes(token_row[of_chunk], position[of_chunk], page_table, page_size)
            cache = write_pages(cache, _page_forms(new, rows + source, layout), units, interpret=self.interpret)

        compute_dtype = jnp.promote_types(q.dtype, jnp.bfloat16) if layout.quantized else layout.dtype
        attending = _Attending(layout, scoring, compute_dtype, sinks, self.interpret)
        outs = []
        for group in _row_groups(rows, max_pages):
            part = (page_table[group], token_row[group], position[group], _row_forms(new, group))
            out, cache = attending.rows(q[group], cache, *part)
            outs.append(out)
        if has_chunk:
            part = (q[of_chunk], cache, page_table, token_row[of_chunk], position[of_chunk])
            outs.append(attending.chunk(*part))
        return Attended(jnp.concatenate(outs), cache)


def _row_groups(rows: int, max_pages: int) -> list[slice]:
    """The rows that a call of the kernel serves: those whose page tables fit scalar memory together."""
    size = TABLE_ENTRIES // max_pages
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


@dataclass(frozen=True)
class _Attending:
    """What the calls of the attention kernel have in common."""

    layout: PageLayout
    scoring: Scoring
    compute_dtype: np.dtype
    sinks: Array | None
    interpret: object

    def rows(
        self, q: Array, cache: LayerCache, page_table: Array, token_row: Array, position: Array, new: LayerCache
    ) -> tuple[Array, LayerCache]:
        """The output of decode rows, one token each, and the cache with those in it."""
        units = decode_units(token_row, position, self.scoring.sliding_window)
        return self._attend(q, cache, page_table, units, 1, new)

    def chunk(self, q: Array, cache: LayerCache, page_table: Array, token_row: Array, position: Array) -> Array:
        """The output of a chunk's tokens."""
        tokens, q_heads, _ = q.shape
        layout = self.layout
        tile = _chunk_tile(tokens, q_heads // layout.kv_heads, layout.kv_heads * layout.lanes * q.dtype.itemsize)
        padding = -tokens % tile
        q = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
        token_row = jnp.pad(token_row, (0, padding), constant_values=-1)
        position = jnp.pad(position, (0, padding))
        out = jnp.zeros_like(q)
        for group in _row_groups(*page_table.shape):
            own = (token_row >= group.start) & (token_row < group.stop)
            group_row = jnp.where(own, token_row - group.start, -1)
            units = chunk_units(group_row, position, tile, page_table.shape[0], self.scoring.sliding_window)
            out = jnp.where(own[:, None, None], self._attend(q, cache, page_table[group], units, tile)[0], out)
        return out[:tokens]

    def _attend(
        self,
        q: Array,
        cache: LayerCache,
        page_table: Array,
        units: AttendUnits,
        tile: int,
        new: LayerCache | None = None,
    ) -> tuple[Array, LayerCache]:
        tiles = _tiles(q, tile, self.layout)
        sinks = None if self.sinks is None else _spread_sinks(self.sinks, tile, tiles)
        kernel = Kernel(
            self.layout,
            self.scoring,
            tile,
            page_table.shape[1],
            has_sinks=sinks is not None,
            compute_dtype=jnp.dtype(self.compute_dtype),
            writes=new is not None,
        )
        out, cache = attend(tiles, cache, page_table, units, kernel, sinks, new, interpret=self.interpret)
        return _tokens(out, tile, q.shape[1], self.layout), cache


def _chunk_tile(tokens: int, group: int, query_bytes: int) -> int:
    """Tokens of a tile: the power of two, 8 or more, that makes about TILE_QUERIES queries with a group of heads, of
    `query_bytes` over all kv heads."""
    queries = min(TILE_QUERIES, TILE_BYTES // query_bytes)
    tile = 8
    while tile < tokens and 2 * tile * group <= queries:
        tile *= 2
    return tile


def _tiles(
    q: Float[Array, "token q_head head_dim"], tile: int, layout: PageLayout
) -> Float[Array, "tile kv_head query lanes"]:
    """The queries of each tile by kv head, a query head's side by side, padded to the hardware's tiles."""
    kv_heads, group = layout.kv_heads, q.shape[1] // layout.kv_heads
    tiles = q.reshape(-1, tile, kv_heads, group, q.shape[2]).transpose(0, 2, 3, 1, 4)
    tiles = tiles.reshape(tiles.shape[0], kv_heads, group * tile, q.shape[2])
    return jnp.pad(tiles, ((0, 0), (0, 0), (0, -tiles.shape[2] % SUBLANES), (0, layout.lanes - q.shape[2])))


def _tokens(
    out: Float[Array, "tile kv_head query lanes"], tile: int, q_heads: int, layout: PageLayout
) -> Float[Array, "token q_head head_dim"]:
    """The inverse of `_tiles`, of the lanes that hold values."""
    kv_heads, head_dim, lane = layout.kv_heads, layout.head_dim, layout.value_lane
    group = q_heads // kv_heads
    out = out[:, :, : group * tile, lane : lane + head_dim].reshape(-1, kv_heads, group, tile, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(-1, q_heads, head_dim)


def _spread_sinks(
    sinks: Float32[Array, " q_head"], tile: int, tiles: Float[Array, "tile kv_head query lanes"]
) -> Float32[Array, "kv_head query sink_lanes"]:
    """Each query's sink in all lanes."""
    _, kv_heads, queries, _ = tiles.shape
    spread = jnp.repeat(sinks.reshape(kv_heads, -1), tile, axis=1)
    spread = jnp.pad(spread, ((0, 0), (0, queries - spread.shape[1])))
    return jnp.broadcast_to(spread[..., None], (kv_heads, queries, LANES))


def _row_forms(new: LayerCache, rows: slice) -> LayerCache:
    """The rows' tokens for `attend`, one a unit."""
    return jax.tree.map(lambda array: jnp.expand_dims(array[rows], 2), new)


def _page_forms(new: LayerCache, source: Int32[Array, "unit page_size"], layout: PageLayout) -> LayerCache:
    """The chunk's tokens for `write_pages`, a page a unit."""
    pages = jax.tree.map(lambda array: jnp.moveaxis(array[source], 1, 2), new)
    pad = layout.scale_lanes - layout.page_size
    scales = [None if array is None else jnp.pad(array, ((0, 0), (0, 0), (0, pad))) for array in pages[2:]]
    return LayerCache(*pages[:2], *scales)


def _new_tokens(k: Array, v: Array, layout: PageLayout) -> LayerCache:
    """Keys and values as the pages hold them, [token, kv_head, lanes]; scales [token, scale_head]."""
    finite = jnp.isfinite(v).all(axis=-1, keepdims=True)
    k, v = jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0)
    keys, values, *scales = stored_form(k, v, layout.dtype)
    assert values is not None
    scales = [None if scale is None else _pad_last(scale, layout.scale_heads) for scale in scales]
    if layout.shared:
        return LayerCache(_pad_last(jnp.concatenate([keys, values], axis=-1), layout.lanes), None, *scales)
    return LayerCache(_pad_last(keys, layout.lanes), _pad_last(values, layout.lanes), *scales)


def _pad_last(array: Array, size: int) -> Array:
    return jnp.pad(array, (*[(0, 0)] * (array.ndim - 1), (0, size - array.shape[-1])))
