"""Naive dense attention: what the kernels are measured against. Slow, and plain enough to be read as the definition."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.interface import Attended, check_operands, check_sizes


def dense_attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, *, scale: float, sliding_window: int | None = None
) -> np.ndarray:
    """Causal attention of one sequence on the host, in float64.

    Args:
        q: [token, q_head, head_dim], the last tokens of the sequence.
        keys: [context, kv_head, head_dim], all tokens of the sequence.
        values: as keys.
        scale: factor on the scores.
        sliding_window: tokens attended to, the token itself included; None for all.

    Returns:
        float64 [token, q_head, head_dim].
    """
    q, keys, values = (np.asarray(array, np.float64) for array in (q, keys, values))
    tokens, context, group = q.shape[0], keys.shape[0], q.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = np.einsum("thd,chd->htc", q, keys) * scale
    age = np.arange(context - tokens, context)[:, None] - np.arange(context)[None]
    seen = (age >= 0) & (age < (sliding_window or context + 1))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("htc,chd->thd", weights / weights.sum(axis=-1, keepdims=True), values)


@dataclass(frozen=True)
class ReferencePagedAttention:
    """Gathers every row's whole table and attends densely, in float32.

    Its cost follows the width of the table: for tests and for finding faults in other implementations. Of the promises
    of `PagedAttention` it does not keep the one about bits.
    """

    name: str = "reference"

    def cache_shape(self, num_pages: int, page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """[num_pages, page_size, kv_heads, head_dim]."""
        check_sizes(num_pages, page_size, kv_heads, head_dim)
        return (num_pages, page_size, kv_heads, head_dim)

    def write_and_attend(
        self,
        q: Float[Array, "token q_head head_dim"],
        k: Float[Array, "token kv_head head_dim"],
        v: Float[Array, "token kv_head head_dim"],
        k_pages: Float[Array, "page page_size kv_head head_dim"],
        v_pages: Float[Array, "page page_size kv_head head_dim"],
        page_table: Int32[Array, "row max_pages"],
        token_row: Int32[Array, " token"],
        position: Int32[Array, " token"],
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Attended:
        """See `PagedAttention.write_and_attend`."""
        check_operands(q, k, v, k_pages, v_pages, page_table, token_row, position)
        if k_pages.ndim != 4 or k_pages.shape[2:] != k.shape[1:]:
            raise ValueError(f"the cache must be [page, page_size, {k.shape[1]}, {k.shape[2]}], got {k_pages.shape}")
        num_pages, page_size, kv_heads, head_dim = k_pages.shape
        tokens, q_heads, _ = q.shape
        context = page_table.shape[1] * page_size
        table = page_table[jnp.maximum(token_row, 0)]
        page = jnp.take_along_axis(table, position[:, None] // page_size, axis=1, mode="clip")[:, 0]
        page = jnp.where((token_row >= 0) & (page > 0), page, num_pages)
        k_pages = k_pages.at[page, position % page_size].set(k.astype(k_pages.dtype), mode="drop")
        v_pages = v_pages.at[page, position % page_size].set(v.astype(v_pages.dtype), mode="drop")

        keys, values = (
            pages[table].reshape(tokens, context, kv_heads, head_dim).astype(jnp.float32)
            for pages in (k_pages, v_pages)
        )
        grouped = q.reshape(tokens, kv_heads, q_heads // kv_heads, head_dim).astype(jnp.float32)
        age = position[:, None] - jnp.arange(context)
        seen = (age >= 0) & (age < (sliding_window or context)) & (token_row >= 0)[:, None]
        scores = jnp.where(seen[:, None, None], jnp.einsum("tkgd,tckd->tkgc", grouped, keys) * scale, -jnp.inf)
        weights = jnp.exp(scores - jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min))
        weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        out = jnp.einsum("tkgc,tckd->tkgd", weights, jnp.where(seen[..., None, None], values, 0.0))
        return Attended(out.reshape(q.shape).astype(q.dtype), k_pages, v_pages)
