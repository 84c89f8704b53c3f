"""The interface that every implementation of attention over the paged cache follows."""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int32


class Attended(NamedTuple):
    """What `PagedAttention.write_and_attend` gives."""

    out: Float[Array, "token q_head head_dim"]
    """In the dtype of the queries; zeros for masked tokens."""
    k_pages: Array
    """The cache that was given, with the keys of the call's tokens written."""
    v_pages: Array


@runtime_checkable
@runtime_checkable
class PagedAttention(Protocol):
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
    - Arithmetic and softmax are in float32, whatever the dtype of the cache.
    """

    @property
    def name(self) -> str:
        """The name in the table of `pallas_kernels.platforms`."""
        ...

    def cache_shape(self, num_pages: int, page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Shape of one layer's array of keys, and of its array of values. Axis 0 counts pages.

        Raises:
            ValueError: the implementation does not support these sizes; names the size and the limit.
        """
        ...

    def write_and_attend(
        self,
        q: Float[Array, "token q_head head_dim"],
        k: Float[Array, "token kv_head head_dim"],
        v: Float[Array, "token kv_head head_dim"],
        k_pages: Array,
        v_pages: Array,
        page_table: Int32[Array, "row max_pages"],
        token_row: Int32[Array, " token"],
        position: Int32[Array, " token"],
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Attended:
        """Writes the tokens' keys and values to their pages and attends. Traceable; meant to run with a donated cache.

        Args:
            q: queries, rotated and not scaled.
            k: keys, rotated.
            v: values.
            k_pages: a layer's keys, bfloat16 or float32, in the shape of `cache_shape`. Updated in place when donated.
            v_pages: a layer's values.
            page_table: page numbers of each row's sequence, in order.
            token_row: row of the page table that owns the token; -1 masks the token: nothing written, output zero.
                Decode tokens (one a row) come first, then chunks: neighbouring tokens of one row at ascending
                positions. Any order is right; this one is fast.
            position: position of the token in its sequence, below max_pages * page_size.
            scale: factor on the scores, usually head_dim**-0.5.
            sliding_window: tokens attended to, the token itself included; None for all.

        Raises:
            ValueError: shapes or dtypes do not fit together (when traced).
        """
        ...


def check_operands(
    q: Array, k: Array, v: Array, k_pages: Array, v_pages: Array, page_table: Array, token_row: Array, position: Array
) -> None:
    """Raises ValueError, with the shapes, where the operands of `write_and_attend` do not fit together."""
    tokens, q_heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[::2] != (tokens, head_dim):
        raise ValueError(f"keys and values of queries {q.shape} must be [{tokens}, kv_head, {head_dim}], got {k.shape}")
    if q_heads % k.shape[1]:
        raise ValueError(f"{q_heads} query heads are not a multiple of {k.shape[1]} kv heads")
    if k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            f"the caches of keys and values differ: {k_pages.shape} {k_pages.dtype}, {v_pages.shape} {v_pages.dtype}"
        )
    if k_pages.dtype.name not in ("bfloat16", "float32"):
        raise ValueError(f"the cache must be bfloat16 or float32, got {k_pages.dtype}")
    for what, array in (("page_table", page_table), ("token_row", token_row), ("position", position)):
        if array.dtype.name != "int32":
            raise ValueError(f"{what} must be int32, got {array.dtype}")
    if page_table.ndim != 2 or token_row.shape != (tokens,) or position.shape != (tokens,):
        raise ValueError(
            f"{tokens} tokens need a page_table [row, max_pages], token_row and position [{tokens}],"
            f" got {page_table.shape}, {token_row.shape}, {position.shape}"
        )


def check_sizes(num_pages: int, page_size: int, kv_heads: int, head_dim: int) -> None:
    """Raises ValueError where no implementation could work with these sizes."""
    if num_pages < 2:
        raise ValueError(f"num_pages must be at least 2, page 0 being the zero page, got {num_pages}")
    if page_size < 1 or kv_heads < 1:
        raise ValueError(f"page_size and kv_heads must be at least 1, got {page_size} and {kv_heads}")
    if head_dim < 8 or head_dim % 8:
        raise ValueError(f"head_dim must be a multiple of 8, got {head_dim}")
