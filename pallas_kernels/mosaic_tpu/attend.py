"""The attention kernel: tiles of queries against blocks of pages, with the softmax in one pass (FlashAttention, arXiv
2205.14135).

The grid goes over units of work (`work.AttendUnits`). Within a unit a loop takes the blocks of its row, fetched page by
page into a ring of buffers by DMAs that run ahead of it, past the end of the unit into the next ones. What a query sums
follows blocks at absolute positions, so neighbours and the cut of a prompt change no bit; a block that a query sees
nothing of changes nothing in its sums.

Decode rows write their token here too: its page is in VMEM anyway, so that a write kernel's pass over it is saved. Of a
layer of 64 rows, 8 kv heads of 128 and pages of 64 bfloat16 tokens, 32 MiB of traffic become 4, and a launch and the 64
steps of its grid are gone.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.interface import LayerCache, Scoring
from pallas_kernels.mosaic_tpu.layout import LANES, VMEM_LIMIT, PageLayout, in_hbm
from pallas_kernels.mosaic_tpu.page_copies import Ring, Scalars, Writer
from pallas_kernels.mosaic_tpu.work import AttendUnits

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a key that is not seen: finite, so that differences of scores are numbers."""


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
    writes: bool
    """Each unit's last token is new, and written before it is attended to. For tiles of one token."""


def attend(
    q: Float[Array, "tile kv_head query lanes"],
    cache: LayerCache,
    page_table: Int32[Array, "row max_pages"],
    units: AttendUnits,
    kernel: Kernel,
    sinks: Float32[Array, "kv_head query sink_lanes"] | None,
    new: LayerCache | None,
    *,
    interpret: object = False,
) -> tuple[Float[Array, "tile kv_head query lanes"], LayerCache]:
    """What the queries gather, in their dtype, zeros for tokens of no row; and the cache with the new tokens.

    Args:
        q: of each tile and kv head the queries of its group, those of a query head side by side: query i is of token
            i % kernel.tile.
        cache: with the call's tokens already written, but for those in `new`. DONATED where there are some.
        page_table: of the call's rows.
        units: the work.
        kernel: sizes and scoring.
        sinks: as q without tiles, each query's in all lanes.
        new: where the kernel writes, each unit's token [unit, kv_head, 1, lanes], scales [unit, kv_head, 1].
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
    for token in jax.tree.leaves(new):
        in_specs.append(_unit_block(token.shape))
        operands.append(token)
    arrays, structure = jax.tree.flatten(in_hbm(cache))
    anywhere = [pl.BlockSpec(memory_space=pl.ANY)] * len(arrays)
    written = arrays if kernel.writes else []
    first = len(scalars) + len(operands)
    blocks = [(layout.buffers, layout.block_pages, *array.shape[1:]) for array in arrays]
    state = (kv_heads, queries)
    context = page_table.shape[0] * page_table.shape[1] * layout.page_size
    out, *arrays_out = pl.pallas_call(
        partial(_attend_kernel, kernel=kernel, arrays=len(arrays)),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q, *written)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(units.tile.shape[0],),
            in_specs=[*in_specs, *anywhere],
            out_specs=[q_block, *anywhere[: len(written)]],
            scratch_shapes=[
                *[pltpu.VMEM(block, array.dtype) for block, array in zip(blocks, arrays, strict=True)],
                *[pltpu.VMEM(layout.written_part(array.shape), array.dtype) for array in written],
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, lanes), jnp.float32),
                pltpu.SMEM((5,), jnp.int32),
                pltpu.SemaphoreType.DMA((layout.buffers + 1,)),
            ],
        ),
        input_output_aliases={first + number: 1 + number for number in range(len(written))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=4 * kv_heads * queries * lanes * context,
            transcendentals=kv_heads * queries * context,
            bytes_accessed=context * layout.token_bytes + 2 * q.size * q.dtype.itemsize,
        ),
        interpret=interpret,
        name=f"jaxserve_attend_tile_{kernel.tile}",
    )(*scalars, *operands, *arrays)
    return out, jax.tree.unflatten(structure, arrays_out) if kernel.writes else cache


def _unit_block(shape: tuple[int, ...]) -> pl.BlockSpec:
    """Of an array whose axis 0 counts units, the unit's part."""
    return pl.BlockSpec((1, *shape[1:]), lambda unit, *_: (unit, *[0] * (len(shape) - 1)))


def _attend_kernel(*refs, kernel: Kernel, arrays: int):
    layout = kernel.layout
    rest = list(refs)

    def take(count: int):
        taken, rest[:count] = rest[:count], []
        return taken

    written = arrays if kernel.writes else 0
    scalars = Scalars(take(len(AttendUnits._fields) + 2))
    (q_ref,) = take(1)
    sink_ref = take(1)[0] if kernel.has_sinks else None
    new, pages, (out_ref,) = take(written), take(arrays), take(1)
    # Where pages are written they are read by the same name: a race between the two is one that can be seen.
    pages = take(written) or pages
    buffers, parts = take(arrays), take(written)
    largest, total, weighted, cursor, semaphores = rest
    unit, units = pl.program_id(0), scalars.units
    ring = Ring(scalars, layout, kernel.max_pages, pages, buffers, semaphores, cursor)
    writer = Writer(scalars, layout, kernel.max_pages, new, pages, buffers, parts, semaphores, cursor)

    @pl.when(unit == 0)
    def _():
        ring.begin()
        writer.begin()

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
        if kernel.writes:
            writer.write(unit, number, slot)

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

    if kernel.writes:

        @pl.when(unit == units.tile.shape[0] - 1)
        def _():
            writer.end()


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
