"""Naive dense attention: what the kernels are measured against. Slow, and plain enough to be read as the definition."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.interface import (
    Attended,
    LayerCache,
    PagedAttention,
    check_cache,
    check_sizes,
    separate_layout,
    stored_form,
)

BLOCK = 256
"""Tokens whose scores dense attention holds at once."""


def dense_attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Causal attention of one sequence on the host, in float64.

    Args:
        q: [token, q_head, head_dim], the last tokens of the sequence.
        keys: [context, kv_head, head_dim], all tokens of the sequence.
        values: as keys.
        scale: factor on the scores.
        sliding_window: tokens attended to, the token itself included; None for all.
        softcap: bound of the scores; None for none.
        sinks: [q_head], a score of each head without a value; None for none.

    Returns:
        float64 [token, q_head, head_dim].
    """
    q, keys, values = (np.asarray(array, np.float64) for array in (q, keys, values))
    tokens, context, kv_heads, window = q.shape[0], keys.shape[0], keys.shape[1], sliding_window or keys.shape[0]
    sink = -np.inf if sinks is None else np.asarray(sinks, np.float64).reshape(kv_heads, -1, 1, 1)
    out = np.empty(q.shape)
    # Blocks of tokens, each over the keys that one of its tokens sees.
    for start in range(0, tokens, BLOCK):
        block = slice(start, min(start + BLOCK, tokens))
        position = np.arange(context - tokens, context)[block]
        held = slice(max(0, position[0] - window + 1), position[-1] + 1)
        # [kv_head, group, token, head_dim] and [kv_head, 1, token, head_dim]: products of matrices, which BLAS has.
        grouped = q[block].reshape(len(position), kv_heads, -1, q.shape[2]).transpose(1, 2, 0, 3)
        k, v = (array[held].transpose(1, 0, 2)[:, None] for array in (keys, values))
        scores = grouped @ k.swapaxes(2, 3) * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        age = position[:, None] - np.arange(context)[held]
        scores = np.where((age >= 0) & (age < window), scores, -np.inf)
        largest = np.maximum(scores.max(axis=-1, keepdims=True), sink)
        weights = np.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(sink - largest)
        out[block] = (weights / total @ v).transpose(2, 0, 1, 3).reshape(out[block].shape)
    return out


@dataclass(frozen=True)
class ReferencePagedAttention(PagedAttention):
    """Gathers every row's whole table and attends densely, in float32.

    Its cost follows the width of the table: for tests and for finding faults in other implementations. Of the promises
    of `PagedAttention` it does not keep the one about bits.
    """

    name: str = "reference"
    kv_head_axis: int = 2

    def cache_layout(
        self, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> LayerCache:
        """Keys and values [num_pages, page_size, kv_heads, head_dim], scales the same without head_dim."""
        check_sizes(num_pages, page_size, kv_heads, head_dim, dtype)
        tokens = (num_pages, page_size, kv_heads)
        return separate_layout((*tokens, head_dim), tokens, dtype)

    def _write_and_attend(self, q, k, v, cache, page_table, token_row, position, scoring, sinks) -> Attended:
        num_pages, page_size = cache.k_pages.shape[:2]
        layout = self.cache_layout(num_pages, page_size, k.shape[1], k.shape[2], cache.k_pages.dtype)
        check_cache(cache, layout)
        tokens, q_heads, head_dim = q.shape
        kv_heads, context = k.shape[1], page_table.shape[1] * page_size
        table = page_table[jnp.maximum(token_row, 0)]
        page = jnp.take_along_axis(table, position[:, None] // page_size, axis=1, mode="clip")[:, 0]
        page = jnp.where((token_row >= 0) & (page > 0), page, num_pages)
        written = stored_form(k, v, cache.k_pages.dtype)
        offset = position % page_size
        cache = jax.tree.map(lambda array, new: array.at[page, offset].set(new, mode="drop"), cache, written)

        assert cache.v_pages is not None
        keys, values = (
            array[table].reshape(tokens, context, kv_heads, head_dim).astype(jnp.float32)
            for array in (cache.k_pages, cache.v_pages)
        )
        if cache.k_scales is not None:
            assert cache.v_scales is not None
            keys = keys * cache.k_scales[table].reshape(tokens, context, kv_heads, 1)
            values = values * cache.v_scales[table].reshape(tokens, context, kv_heads, 1)
        grouped = q.reshape(tokens, kv_heads, q_heads // kv_heads, head_dim).astype(jnp.float32)
        age = position[:, None] - jnp.arange(context)
        seen = (age >= 0) & (age < (scoring.sliding_window or context)) & (token_row >= 0)[:, None]
        scores = jnp.einsum("tkgd,tckd->tkgc", grouped, keys) * scoring.scale
        if (softcap := scoring.softcap) is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        largest = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
        sink = None if sinks is None else sinks.reshape(1, kv_heads, -1, 1)
        largest = largest if sink is None else jnp.maximum(largest, sink)
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True) + (0.0 if sink is None else jnp.exp(sink - largest))
        weights = weights / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        out = jnp.einsum("tkgc,tckd->tkgd", weights, jnp.where(seen[..., None, None], values, 0.0))
        return Attended(out.reshape(q.shape).astype(q.dtype), cache)
