"""The attention kernel: tiles of queries against blocks of pages, with the softmax in one pass (FlashAttention, arXiv
2205.14135).

The grid goes over units of work (`work.AttendUnits`). Within a unit a loop takes the blocks of its row, fetched page by
page into a ring of buffers by DMAs that run ahead of it, past the end of the unit into the next ones. What a query sums
follows blocks at absolute positions, so neighbours and the cut of a prompt change no bit; a block that a query sees
nothing of changes nothing in its sums.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.interface import LayerCache
from pallas_kernels.mosaic_tpu.layout import LANES, PageLayout
from pallas_kernels.mosaic_tpu.work import AttendUnits

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a key that is not seen: finite, so that differences of scores are numbers."""
VMEM_LIMIT = 40 << 20


@dataclass(frozen=True)
class Scoring:
    """What becomes of the products of queries and keys; see `PagedAttention.write_and_attend`."""

    scale: float
    sliding_window: int | None
    softcap: float | None


@dataclass(frozen=True)
class Kernel:
    """What is fixed when the kernel is traced."""

    layout: PageLayout
    scoring: Scoring
    tile: int
    """Tokens of a tile, a power of two."""
    max_pages: int
    """Columns of the page table."""
    has_sinks: bool
    compute_dtype: jnp.dtype
    """Of the operands of the products."""


def attend(
    q: Float[Array, "tile kv_head query lanes"],
    cache: LayerCache,
    page_table: Int32[Array, "row max_pages"],
    units: AttendUnits,
    kernel: Kernel,
    sinks: Float32[Array, "kv_head query sink_lanes"] | None,
    *,
    interpret: object = False,
) -> Float[Array, "tile kv_head query lanes"]:
    """What the queries gather, in their dtype; zeros for tokens of no row.

    Args:
        q: of each tile and kv head the queries of its group, those of a query head side by side: query i is of token
            i % kernel.tile.
        cache: with the call's tokens already written.
        page_table: of the call's rows.
        units: the work.
        kernel: sizes and scoring.
        sinks: as q without tiles, each query's in all lanes.
        interpret: as of `pl.pallas_call`.
    """
    layout = kernel.layout
    _, kv_heads, queries, lanes = q.shape
    scalars = (*units, units.live_ahead(), page_table.reshape(-1))
    q_block = pl.BlockSpec((1, kv_heads, queries, lanes), lambda unit, tile, *_: (tile[unit], 0, 0, 0))
    in_specs, operands = [q_block], [q]
    if sinks is not None:
        in_specs.append(pl.BlockSpec(sinks.shape, lambda unit, *_: (0, 0, 0)))
        operands.append(sinks)
    arrays = jax.tree.leaves(cache)
    blocks = [(layout.buffers, layout.block_pages, *array.shape[1:]) for array in arrays]
    state = (kv_heads, queries)
    context = page_table.shape[0] * page_table.shape[1] * layout.page_size
    return pl.pallas_call(
        partial(_attend_kernel, kernel=kernel, arrays=len(arrays)),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(units.tile.shape[0],),
            in_specs=[*in_specs, *[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays)],
            out_specs=q_block,
            scratch_shapes=[
                *[pltpu.VMEM(block, array.dtype) for block, array in zip(blocks, arrays, strict=True)],
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, lanes), jnp.float32),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.SemaphoreType.DMA((layout.buffers,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=4 * kv_heads * queries * lanes * context,
            transcendentals=kv_heads * queries * context,
            bytes_accessed=context * layout.token_bytes + 2 * q.size * q.dtype.itemsize,
        ),
        interpret=interpret,
        name=f"jaxserve_attend_tile_{kernel.tile}",
    )(*scalars, *operands, *arrays)


class _Scalars:
    """The operands in scalar memory."""

    def __init__(self, refs):
        *units, self.live_ahead, self.table = refs
        self.units = AttendUnits(*units)


def _attend_kernel(*refs, kernel: Kernel, arrays: int):
    layout = kernel.layout
    count = len(AttendUnits._fields) + 2
    scalars, refs = _Scalars(refs[:count]), refs[count:]
    q_ref, refs = refs[0], refs[1:]
    sink_ref, refs = (refs[0], refs[1:]) if kernel.has_sinks else (None, refs)
    pages, out_ref, refs = refs[:arrays], refs[arrays], refs[arrays + 1 :]
    buffers, (largest, total, weighted, cursor, arrived) = refs[:arrays], refs[arrays:]
    unit, units = pl.program_id(0), scalars.units
    ring = _Ring(scalars, kernel, pages, buffers, arrived, cursor)

    @pl.when(unit == 0)
    def _():
        ring.begin()

    @pl.when(units.opens[unit] == 1)
    def _():
        # A sink is a score whose value is zero.
        largest[...] = jnp.full(largest.shape, MASKED, jnp.float32) if sink_ref is None else sink_ref[...]
        total[...] = jnp.full(total.shape, 0.0 if sink_ref is None else 1.0, jnp.float32)
        weighted[...] = jnp.zeros(weighted.shape, jnp.float32)

    first, last = units.first_key[unit], units.last_key[unit]

    def attend_block(number, _):
        slot = ring.take(unit, number)
        block = [buffer.at[slot] for buffer in buffers]
        start = number * layout.block

        @pl.when((start < first) | (start + layout.block - 1 > last))
        def _():
            _clear_values(block[0] if layout.shared else block[1], start, first, last)

        _attend_block(kernel, q_ref, block, start, unit, units, (largest, total, weighted))
        return 0

    @pl.when(last >= 0)
    def _():
        lax.fori_loop(first // layout.block, last // layout.block + 1, attend_block, 0)

    @pl.when(units.closes[unit] == 1)
    def _():
        tokens = jnp.where(last >= 0, units.end[unit], units.start[unit])
        lives = _token(weighted.shape, kernel.tile, axis=1) < tokens
        whole = total[...][:, :, :1]
        out = weighted[...] / jnp.where(whole == 0.0, 1.0, whole)
        out_ref[0] = jnp.where(lives, out, 0.0).astype(out_ref.dtype)


class _Ring:
    """Blocks of pages on their way from the cache into VMEM, in the order in which the units use them."""

    def __init__(self, scalars, kernel: Kernel, pages, buffers, arrived, cursor):
        self.scalars, self.layout, self.max_pages = scalars, kernel.layout, kernel.max_pages
        self.pages, self.buffers, self.arrived = pages, buffers, arrived
        self.count = scalars.units.tile.shape[0]
        self.cursor = cursor
        """The unit and the block to fetch next, how many were fetched and how many were used."""

    def begin(self):
        """Fetches the first blocks, one less than there are buffers."""
        self.cursor[2], self.cursor[3] = 0, 0
        self._aim_from(0)

        def fetch(_, carry):
            self._fetch_next()
            return carry

        lax.fori_loop(0, self.layout.buffers - 1, fetch, 0)

    def take(self, unit, number):
        """The buffer with block `number` of the unit, arrived; fetches one more into the buffer that was used last."""
        self._fetch_next()
        used = self.cursor[3]
        slot = lax.rem(used, self.layout.buffers)
        self._await(unit, number, slot)
        self.cursor[3] = used + 1
        return slot

    def _await(self, unit, number, slot):
        self._each_page(unit, number, slot, lambda copy: copy.wait())

    def _aim_from(self, unit):
        """What is fetched next is the first block of the first unit from this one on that has work."""
        live = self.scalars.live_ahead[unit]
        self.cursor[0] = live
        first_key = self.scalars.units.first_key[jnp.minimum(live, self.count - 1)]
        self.cursor[1] = first_key // self.layout.block

    def _fetch_next(self):
        unit, number, fetched = self.cursor[0], self.cursor[1], self.cursor[2]

        @pl.when(unit < self.count)
        def _():
            self._each_page(unit, number, lax.rem(fetched, self.layout.buffers), lambda copy: copy.start())
            self.cursor[1], self.cursor[2] = number + 1, fetched + 1

            @pl.when(number == self.scalars.units.last_key[unit] // self.layout.block)
            def _():
                self._aim_from(unit + 1)

    def _each_page(self, unit, number, slot, act):
        """Applies `act` to the copies of a block's pages, those alone that the unit sees a token of."""
        units, layout = self.scalars.units, self.layout
        start = number * layout.block_pages
        begin = jnp.maximum(units.first_key[unit] // layout.page_size - start, 0)
        end = jnp.minimum(units.last_key[unit] // layout.page_size - start + 1, layout.block_pages)
        columns = units.row[unit] * self.max_pages + start

        def each(index, _):
            page = self.scalars.table[columns + index]
            for array, buffer in zip(self.pages, self.buffers, strict=True):
                act(pltpu.make_async_copy(array.at[page], buffer.at[slot, index], self.arrived.at[slot]))
            return 0

        lax.fori_loop(begin, end, each, 0)


def _token(shape: tuple[int, ...], tile: int, axis: int) -> Array:
    """Of each query along an axis, which token of the tile it is of."""
    return lax.broadcasted_iota(jnp.int32, shape, axis) & (tile - 1)


def _clear_values(values, start, first, last):
    """Zeroes the values of keys that nobody of the unit sees: a weight of zero does not undo a NaN."""
    pages, _, page_size, _ = values.shape

    def clear(page, carry):
        at = start + page * page_size + lax.broadcasted_iota(jnp.int32, values.shape[1:], 1)
        kept = values[page].astype(jnp.float32)
        values[page] = jnp.where((at >= first) & (at <= last), kept, 0.0).astype(values.dtype)
        return carry

    lax.fori_loop(0, pages, clear, 0)


def _seen(kernel: Kernel, key: Array, unit, units: AttendUnits) -> Array:
    """Which keys [query, key] the queries of a unit attend to."""
    token = _token(key.shape, kernel.tile, axis=0)
    position = units.shift[unit] + token
    seen = (key <= position) & (token >= units.start[unit]) & (token < units.end[unit])
    window = kernel.scoring.sliding_window
    return seen if window is None else seen & (key > position - window)


def _attend_block(kernel: Kernel, q_ref, block, start, unit, units: AttendUnits, state):
    """Adds a block of keys to the running sums of all heads."""
    layout, scoring = kernel.layout, kernel.scoring
    largest, total, weighted = state
    keys, values = block[0], block[0 if layout.shared else 1]
    k_scales, v_scales = block[-2:] if layout.quantized else (None, None)
    queries, size = q_ref.shape[2], layout.block
    key = start + lax.broadcasted_iota(jnp.int32, (queries, size), 1)
    seen = _seen(kernel, key, unit, units)
    exists = (key[:1] >= units.first_key[unit]) & (key[:1] <= units.last_key[unit])
    product = partial(
        lax.dot_general,
        precision=lax.Precision.HIGHEST if kernel.compute_dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    for head in range(layout.kv_heads):
        k = _head(keys, head, size, kernel.compute_dtype)
        v = _head(values, head, size, kernel.compute_dtype)
        scores = product(q_ref[0, head].astype(kernel.compute_dtype), k, (((1,), (1,)), ((), ()))) * scoring.scale
        if k_scales is not None:
            scores *= _head_scales(k_scales, head, layout)
        if scoring.softcap is not None:
            scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
        scores = jnp.where(seen, scores, MASKED)
        before = largest[head]
        after = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - after[:, :1])
        rescale = jnp.exp(before - after)
        largest[head] = after
        total[head] = total[head] * rescale + jnp.sum(weights, axis=1, keepdims=True)
        if v_scales is not None:
            weights *= jnp.where(exists, _head_scales(v_scales, head, layout), 0.0)
        gathered = product(weights.astype(kernel.compute_dtype), v, (((1,), (0,)), ((), ())))
        weighted[head] = weighted[head] * rescale[:, :1] + gathered


def _head(pages, head: int, size: int, dtype) -> Array:
    """A head's keys or values [token, lanes] out of a block's pages; 8-bit ones are exact in `dtype`."""
    return pages[:, head].astype(dtype).reshape(size, pages.shape[-1])


def _head_scales(scales, head: int, layout: PageLayout) -> Array:
    """A head's scales [1, token] out of a block's pages."""
    return jnp.concatenate(
        [scales[page, head : head + 1, : layout.page_size] for page in range(layout.block_pages)], axis=1
    )
