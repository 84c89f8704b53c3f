"""Paged attention in plain JAX: what is always there.

Tokens are taken in tiles of eight. For each tile a loop runs over blocks of keys at absolute positions, up to the
tile's longest sequence, with an online softmax. Each token is one product of fixed shape a block, whatever else is in
the call: its query heads are laid block-diagonally over the kv heads, which lie side by side in the page.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.interface import Attended, check_operands, check_sizes

TILE = 8
"""Tokens of a tile. One token costs what eight do."""
BLOCK = 128
"""Keys of a block, or one page where that is larger."""


@dataclass(frozen=True)
class XlaPagedAttention:
    """Pages are [page_size, kv_heads * head_dim], a token's kv heads side by side."""

    name: str = "xla"

    def cache_shape(self, num_pages: int, page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """[num_pages, page_size, kv_heads * head_dim]."""
        check_sizes(num_pages, page_size, kv_heads, head_dim)
        return (num_pages, page_size, kv_heads * head_dim)

    def write_and_attend(
        self,
        q: Float[Array, "token q_head head_dim"],
        k: Float[Array, "token kv_head head_dim"],
        v: Float[Array, "token kv_head head_dim"],
        k_pages: Float[Array, "page page_size kv"],
        v_pages: Float[Array, "page page_size kv"],
        page_table: Int32[Array, "row max_pages"],
        token_row: Int32[Array, " token"],
        position: Int32[Array, " token"],
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Attended:
        """See `PagedAttention.write_and_attend`."""
        check_operands(q, k, v, k_pages, v_pages, page_table, token_row, position)
        tokens, kv_heads, head_dim = k.shape
        if k_pages.ndim != 3 or k_pages.shape[2] != kv_heads * head_dim:
            raise ValueError(f"the cache must be [page, page_size, {kv_heads * head_dim}], got {k_pages.shape}")
        num_pages, page_size, _ = k_pages.shape
        max_pages = page_table.shape[1]
        table_page = position // page_size
        lives = (token_row >= 0) & (position >= 0) & (table_page < max_pages)
        page = page_table.at[token_row, table_page].get(mode="clip")
        page = jnp.where(lives & (page > 0), page, num_pages)
        offset = position % page_size
        k_pages = k_pages.at[page, offset].set(k.reshape(tokens, -1).astype(k_pages.dtype), mode="drop")
        v_pages = v_pages.at[page, offset].set(v.reshape(tokens, -1).astype(v_pages.dtype), mode="drop")

        padding = -tokens % TILE
        token_row = jnp.pad(jnp.where(lives, token_row, -1), (0, padding), constant_values=-1)
        position = jnp.pad(position, (0, padding))
        queries = _block_diagonal(jnp.pad(q, ((0, padding), (0, 0), (0, 0))).astype(k_pages.dtype), kv_heads)
        pages_per_block = max(1, BLOCK // page_size)
        page_table = jnp.pad(page_table, ((0, 0), (0, -max_pages % pages_per_block)))

        def attend_tile(tile: Array) -> Array:
            start = tile * TILE
            rows = lax.dynamic_slice_in_dim(token_row, start, TILE)
            return _attend_tile(
                lax.dynamic_slice_in_dim(queries, start, TILE),
                k_pages,
                v_pages,
                page_table[jnp.maximum(rows, 0)],
                jnp.where(rows >= 0, lax.dynamic_slice_in_dim(position, start, TILE), -1),
                pages_per_block,
                scale,
                sliding_window,
            )

        out = lax.map(attend_tile, jnp.arange((tokens + padding) // TILE))
        out = _own_kv_head(out.reshape(tokens + padding, *queries.shape[1:]), kv_heads)
        return Attended(out[:tokens].astype(q.dtype), k_pages, v_pages)


def _attend_tile(
    queries: Float[Array, "tile q_head kv"],
    k_pages: Float[Array, "page page_size kv"],
    v_pages: Float[Array, "page page_size kv"],
    page_table: Int32[Array, "tile max_pages"],
    last: Int32[Array, " tile"],
    pages_per_block: int,
    scale: float,
    sliding_window: int | None,
) -> Float[Array, "tile q_head kv"]:
    """Attends from the queries of a tile to positions up to `last`; -1 for a token that attends to none."""
    tile, q_heads, width = queries.shape
    block = pages_per_block * k_pages.shape[1]
    first = jnp.zeros_like(last) if sliding_window is None else jnp.maximum(last - sliding_window + 1, 0)

    def attend_block(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, weighted = carry
        pages = lax.dynamic_slice_in_dim(page_table, number * pages_per_block, pages_per_block, axis=1)
        keys = k_pages.at[pages].get(mode="clip").reshape(tile, block, width)
        values = v_pages.at[pages].get(mode="clip").reshape(tile, block, width)
        key_position = number * block + jnp.arange(block)
        attends = (key_position >= first[:, None]) & (key_position <= last[:, None])
        scores = _batched_product(queries, keys, contract=2) * jnp.float32(scale)
        scores = jnp.where(attends[:, None], scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        # A token with no key so far has -inf - -inf here.
        shift = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
        weights = jnp.exp(scores - shift[..., None])
        rescale = jnp.exp(largest - shift)
        # What lies in a page beyond a sequence's end may be another's garbage, and 0 * NaN is NaN.
        values = jnp.where(attends[..., None], values, jnp.zeros((), values.dtype)).astype(jnp.float32)
        weighted = weighted * rescale[..., None] + _batched_product(weights, values, contract=1)
        return new_largest, total * rescale + weights.sum(axis=-1), weighted

    carry = (
        jnp.full((tile, q_heads), -jnp.inf, jnp.float32),
        jnp.zeros((tile, q_heads), jnp.float32),
        jnp.zeros((tile, q_heads, width), jnp.float32),
    )
    blocks = jnp.max(last) // block + 1
    first_block = jnp.min(jnp.where(last >= 0, first, jnp.iinfo(jnp.int32).max)) // block
    _, total, weighted = lax.fori_loop(first_block, blocks, attend_block, carry)
    return weighted / jnp.where(total == 0.0, 1.0, total)[..., None]


def _batched_product(left: Array, right: Array, *, contract: int) -> Float[Array, "tile q_head out"]:
    """left[tile, q_head, x] times right[tile, ...] over right's axis `contract`, in float32."""
    dimensions = (((2,), (contract,)), ((0,), (0,)))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


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
