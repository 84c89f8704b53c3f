"""Paged attention for Hopper GPUs, behind the interface of `PagedAttention`."""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels.interface import (
    Attended,
    AttentionNeeds,
    LayerCache,
    PagedAttention,
    Scoring,
    check_cache,
    check_sizes,
    separate_layout,
    stored_form,
)
from pallas_kernels.mosaic_gpu import geometry as sizes
from pallas_kernels.mosaic_gpu.chunk import TILE, ChunkKernel, ChunkPlan
from pallas_kernels.mosaic_gpu.combine import combine
from pallas_kernels.mosaic_gpu.decode import DecodePlan, attend_splits
from pallas_kernels.mosaic_gpu.geometry import Geometry
from pallas_kernels.mosaic_gpu.products import Product, plain_product, wgmma_product
from pallas_kernels.mosaic_gpu.ring import Pages
from pallas_kernels.mosaic_gpu.scores import LOG2_E
from pallas_kernels.mosaic_gpu.work import chunk_work, decode_work
from pallas_kernels.mosaic_gpu.write import write_tokens

_HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")


@dataclass(frozen=True)
class MosaicGpuPagedAttention(PagedAttention):
    """Pages are [kv_heads, page_size, head_dim], the head dim padded to a multiple of 64.

    Of the promises of `PagedAttention` it does not keep one: a token that comes within a chunk may differ in its last
    bits from the same token alone. The chunk's softmax runs on from block to block, where decode rows have splits.
    """

    name: str = "mosaic_gpu"
    kv_head_axis: int = 1
    interpret: plgpu.InterpretGPUParams | None = None
    """Set to run on the CPU, for tests: the products are then plain, and everything around them is what a GPU runs."""
    blocks: int | None = None
    """Blocks of threads of the grid; None takes what fills an H100. No bit depends on it."""

    def missing(self, needs: AttentionNeeds) -> str | None:
        """A float32 cache, large groups, and every GPU but Hopper: wgmma is of compute capability 9.0 alone."""
        if needs.device_kind is not None and not _HOPPER.search(needs.device_kind):
            return f"its kernels are for Hopper GPUs, and this is {needs.device_kind!r}"
        if needs.kv_dtype == "float32":
            return "the tensor cores have no float32: a float32 cache takes attention xla"
        if needs.group > sizes.MAX_GROUP:
            return f"it takes at most {sizes.MAX_GROUP} query heads a kv head, not {needs.group}"
        return None

    def cache_layout(
        self, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> LayerCache:
        """[num_pages, kv_heads, page_size, padded head_dim], scales [num_pages, kv_heads, page_size]."""
        check_sizes(num_pages, page_size, kv_heads, head_dim, dtype)
        sizes.check_cache(page_size, kv_heads, head_dim, dtype)
        pages = (num_pages, kv_heads, page_size)
        return separate_layout((*pages, sizes.padded_head_dim(head_dim)), pages, dtype)

    def _write_and_attend(self, q, k, v, cache, page_table, token_row, position, scoring, sinks) -> Attended:
        num_pages, _, page_size, _ = cache.k_pages.shape
        _, q_heads, head_dim = q.shape
        kv_heads, dtype = k.shape[1], cache.k_pages.dtype
        check_cache(cache, self.cache_layout(num_pages, page_size, kv_heads, head_dim, dtype))
        geometry = Geometry(page_size, kv_heads, cache.k_pages.shape[3], q_heads // kv_heads, dtype.name)
        refs = jax.tree.map(jax.new_ref, cache)
        # An array of its own: a slice of another, as an upload's one row is, may not begin where a kernel's must.
        table = jnp.maximum(page_table, 0)
        call = _Call(
            Pages(refs.k_pages, refs.v_pages, refs.k_scales, refs.v_scales, table),
            geometry,
            scoring,
            None if sinks is None else LOG2_E * sinks.reshape(kv_heads, geometry.group),
        )
        queries = _pad_last(q.astype(jnp.bfloat16), geometry.head_dim)
        queries = queries.reshape(q.shape[0], kv_heads, geometry.group, geometry.head_dim)
        stored = stored_form(_pad_last(k, geometry.head_dim), _pad_last(v, geometry.head_dim), dtype)
        rows = page_table.shape[0]
        out = self._attend_rows(call, queries[:rows], stored, token_row[:rows], position[:rows])
        if q.shape[0] > rows:
            chunk = self._attend_chunk(call, queries[rows:], stored, token_row[rows:], position[rows:])
            out = jnp.concatenate([out, chunk])
        out = out.reshape(q.shape[0], q_heads, -1)[..., :head_dim].astype(q.dtype)
        return Attended(out, jax.tree.map(lambda ref: ref[...], refs))

    def _attend_rows(
        self,
        call: "_Call",
        queries: BFloat16[Array, "row kv_head group head_dim"],
        stored: LayerCache,
        token_row: Int32[Array, " row"],
        position: Int32[Array, " row"],
    ) -> BFloat16[Array, "row kv_head group head_dim"]:
        """The decode rows, written and attended. `stored` is of all tokens, of which they are the first."""
        geometry, sinks = call.geometry, call.sinks
        max_context = call.pages.table.shape[1] * geometry.page_size
        work, row_start = decode_work(token_row, position, max_context, call.scoring.sliding_window)
        plan = DecodePlan.of(geometry)
        plan = replace(plan, blocks=self.blocks or plan.blocks)
        padding = geometry.q_rows - geometry.group
        tokens = jnp.pad(queries, ((0, 0), (0, 0), (0, padding), (0, 0)))
        tokens = tokens.reshape(tokens.shape[0], -1, geometry.head_dim)
        if geometry.quantized:
            self._write(call, stored, token_row, position, 0)
        else:
            # One array, which XLA makes in one operation; the kernel's copies want its heads in eights.
            new = (array[: len(tokens)] for array in stored if array is not None)
            tokens = jnp.concatenate([tokens, *new], axis=1)
            tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % 8), (0, 0)))
        partial = attend_splits(tokens, call.pages, work, geometry, call.scoring, plan, self._product, self.interpret)
        if sinks is not None:
            sinks = jnp.pad(sinks, ((0, 0), (0, padding)))
        return combine(partial, row_start, sinks, geometry.group, self.interpret)

    def _attend_chunk(
        self,
        call: "_Call",
        queries: BFloat16[Array, "token kv_head group head_dim"],
        stored: LayerCache,
        token_row: Int32[Array, " token"],
        position: Int32[Array, " token"],
    ) -> BFloat16[Array, "token kv_head group head_dim"]:
        """The prompt chunk, written and attended: its queries are laid out in tiles for the kernel, and back. `stored`
        is of all tokens, of which the chunk's are the last."""
        geometry, rows = call.geometry, call.pages.table.shape[0]
        self._write(call, stored, token_row, position, rows)
        plan = ChunkPlan.of(geometry)
        plan = replace(plan, blocks=self.blocks or plan.blocks)
        kernel = ChunkKernel(geometry, call.scoring, plan, self._product)
        work, places = chunk_work(token_row, position, rows, kernel.tokens_per_unit)
        spare = TILE - kernel.tokens_per_tile * geometry.group

        within = jnp.arange(kernel.tokens_per_unit).reshape(plan.consumers, kernel.tokens_per_tile)
        token = jnp.minimum(places.first_token[:, None, None] + within, queries.shape[0] - 1)
        tiles = jnp.swapaxes(queries[token], 2, 3).reshape(*token.shape[:2], geometry.kv_heads, -1, geometry.head_dim)
        tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, 0), (0, spare), (0, 0)))
        sinks = call.sinks
        if sinks is not None:
            sinks = jnp.pad(jnp.tile(sinks, (1, kernel.tokens_per_tile)), ((0, 0), (0, spare)))

        out = kernel(tiles, call.pages, work, sinks, self.interpret)[..., : TILE - spare, :]
        out = out.reshape(*out.shape[:3], kernel.tokens_per_tile, geometry.group, geometry.head_dim)
        tile, within_tile = places.before // kernel.tokens_per_tile, places.before % kernel.tokens_per_tile
        by_token = jnp.moveaxis(out, 3, 2)[places.unit, tile, within_tile]
        return jnp.where((token_row >= 0)[:, None, None, None], by_token, 0)

    def _write(
        self,
        call: "_Call",
        stored: LayerCache,
        token_row: Int32[Array, " token"],
        position: Int32[Array, " token"],
        first: int,
    ) -> None:
        """Tokens to their pages, in a kernel of its own: of those stored the ones from `first` on."""
        page_size, table = call.geometry.page_size, call.pages.table
        table_page = position // page_size
        lives = (token_row >= 0) & (position >= 0) & (table_page < table.shape[1])
        page = jnp.where(lives, table.at[token_row, table_page].get(mode="clip"), 0)
        tokens = [array for array in stored if array is not None]
        pages = [ref for ref in call.pages[:4] if ref is not None]
        write_tokens(tokens, pages, page, position % page_size, first, self.interpret)

    @property
    def _product(self) -> Product:
        return wgmma_product if self.interpret is None else plain_product


@dataclass(frozen=True)
class _Call:
    """What `write_and_attend` was given, as the kernels take it."""

    pages: Pages
    """References to the cache, and its table."""
    geometry: Geometry
    scoring: Scoring
    sinks: Array | None
    """[kv_head, group], in units of log 2."""


def _pad_last(x: Array, size: int) -> Array:
    """x with zeros behind its last axis, up to `size`."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, size - x.shape[-1]),))
