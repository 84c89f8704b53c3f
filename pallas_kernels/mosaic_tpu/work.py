"""What a call's kernels have to do, as lists of int32 that they read from scalar memory."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32


class AttendUnits(NamedTuple):
    """Work of the attention kernel: a tile of tokens against the blocks of keys of one row.

    A tile is TILE neighbouring tokens; the units of a tile are neighbours, so its running sums stay in VMEM.
    """

    tile: Int32[Array, " unit"]
    row: Int32[Array, " unit"]
    first_key: Int32[Array, " unit"]
    """The first position that any token of the unit attends to."""
    last_key: Int32[Array, " unit"]
    """The last one; -1 for a unit without work."""
    start: Int32[Array, " unit"]
    """Tokens start..end-1 of the tile are the unit's."""
    end: Int32[Array, " unit"]
    shift: Int32[Array, " unit"]
    """Token t of the tile, one of the unit's, is at position shift + t."""
    opens: Int32[Array, " unit"]
    """1 where the unit is the first of its tile."""
    closes: Int32[Array, " unit"]
    """1 where it is the last."""

    def live_ahead(self) -> Int32[Array, " unit_and_end"]:
        """Of each unit and of what is past the last, the first unit from there on that has work; past the end: none."""
        count = self.tile.shape[0]
        own = jnp.where(self.last_key >= 0, jnp.arange(count, dtype=jnp.int32), count)
        return jnp.append(lax.cummin(own, reverse=True), jnp.int32(count))


class WriteUnits(NamedTuple):
    """Work of the write kernel: a page, and which of its tokens are new."""

    page: Int32[Array, " unit"]
    """No page but page 0, which is nobody's, comes twice."""
    start: Int32[Array, " unit"]
    """Tokens start..end-1 of the page are new; none where start == end."""
    end: Int32[Array, " unit"]


def decode_units(token_row: Array, position: Array, window: int | None) -> AttendUnits:
    """A unit and a tile of one token for each row."""
    row = jnp.arange(token_row.shape[0], dtype=jnp.int32)
    lives = token_row >= 0
    last_key = jnp.where(lives, position, -1)
    ones = jnp.ones_like(row)
    return AttendUnits(
        tile=row,
        row=row,
        first_key=_first_key(last_key, window),
        last_key=last_key,
        start=jnp.zeros_like(row),
        end=lives.astype(jnp.int32),
        shift=last_key,
        opens=ones,
        closes=ones,
    )


def chunk_units(token_row: Array, position: Array, tile: int, rows: int, window: int | None) -> AttendUnits:
    """Units of a chunk whose length is a multiple of `tile`: cut where a tile or a row begins."""
    tokens = token_row.shape[0]
    tiles = tokens // tile
    at, end = _pieces(jnp.arange(tokens) % tile == 0, token_row, min(tokens, tiles + rows))
    used = at < tokens
    at, end = jnp.where(used, at, tokens - tile), jnp.where(used, end, tokens - tile)
    live = used & (token_row[at] >= 0)
    in_tile = at % tile
    first_position = position[at]
    tile_end = jnp.where(used, in_tile + end - at, 0)
    return AttendUnits(
        tile=at // tile,
        row=jnp.maximum(token_row[at], 0),
        first_key=jnp.where(live, _first_key(first_position, window), 0),
        last_key=jnp.where(live, first_position + (end - at) - 1, -1),
        start=in_tile,
        end=tile_end,
        shift=first_position - in_tile,
        opens=(used & (in_tile == 0)).astype(jnp.int32),
        closes=(used & (tile_end == tile)).astype(jnp.int32),
    )


def chunk_writes(
    token_row: Array, position: Array, page_table: Array, page_size: int
) -> tuple[WriteUnits, Int32[Array, "unit page_size"]]:
    """Units of a chunk, and of each token of a unit's page which token of the chunk it is, anything where it is old."""
    tokens, rows = token_row.shape[0], page_table.shape[0]
    at, end = _pieces(position % page_size == 0, token_row, min(tokens, tokens // page_size + 2 * rows + 1))
    used = at < tokens
    source = jnp.minimum(at, tokens - 1)
    live = used & (token_row[source] >= 0)
    page = page_table[jnp.maximum(token_row[source], 0), position[source] // page_size]
    # What has no work stays at the page of the last unit that has: nothing is fetched or written for it.
    last = jnp.maximum(jnp.sum(live) - 1, 0)
    page = jnp.where(live, page, jnp.where(live[0], page[last], 0))
    start = position[source] % page_size
    units = WriteUnits(page, start, jnp.where(live & (page > 0), start + end - at, start))
    return units, jnp.clip(at[:, None] + jnp.arange(page_size) - start[:, None], 0, tokens - 1)


def _first_key(position: Array, window: int | None) -> Array:
    return jnp.zeros_like(position) if window is None else jnp.maximum(position - window + 1, 0)


def _pieces(cut: Bool[Array, " token"], token_row: Array, size: int) -> tuple[Array, Array]:
    """Start and end of the runs of tokens that begin where `cut` says or the row changes; the rest past the end."""
    tokens = token_row.shape[0]
    begins = cut | (token_row != jnp.roll(token_row, 1)) | (jnp.arange(tokens) == 0)
    (at,) = jnp.nonzero(begins, size=size, fill_value=tokens)
    at = at.astype(jnp.int32)
    return at, jnp.append(at[1:], jnp.int32(tokens))
