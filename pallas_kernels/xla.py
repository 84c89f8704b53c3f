"""Paged attention in plain JAX: what is always there.

Tokens are taken in tiles of eight. For each tile a loop runs over blocks of keys at absolute positions, up to the
tile's longest sequence, with an online softmax. Each token is one product of fixed shape a block, whatever else is in
the call: its query heads are laid block-diagonally over the kv heads, which lie side by side in the page.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Num

from pallas_kernels.interface import (
    Attended,
    LayerCache,
    PagedAttention,
    Scoring,
    check_cache,
    check_sizes,
    separate_layout,
    stored_form,
)
from pallas_kernels.quantized import is_quantized

TILE = 8
"""Tokens of a tile. One token costs what eight do."""
BLOCK = 128
"""Keys of a block, or one page where that is larger."""


@dataclass(frozen=True)
class XlaPagedAttention(PagedAttention):
    """Pages are [page_size, kv_heads * head_dim], a token's kv heads side by side."""

    name: str = "xla"
    kv_head_axis: int = 2

    def cache_layout(
        self, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> LayerCache:
        """Keys and values [num_pages, page_size, kv_heads * head_dim], scales [num_pages, page_size, kv_heads]."""
        check_sizes(num_pages, page_size, kv_heads, head_dim, dtype)
        tokens = (num_pages, page_size)
        return separate_layout((*tokens, kv_heads * head_dim), (*tokens, kv_heads), dtype)

    def _write_and_attend(self, q, k, v, cache, page_table, token_row, position, scoring, sinks) -> Attended:
        tokens, kv_heads, head_dim = k.shape
        num_pages, page_size = cache.k_pages.shape[:2]
        dtype = cache.k_pages.dtype
        check_cache(cache, self.cache_layout(num_pages, page_size, kv_heads, head_dim, dtype))
        max_pages = page_table.shape[1]
        table_page = position // page_size
        lives = (token_row >= 0) & (position >= 0) & (table_page < max_pages)
        page = page_table.at[token_row, table_page].get(mode="clip")
        page = jnp.where(lives & (page > 0), page, num_pages)
        offset = position % page_size
        cache = jax.tree.map(
            lambda array, new: array.at[page, offset].set(new.reshape(tokens, -1), mode="drop"),
            cache,
            stored_form(k, v, dtype),
        )

        padding = -tokens % TILE
        token_row = jnp.pad(jnp.where(lives, token_row, -1), (0, padding), constant_values=-1)
        position = jnp.pad(position, (0, padding))
        # The elements of a quantised cache are exact in the queries' dtype.
        queries = q if is_quantized(dtype) else q.astype(dtype)
        queries = _block_diagonal(jnp.pad(queries, ((0, padding), (0, 0), (0, 0))), kv_heads)
        pages_per_block = max(1, BLOCK // page_size)
        page_table = jnp.pad(page_table, ((0, 0), (0, -max_pages % pages_per_block)))

        def attend_tile(tile: Array) -> Array:
            start = tile * TILE
            rows = lax.dynamic_slice_in_dim(token_row, start, TILE)
            return _attend_tile(
                lax.dynamic_slice_in_dim(queries, start, TILE),
                cache,
                page_table[jnp.maximum(rows, 0)],
                jnp.where(rows >= 0, lax.dynamic_slice_in_dim(position, start, TILE), -1),
                pages_per_block,
                scoring,
                sinks,
            )

        out = lax.map(attend_tile, jnp.arange((tokens + padding) // TILE))
        out = _own_kv_head(out.reshape(tokens + padding, *queries.shape[1:]), kv_heads)
        return Attended(out[:tokens].astype(q.dtype), cache)


def _attend_tile(
    queries: Float[Array, "tile q_head kv"],
    cache: LayerCache,
    page_table: Int32[Array, "tile max_pages"],
    last: Int32[Array, " tile"],
    pages_per_block: int,
    scoring: Scoring,
    sinks: Float32[Array, " q_head"] | None,
) -> Float[Array, "tile q_head kv"]:
    """Attends from the queries of a tile to positions up to `last`; -1 for a token that attends to none."""
    tile, q_heads, width = queries.shape
    block = pages_per_block * cache.k_pages.shape[1]
    k_pages, v_pages = cache.k_pages, cache.v_pages
    assert v_pages is not None
    window, softcap = scoring.sliding_window, scoring.softcap
    first = jnp.zeros_like(last) if window is None else jnp.maximum(last - window + 1, 0)

    def gather(pages: Num[Array, "page page_size x"], numbers: Int32[Array, "tile block_page"]) -> Array:
        return pages.at[numbers].get(mode="clip").reshape(tile, block, -1)

    def head_scales(
        scales: Float32[Array, "page page_size kv_head"], numbers: Int32[Array, "tile block_page"]
    ) -> Array:
        by_head = jnp.moveaxis(gather(scales, numbers), 2, 1)
        return jnp.repeat(by_head, q_heads // by_head.shape[1], axis=1)

    def attend_block(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, weighted = carry
        numbers = lax.dynamic_slice_in_dim(page_table, number * pages_per_block, pages_per_block, axis=1)
        keys, values = gather(k_pages, numbers), gather(v_pages, numbers)
        key_position = number * block + jnp.arange(block)
        attends = (key_position >= first[:, None]) & (key_position <= last[:, None])
        scores = _batched_product(queries, keys.astype(queries.dtype), contract=2) * jnp.float32(scoring.scale)
        if cache.k_scales is not None:
            scores = scores * head_scales(cache.k_scales, numbers)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(attends[:, None], scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        # A token with no key so far has -inf - -inf here.
        shift = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
        weights = jnp.exp(scores - shift[..., None])
        rescale = jnp.exp(largest - shift)
        total = total * rescale + weights.sum(axis=-1)
        if cache.v_scales is not None:
            weights = weights * jnp.where(attends[:, None], head_scales(cache.v_scales, numbers), 0.0)
        # What lies in a page beyond a sequence's end may be another's garbage, and 0 * NaN is NaN.
        values = jnp.where(attends[..., None], values, jnp.zeros((), values.dtype)).astype(jnp.float32)
        weighted = weighted * rescale[..., None] + _batched_product(weights, values, contract=1)
        return new_largest, total, weighted

    # A sink is a score whose value is zero.
    sink = jnp.broadcast_to(-jnp.inf if sinks is None else sinks, (tile, q_heads))
    carry = (
        sink.astype(jnp.float32),
        jnp.full((tile, q_heads), 0.0 if sinks is None else 1.0, jnp.float32),
        jnp.zeros((tile, q_heads, width), jnp.float32),
    )
    blocks = jnp.max(last) // block + 1
    first_block = jnp.min(jnp.where(last >= 0, first, jnp.iinfo(jnp.int32).max)) // block
    _, total, weighted = lax.fori_loop(first_block, blocks, attend_block, carry)
    return weighted / jnp.where(total == 0.0, 1.0, total)[..., None]


def _batched_product(left: Array, right: Array, *, contract: int) -> Float[Array, "tile q_head out"]:
    """left[tile, q_head, x] times right[tile, ...] over right's axis `contract`, in float32."""
    dimensions = (((2,), (contract,)), ((0,), (0,)))
    # GPUs and TPUs multiply float32 in fewer bits unless told otherwise.
    precision = lax.Precision.HIGHEST if left.dtype == right.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _block_diagonal(q: Float[Array, "token q_head head_dim"], kv_heads: int) -> Float[Array, "token q_head kv"]:
    """Each query in the columns of its own kv head, zeros elsewhere.

    With 2 query heads over 2 kv heads: [[a, b], [c, d]] becomes [[a, b, 0, 0], [0, 0, c, d]].
    """
    tokens, q_heads, head_dim = q.shape
    grouped = q.reshape(tokens, kv_heads, q_heads // kv_heads, 1, head_dim)
    own = jnp.eye(kv_heads, dtype=bool)[:, None, :, None]
    return jnp.where(own, grouped, jnp.zeros((), q.dtype)).reshape(tokens, q_heads, kv_heads * head_dim)


def _own_kv_head(out: Float[Array, "token q_head kv"], kv_heads: int) -> Float[Array, "token q_head head_dim"]:
    """The columns of each query head's own kv head: the inverse of `_block_diagonal`."""
    tokens, q_heads, width = out.shape
    grouped = out.reshape(tokens, kv_heads, q_heads // kv_heads, kv_heads, width // kv_heads)
    index = jnp.arange(kv_heads)
    own = jnp.moveaxis(grouped[:, index, :, index], 0, 1)
    return own.reshape(tokens, q_heads, width // kv_heads)
