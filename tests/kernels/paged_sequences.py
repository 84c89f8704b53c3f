"""Sequences of known queries, keys and values, and a cache that they are put through call by call."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import PagedAttention
from pallas_kernels.quantized import is_quantized, quantize
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
    kv_dtype: str | None = None
    """Of the cache; None takes `dtype`."""
    softcap: float | None = None
    sinks: bool = False

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class TokenRange:
    """Tokens of one sequence that a call computes: positions start..end-1."""

    sequence: int
    start: int
    end: int
    row: int
    """-1 masks them."""
    in_chunk: bool = False
    """A single token goes to its decode row, unless it is to be a piece of the chunk."""

    @property
    def decodes(self) -> bool:
        return self.end - self.start == 1 and self.row >= 0 and not self.in_chunk


@functools.cache
def compiled_call(attention: PagedAttention, shape: Shape) -> Callable:
    """The jitted call, shared among tests so that each shape is compiled once."""

    def write_and_attend(*operands, sinks):
        return attention.write_and_attend(
            *operands,
            scale=shape.scale,
            sliding_window=shape.sliding_window,
            softcap=shape.softcap,
            sinks=sinks,
        )

    return jax.jit(write_and_attend, donate_argnums=3)


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
        layout = self.attention.cache_layout(
            sum(pages) + 4, shape.page_size, shape.kv_heads, shape.head_dim, shape.kv_dtype or shape.dtype
        )
        self.cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layout)
        rng = np.random.default_rng(self.seed)
        self.sinks = rng.standard_normal(shape.q_heads).astype(np.float32) if shape.sinks else None
        self._call = compiled_call(self.attention, shape)

    def call(self, *ranges: TokenRange, rows: int | None = None) -> list[np.ndarray]:
        """Computes the ranges in one call. Gives the output of each, [token, q_head, head_dim].

        Single tokens are decode rows, the rest make the chunk, in the order given, masked ones last.
        """
        rows = rows or 1 + max(piece.row for piece in ranges)
        table = np.zeros((rows, self.tables.shape[1]), np.int32)
        token_row, position = [np.full(rows, fill, np.int32) for fill in (-1, 0)]
        index = [np.zeros((rows, 2), np.int64)]
        places: dict[TokenRange, np.ndarray] = {}
        for piece in ranges:
            if piece.row >= 0:
                table[piece.row] = self.tables[piece.sequence]
            if piece.decodes:
                token_row[piece.row], position[piece.row] = piece.row, piece.start
                index[0][piece.row] = piece.sequence, piece.start
                places[piece] = np.array([piece.row])
        for piece in sorted((p for p in ranges if not p.decodes), key=lambda piece: piece.row < 0):
            at = np.arange(piece.start, piece.end, dtype=np.int32)
            places[piece] = len(position) + np.arange(len(at))
            token_row = np.append(token_row, np.full(len(at), piece.row, np.int32))
            position = np.append(position, at)
            index.append(np.stack([np.full(len(at), piece.sequence), at], axis=1))
        q, k, v = (
            np.stack([source[sequence][at] for sequence, at in np.concatenate(index)])
            for source in (self.q, self.k, self.v)
        )
        out, self.cache = self._call(q, k, v, self.cache, table, token_row, position, sinks=self.sinks)
        return [np.asarray(out)[places[piece]] for piece in ranges]

    def dense(self, piece: TokenRange) -> np.ndarray:
        """What the range's output should be, in float64; of a quantised cache, over what it holds."""
        end, kv_dtype = piece.end, self.shape.kv_dtype or self.shape.dtype
        keys, values = self.k[piece.sequence][:end], self.v[piece.sequence][:end]
        if is_quantized(kv_dtype):
            keys, values = (dequantized(array, kv_dtype) for array in (keys, values))
        return dense_attention(
            self.q[piece.sequence][piece.start : end],
            keys,
            values,
            scale=self.shape.scale,
            sliding_window=self.shape.sliding_window,
            softcap=self.shape.softcap,
            sinks=self.sinks,
        )


def dequantized(x: np.ndarray, dtype: str) -> np.ndarray:
    """What a cache of this dtype holds of x, in float64."""
    values, scales = quantize(jnp.asarray(x), dtype)
    return np.asarray(values).astype(np.float64) * np.asarray(scales, np.float64)[..., None]


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a part of the largest expected number."""
    return float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())


def bits(array: np.ndarray) -> np.ndarray:
    """The array's bits, so that equality means the same bits."""
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
