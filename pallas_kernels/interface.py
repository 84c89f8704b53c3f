"""The interface that every implementation of attention over the paged cache follows."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.quantized import is_quantized, quantize

CACHE_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")
"""What keys and values may be stored as."""


class LayerCache(NamedTuple):
    """A layer's keys and values; as a layout, of `jax.ShapeDtypeStruct`. Axis 0 of a layer's arrays counts pages."""

    k_pages: Array
    """Keys, arranged as the implementation likes."""
    v_pages: Array | None
    """Values; None where they lie beside the keys in `k_pages`."""
    k_scales: Array | None = None
    """float32, one for each token and kv head; None where the cache is not quantised."""
    v_scales: Array | None = None
    layer: Int32[Array, ""] | None = None
    """Which layer this is of all those that the arrays hold, along a further axis in front; None where they hold one.
    Only for an implementation that says `stacks_layers`."""


class Attended(NamedTuple):
    """What `PagedAttention.write_and_attend` gives."""

    out: Float[Array, "token q_head head_dim"]
    """In the dtype of the queries; zeros for masked tokens."""
    cache: LayerCache
    """The cache that was given, with the keys and values of the call's tokens written."""


@dataclass(frozen=True)
class Scoring:
    """What becomes of the products of queries and keys; see `PagedAttention.write_and_attend`."""

    scale: float
    sliding_window: int | None
    softcap: float | None


@dataclass(frozen=True)
class AttentionNeeds:
    """What an engine will ask of attention beyond the plain: known before an implementation is chosen."""

    kv_dtype: str = "bfloat16"
    """A name of `CACHE_DTYPES`."""
    softcap: bool = False
    sinks: bool = False
    group: int = 1
    """Query heads a kv head."""
    max_pages: int = 1
    """Of a row of the page table."""
    device_kind: str | None = None
    """The device that the program will run on, as JAX names it; None promises one that the implementation is for."""


class PagedAttention(ABC):
    """Attention of tokens over a cache of pages, chosen before tracing by `pallas_kernels.select`.

    A sequence's tokens lie in pages of `page_size` tokens; row r of the page table lists the pages of one sequence in
    order. Page 0 is zero and never written: unused table entries point at it. How a page's content is arranged inside
    is the implementation's own affair, so pages may be copied whole but not interpreted.

    Every implementation promises:

    - All tokens of a call are written first; then each attends to positions 0..position of its own row, or to the last
      `sliding_window` of them.
    - A token's output has the same bits whatever other tokens are in the call, whatever its row, the numbers of its
      pages, the width of the table, the number of threads, and whether it comes alone or within a chunk: the order of
      its sums follows absolute positions alone.
    - The cost follows the live tokens and not the width of the table.
    - Scores, softmax and sums are in float32, whatever the dtype of the cache.
    """

    name: str
    """The name in the table of `pallas_kernels.platforms`."""
    kv_head_axis: int
    """The axis of every array of the cache along which contiguous equal parts are kv heads. Tensor parallelism cuts the
    cache there: a part has the layout of a cache of its own heads."""
    stacks_layers: bool = False
    """Whether it works in place on one layer of a cache that holds all of them, `LayerCache.layer`: a step then has few
    arrays to hand over, which is what costs the host where steps are short."""

    def missing(self, needs: AttentionNeeds) -> str | None:
        """What the implementation lacks of the needs, as the end of a sentence; None where it has all."""
        return None

    @abstractmethod
    def cache_layout(
        self, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> LayerCache:
        """Shapes and dtypes of one layer's cache; a cache begins as zeros.

        Raises:
            ValueError: the implementation does not support these sizes or this dtype; names it and the limit.
        """

    def write_and_attend(
        self,
        q: Float[Array, "token q_head head_dim"],
        k: Float[Array, "token kv_head head_dim"],
        v: Float[Array, "token kv_head head_dim"],
        cache: LayerCache,
        page_table: Int32[Array, "row max_pages"],
        token_row: Int32[Array, " token"],
        position: Int32[Array, " token"],
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Float32[Array, " q_head"] | None = None,
    ) -> Attended:
        """Writes the tokens' keys and values to their pages and attends. Traceable; meant to run with a donated cache.

        The first tokens, as many as the page table has rows, are the decode rows: token t is of row t, or masked. The
        rest are the prompt chunk: pieces one after the other, of one row each and no two of the same, at consecutive
        ascending positions, with masked tokens only at the end. A row has a decode token or a piece, not both. A call
        that is a token a row has no chunk. The page that a decode token goes to is no other row's.

        Args:
            q: queries, rotated and not scaled.
            k: keys, rotated.
            v: values.
            cache: a layer's cache in the layout of `cache_layout`. Updated in place when donated.
            page_table: page numbers of each row's sequence, in order.
            token_row: row of the page table that owns the token; -1 masks the token: nothing written, output zero.
            position: position of the token in its sequence, below max_pages * page_size.
            scale: factor on the scores, usually head_dim**-0.5.
            sliding_window: tokens attended to, the token itself included; None for all.
            softcap: scores s become softcap * tanh(s / softcap), as in Gemma 2 (arXiv 2408.00118); None leaves them.
            sinks: a further score of each query head that takes weight but has no value, as in gpt-oss; neither scaled
                nor capped.

        Raises:
            ValueError: shapes or dtypes do not fit together, or the implementation lacks what is asked (when traced).
        """
        check_operands(q, k, v, page_table, token_row, position, sinks)
        scoring = Scoring(scale, sliding_window, softcap)
        return self._write_and_attend(q, k, v, cache, page_table, token_row, position, scoring, sinks)

    @abstractmethod
    def _write_and_attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: LayerCache,
        page_table: Array,
        token_row: Array,
        position: Array,
        scoring: Scoring,
        sinks: Array | None,
    ) -> Attended:
        """The implementation of `write_and_attend`, for operands that fit together; checks the cache."""


def check_operands(
    q: Array,
    k: Array,
    v: Array,
    page_table: Array,
    token_row: Array,
    position: Array,
    sinks: Array | None,
) -> None:
    """Raises ValueError, with the shapes, where the operands of `write_and_attend` do not fit together."""
    tokens, q_heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[::2] != (tokens, head_dim):
        raise ValueError(f"keys and values of queries {q.shape} must be [{tokens}, kv_head, {head_dim}], got {k.shape}")
    if q_heads % k.shape[1]:
        raise ValueError(f"{q_heads} query heads are not a multiple of {k.shape[1]} kv heads")
    for what, array in (("page_table", page_table), ("token_row", token_row), ("position", position)):
        if array.dtype.name != "int32":
            raise ValueError(f"{what} must be int32, got {array.dtype}")
    if page_table.ndim != 2 or token_row.shape != (tokens,) or position.shape != (tokens,):
        raise ValueError(
            f"{tokens} tokens need a page_table [row, max_pages], token_row and position [{tokens}],"
            f" got {page_table.shape}, {token_row.shape}, {position.shape}"
        )
    if tokens < page_table.shape[0]:
        raise ValueError(f"the first tokens are those of the {page_table.shape[0]} rows, got {tokens} tokens")
    if sinks is not None and (sinks.shape != (q_heads,) or sinks.dtype.name != "float32"):
        raise ValueError(f"sinks must be float32 [{q_heads}], got {sinks.dtype} {sinks.shape}")


def check_cache(cache: LayerCache, layout: LayerCache) -> None:
    """Raises ValueError where a cache does not have the layout of one layer, or each layer of it."""
    front = 0 if cache.layer is None else 1
    for name, array, expected in zip(cache._fields[:-1], cache[:-1], layout[:-1], strict=True):
        found = None if array is None else (array.shape[front:], array.dtype)
        wanted = None if expected is None else (expected.shape, expected.dtype)
        if found != wanted:
            raise ValueError(f"{name} of the cache must be {expected}, got {found}")


def check_sizes(num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> None:
    """Raises ValueError where no implementation could work with these sizes or this dtype."""
    if num_pages < 2:
        raise ValueError(f"num_pages must be at least 2, page 0 being the zero page, got {num_pages}")
    if page_size < 1 or kv_heads < 1:
        raise ValueError(f"page_size and kv_heads must be at least 1, got {page_size} and {kv_heads}")
    if head_dim < 8 or head_dim % 8:
        raise ValueError(f"head_dim must be a multiple of 8, got {head_dim}")
    if jnp.dtype(dtype).name not in CACHE_DTYPES:
        raise ValueError(f"the cache must be {', '.join(CACHE_DTYPES[:-1])} or {CACHE_DTYPES[-1]}, got {dtype}")


def separate_layout(pages: tuple[int, ...], scales: tuple[int, ...], dtype: DTypeLike) -> LayerCache:
    """Keys and values in arrays of their own of shape `pages`; scales of shape `scales` where the dtype has them."""

    def cache() -> LayerCache:
        scale = jnp.zeros(scales, jnp.float32) if is_quantized(dtype) else None
        values = jnp.zeros(pages, dtype)
        return LayerCache(values, values, scale, scale)

    return jax.eval_shape(cache)


def stored_form(k: Array, v: Array, dtype: DTypeLike) -> LayerCache:
    """New keys and values [token, kv_head, head_dim] as a cache of `dtype` holds them, scales [token, kv_head]."""
    if not is_quantized(dtype):
        return LayerCache(k.astype(dtype), v.astype(dtype))
    (keys, k_scales), (values, v_scales) = quantize(k, dtype), quantize(v, dtype)
    return LayerCache(keys, values, k_scales, v_scales)
