"""Sequences of known queries, keys and values, and a cache that they are put through call by call."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import PagedAttention
from pallas_kernels.reference import dense_attention

IMPLEMENTATIONS = ("cpu_native", "cpu_xla")


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention layer and of its cache."""

    q_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "bfloat16"
    sliding_window: int | None = None

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class TokenRange:
    """Tokens of one sequence that a call computes: positions start..end-1. Row -1 masks them."""

    sequence: int
    start: int
    end: int
    row: int


@functools.cache
def compiled_call(attention: PagedAttention, shape: Shape) -> Callable:
    """The jitted call, shared among tests so that each shape is compiled once."""

    def write_and_attend(*operands):
        return attention.write_and_attend(*operands, scale=shape.scale, sliding_window=shape.sliding_window)

    return jax.jit(write_and_attend, donate_argnums=(3, 4))


@dataclass
class PagedSequences:
    """Random sequences of given lengths over a cache, with a page table for each."""

    attention: PagedAttention
    shape: Shape
    lengths: Sequence[int]
    seed: int = 0
    page_seed: int = 0
    """Which pages the sequences get; the same content whatever it is."""
    max_pages: int | None = None
    q: list[np.ndarray] = field(init=False)
    k: list[np.ndarray] = field(init=False)
    v: list[np.ndarray] = field(init=False)

    def __post_init__(self):
        shape, dtype = self.shape, jnp.dtype(self.shape.dtype)
        heads = (shape.q_heads, shape.kv_heads, shape.kv_heads)
        self.q, self.k, self.v = [], [], []
        for number, length in enumerate(self.lengths):
            rng = np.random.default_rng((self.seed, number))
            for to, count in zip((self.q, self.k, self.v), heads, strict=True):
                to.append(rng.standard_normal((length, count, shape.head_dim)).astype(dtype))
        pages = [-(-length // shape.page_size) for length in self.lengths]
        width = self.max_pages or max(pages)
        free = 1 + np.random.default_rng(self.page_seed).permutation(sum(pages) + 3)
        self.tables = np.zeros((len(pages), width), np.int32)
        for number, count in enumerate(pages):
            self.tables[number, :count], free = free[:count], free[count:]
        cache_shape = self.attention.cache_shape(sum(pages) + 4, shape.page_size, shape.kv_heads, shape.head_dim)
        self.k_pages, self.v_pages = jnp.zeros(cache_shape, dtype), jnp.zeros(cache_shape, dtype)

        self._call = compiled_call(self.attention, shape)

    def call(self, *ranges: TokenRange, rows: int | None = None) -> list[np.ndarray]:
        """Computes the ranges in one call. Gives the output of each, [token, q_head, head_dim]."""
        rows = rows or 1 + max(piece.row for piece in ranges)
        table = np.zeros((rows, self.tables.shape[1]), np.int32)
        for piece in ranges:
            if piece.row >= 0:
                table[piece.row] = self.tables[piece.sequence]
        operands = [
            np.concatenate([source[piece.sequence][piece.start : piece.end] for piece in ranges])
            for source in (self.q, self.k, self.v)
        ]
        token_row = np.concatenate([np.full(piece.end - piece.start, piece.row, np.int32) for piece in ranges])
        position = np.concatenate([np.arange(piece.start, piece.end, dtype=np.int32) for piece in ranges])
        out, self.k_pages, self.v_pages = self._call(*operands, self.k_pages, self.v_pages, table, token_row, position)
        ends = np.cumsum([piece.end - piece.start for piece in ranges])
        return np.split(np.asarray(out), ends[:-1])

    def dense(self, piece: TokenRange) -> np.ndarray:
        """What the range's output should be, in float64."""
        end = piece.end
        return dense_attention(
            self.q[piece.sequence][piece.start : end],
            self.k[piece.sequence][:end],
            self.v[piece.sequence][:end],
            scale=self.shape.scale,
            sliding_window=self.shape.sliding_window,
        )


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a part of the largest expected number."""
    return float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())


def bits(array: np.ndarray) -> np.ndarray:
    """The array's bits, so that equality means the same bits."""
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
