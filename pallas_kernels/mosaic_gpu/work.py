"""What there is to do in a call, as lists that the kernels walk: cost follows the live tokens.

Computed by XLA from the rows and positions of the tokens. They are the same for each layer, so XLA computes them once
a step.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from pallas_kernels.mosaic_gpu.products import Ref

FIRST_SPLIT = 256
"""Keys of a split up to position 4,096; from there splits double with the position, eight from each power of two to
the next, which bounds both the partial results of a long context and the work of one split."""
_EQUAL_SPLITS = 16


def split_starts(max_context: int) -> np.ndarray:
    """Positions, int32 and ascending, at which the splits of a sequence start, and one past the end of the last.

    They depend on the position alone: a longer table only appends to them.
    """
    starts = [0]
    while starts[-1] < max_context:
        octave = max(0, (len(starts) - 1) // 8 - _EQUAL_SPLITS // 8 + 1)
        starts.append(starts[-1] + (FIRST_SPLIT << octave))
    return np.asarray(starts, np.int32)


class DecodeWork(NamedTuple):
    """Splits of the rows' contexts, unit by unit, row by row: int32 [unit] each, arrays or a kernel's references."""

    units: Ref
    """[1], how many live; those behind them mean nothing."""
    row: Ref
    begin: Ref
    """First position that the unit attends to."""
    end: Ref
    """One past the last."""
    newest: Ref
    """Position of the row's own token in the unit that has it, and -1 in others: its key and value are not in the pages
    yet."""


def decode_work(
    token_row: Int32[Array, " row"], position: Int32[Array, " row"], max_context: int, sliding_window: int | None
) -> tuple[DecodeWork, Int32[Array, " row_and_end"]]:
    """The units of decode rows, and the first unit of each row, then their number. A masked row has none."""
    starts = split_starts(max_context)
    length = jnp.where(token_row >= 0, jnp.minimum(position + 1, max_context), 0)
    oldest = jnp.zeros_like(length) if sliding_window is None else jnp.maximum(length - sliding_window, 0)
    first = jnp.sum(starts[1:-1] <= oldest[:, None], axis=1, dtype=jnp.int32)
    splits = jnp.sum(starts[:-1] < length[:, None], axis=1, dtype=jnp.int32) - first
    splits = jnp.where(length > 0, splits, 0)
    ends = jnp.cumsum(splits, dtype=jnp.int32)
    unit = jnp.arange(length.shape[0] * (len(starts) - 1), dtype=jnp.int32)
    row = jnp.sum(ends <= unit[:, None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, length.shape[0] - 1)
    split = jnp.clip(first[row] + unit - (ends - splits)[row], 0, len(starts) - 2)
    bounds = jnp.asarray(starts)
    begin = jnp.maximum(bounds[split], oldest[row])
    end = jnp.minimum(bounds[split + 1], length[row])
    newest = jnp.where(end == position[row] + 1, position[row], -1)
    return DecodeWork(ends[-1:], row, begin, end, newest), jnp.concatenate([ends - splits, ends[-1:]])


class ChunkWork(NamedTuple):
    """Runs of neighbouring tokens of one row, of at most a given length: int32 [unit] each, arrays or references."""

    units: Ref
    """[1], how many live; those behind them mean nothing."""
    row: Ref
    position: Ref
    """Of the unit's first token; the others follow."""
    tokens: Ref


class ChunkPlaces(NamedTuple):
    """Where the chunk's tokens are in the units, and the other way."""

    first_token: Int32[Array, " unit"]
    """Index in the chunk of the unit's first token."""
    unit: Int32[Array, " token"]
    """Of each token of the chunk; of a masked one, any."""
    before: Int32[Array, " token"]
    """Tokens of the unit that come before it."""


def chunk_work(
    token_row: Int32[Array, " token"], position: Int32[Array, " token"], rows: int, tokens_per_unit: int
) -> tuple[ChunkWork, ChunkPlaces]:
    """The units of a chunk: pieces of rows, one piece a row, masked only at the end."""
    size = token_row.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    lives = token_row >= 0
    starts = lives & (token_row != jnp.concatenate([jnp.full((1,), -1, jnp.int32), token_row[:-1]]))
    piece = lax.cummax(jnp.where(starts, index, 0))
    boundary = jnp.where(starts | ~lives, index, size)
    piece_end = lax.cummin(jnp.concatenate([boundary[1:], jnp.full((1,), size, jnp.int32)]), reverse=True)
    before = (index - piece) % tokens_per_unit
    leads = lives & (before == 0)
    units = min(size, size // tokens_per_unit + rows)
    (first,) = jnp.nonzero(leads, size=units, fill_value=0)
    first = first.astype(jnp.int32)
    tokens = jnp.minimum(piece_end[first] - first, tokens_per_unit)
    unit = jnp.maximum(jnp.cumsum(leads, dtype=jnp.int32) - 1, 0)
    live = jnp.sum(leads, dtype=jnp.int32)[None]
    work = ChunkWork(live, jnp.maximum(token_row[first], 0), position[first], tokens)
    return work, ChunkPlaces(first, unit, before)
