"""Decode attention on Hopper: one query a row over its pages, in splits, and the splits put together.

Memory bound, so all is arranged for bytes in flight. A persistent grid walks the live units (a split of one row, one kv
head). In each block of threads a producer warpgroup keeps a ring of shared memory full through the copy engine, running
ahead into the next unit, and a consumer warpgroup attends. Products are transposed, keys x queries and then values x
weights: the 64 rows of a wgmma tile are keys and head dims, of which there are plenty, and the few query heads of a
group are its 8 columns, so little of the tile is wasted.

The softmax is online within a split (Milakov and Gimelshein, arXiv 1805.02867) and the splits are combined in
ascending order (Flash-Decoding): splits lie at fixed absolute positions, so a row's bits depend on nothing else.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.interface import Scoring
from pallas_kernels.mosaic_gpu.combine import Partial
from pallas_kernels.mosaic_gpu.geometry import BLOCK, SHARED_BYTES, Geometry, tiled
from pallas_kernels.mosaic_gpu.grid import GRID_AXIS, MULTIPROCESSORS, for_each_unit
from pallas_kernels.mosaic_gpu.products import Product, Ref, to_bfloat16
from pallas_kernels.mosaic_gpu.ring import Pages, Ring, column_tiles, transfer, wait_for_last
from pallas_kernels.mosaic_gpu.scores import LOWEST, scores_of
from pallas_kernels.mosaic_gpu.work import DecodeWork

_CONSUMER, _PRODUCER = 0, 1
_MAX_STAGES = 8


@dataclass(frozen=True)
class DecodePlan:
    """How the grid and the shared memory of a multiprocessor are used."""

    blocks: int
    """Blocks of threads in the grid."""
    stages: int

    @staticmethod
    def of(geometry: Geometry) -> "DecodePlan":
        """Two blocks of threads a multiprocessor where each has room for three stages, so that one computes while
        the other waits; one otherwise."""
        q_rows = geometry.q_rows
        beside = q_rows * (2 * geometry.head_dim * 2 + BLOCK * 2 + geometry.head_dim * 4 + 8)
        beside += 2 * 2 * geometry.head_dim * 2 * (not geometry.quantized)
        beside += BLOCK * geometry.head_dim * 2 * geometry.quantized
        halves = (SHARED_BYTES - 4096) // 2 - beside
        if halves // geometry.block_bytes >= 3:
            return DecodePlan(2 * MULTIPROCESSORS, min(_MAX_STAGES, halves // geometry.block_bytes))
        return DecodePlan(MULTIPROCESSORS, min(_MAX_STAGES, (SHARED_BYTES - beside) // geometry.block_bytes))


class _Scratch(NamedTuple):
    """Shared memory of a block of threads."""

    queries: Ref
    """Two buffers: the producer loads the next unit's while the consumer uses the last's."""
    own: Ref | None
    """Key and value of the row's own token, so; none where the cache is quantized."""
    queries_full: Ref
    queries_free: Ref
    ring: Ring
    weights: Ref
    values: Ref
    """A block's values in bfloat16, where the cache is quantized."""
    result: Partial

    @staticmethod
    def of(geometry: Geometry, stages: int) -> "_Scratch":
        head_dim, q_rows, bfloat16 = geometry.head_dim, geometry.q_rows, jnp.bfloat16
        return _Scratch(
            plgpu.SMEM((2, q_rows, head_dim), bfloat16, transforms=tiled(head_dim, bfloat16)),
            None if geometry.quantized else plgpu.SMEM((2, 2, head_dim), bfloat16),
            plgpu.Barrier(num_arrivals=1 if geometry.quantized else 3, num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            Ring.scratch(geometry, stages, consumers=1),
            plgpu.SMEM((q_rows, BLOCK), bfloat16, transforms=tiled(BLOCK, bfloat16)),
            plgpu.SMEM((BLOCK, head_dim), bfloat16, transforms=tiled(head_dim, bfloat16))
            if geometry.quantized
            else None,
            Partial(
                plgpu.SMEM((head_dim, q_rows), jnp.float32),
                plgpu.SMEM((q_rows,), jnp.float32),
                plgpu.SMEM((q_rows,), jnp.float32),
            ),
        )


def attend_splits(
    tokens: jax.Array,
    pages: Pages,
    work: DecodeWork,
    geometry: Geometry,
    scoring: Scoring,
    plan: DecodePlan,
    product: Product,
    interpret=None,
) -> Partial:
    """Each live unit's partial attention. Of a cache that is not quantized, a row's own token goes to its page here.

    Args:
        tokens: bfloat16 [row, head, head_dim], the queries of the kv heads, each group padded to `q_rows`; behind them,
            of a cache that is not quantized, the keys and the values of the rows' own tokens.
        pages: references to the cache, and its table.
        work: the units.
        geometry: sizes.
        scoring: what becomes of the product of a query and a key; the work tells the window.
        plan: grid and stages.
        product: how matrices are multiplied.
        interpret: parameters of the interpreter, None on a GPU.
    """
    units = work.row.shape[0]
    q_rows = geometry.q_rows
    operands, structure = jax.tree.flatten((tokens, pages, work))

    def kernel(*refs):
        tokens, pages, work = structure.unflatten(refs[: len(operands)])
        *partial, scratch = refs[len(operands) :]
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == _CONSUMER)
        def _attend():
            _consume(geometry, scoring, product, pages, work, scratch, Partial(*partial))

        @pl.when(warpgroup == _PRODUCER)
        def _load():
            _produce(geometry, tokens, pages, work, scratch)

    shapes = ((geometry.head_dim, q_rows), (q_rows,), (q_rows,))
    out_type = [jax.ShapeDtypeStruct((units, geometry.kv_heads, *shape), jnp.float32) for shape in shapes]
    run = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(plan.blocks,),
        grid_names=(GRID_AXIS,),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=(_Scratch.of(geometry, plan.stages),),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return Partial(*run(*operands))


def _blocks_of(work: DecodeWork, unit):
    """First block of keys of a unit, and one past its last."""
    first = lax.div(work.begin[unit], jnp.int32(BLOCK))
    return first, lax.div(work.end[unit] + (BLOCK - 1), jnp.int32(BLOCK))


def _produce(geometry: Geometry, tokens: Ref, pages: Pages, work: DecodeWork, scratch: _Scratch) -> None:
    q_rows, first_key = geometry.q_rows, geometry.kv_heads * geometry.q_rows

    def load_unit(number, unit, head, step):
        buffer, row = lax.rem(number, jnp.int32(2)), work.row[unit]
        full = scratch.queries_full.at[buffer]

        @pl.when(number >= 2)
        def _wait_for_consumer():
            plgpu.barrier_wait(scratch.queries_free.at[buffer])

        plgpu.copy_gmem_to_smem(tokens.at[row, pl.ds(head * q_rows, q_rows)], scratch.queries.at[buffer], full)
        if scratch.own is not None:
            for index in range(2):
                source = tokens.at[row, first_key + index * geometry.kv_heads + head]
                plgpu.copy_gmem_to_smem(source, scratch.own.at[buffer, index], full)

        def load_block(block, step):
            scratch.ring.load(geometry, pages, row, head, block, step)
            return step + 1

        return lax.fori_loop(*_blocks_of(work, unit), load_block, step)

    units, steps = for_each_unit(work.units[0], geometry.kv_heads, load_unit, jnp.int32(0))
    wait_for_last(scratch.queries_free, units)
    wait_for_last(scratch.ring.free, steps)


def _consume(
    geometry: Geometry,
    scoring: Scoring,
    product: Product,
    pages: Pages,
    work: DecodeWork,
    scratch: _Scratch,
    out: Partial,
) -> None:
    ring, q_rows = scratch.ring, scratch.weights.shape[0]
    columns = functools.partial(lax.broadcast_in_dim, broadcast_dimensions=[1])
    key_layout = plgpu.Layout.WGMMA.reduce(1)

    def attend_unit(number, unit, head, step):
        buffer = lax.rem(number, jnp.int32(2))
        plgpu.barrier_wait(scratch.queries_full.at[buffer])
        queries = scratch.queries.at[buffer].transpose((1, 0))
        begin, end, newest = work.begin[unit], work.end[unit], work.newest[unit]
        own = () if scratch.own is None else tuple(scratch.own.at[buffer, index] for index in range(2))

        def attend_block(block, carry):
            largest, total, weighted, step = carry
            stage = ring.wait(step)
            if own:

                @pl.when((newest >= 0) & (block == lax.div(newest, jnp.int32(BLOCK))))
                def _take_in():
                    ring.insert(stage, lax.rem(newest, jnp.int32(BLOCK)), *own)

            position = block * BLOCK + plgpu.broadcasted_iota(jnp.int32, (BLOCK, q_rows), 0, layout=plgpu.Layout.WGMMA)
            seen = (position >= begin) & (position < end)
            if geometry.quantized:
                keys = ring.keys.at[stage]
                score: Any = None
                for tile in column_tiles(keys):
                    score = product(to_bfloat16(keys.at[:, tile][...]), queries.at[tile], onto=score)
                scale = plgpu.load(ring.key_scales.at[stage], layout=key_layout)
                score = score * lax.broadcast_in_dim(scale, score.shape, [0])
            else:
                score = product(ring.keys.at[stage], queries)
            score = jnp.where(seen, scores_of(score, scoring), -jnp.inf)
            new_largest = jnp.maximum(largest, score.max(axis=0))
            rescale = jnp.exp2(largest - new_largest)
            weight = jnp.exp2(score - columns(new_largest, score.shape))
            total = total * columns(rescale, total.shape) + weight
            if geometry.quantized:
                scale = plgpu.load(ring.value_scales.at[stage], layout=key_layout)
                # A scale beyond the sequence's end may be anything, and 0 * NaN is NaN.
                weight = jnp.where(seen, weight * lax.broadcast_in_dim(scale, weight.shape, [0]), 0.0)
            scratch.weights.transpose((1, 0))[...] = weight.astype(jnp.bfloat16)
            values = _clean_values(ring, scratch.values, stage, block, begin, end)
            plgpu.commit_smem()
            weighted = weighted * columns(rescale, weighted.shape)
            weighted = weighted + product(values.transpose((1, 0)), scratch.weights.transpose((1, 0)))
            ring.release(stage)
            return new_largest, total, weighted, step + 1

        wgmma = plgpu.Layout.WGMMA
        largest = plgpu.layout_cast(jnp.full((q_rows,), LOWEST, jnp.float32), wgmma.reduce(0))
        total = plgpu.layout_cast(jnp.zeros((BLOCK, q_rows), jnp.float32), wgmma)
        weighted = plgpu.layout_cast(jnp.zeros((geometry.head_dim, q_rows), jnp.float32), wgmma)
        carry = lax.fori_loop(*_blocks_of(work, unit), attend_block, (largest, total, weighted, step))
        largest, total, weighted, step = carry

        if own:

            @pl.when(newest >= 0)
            def _write_own():
                _write(geometry, pages, work.row[unit], head, newest, *own)

        plgpu.barrier_arrive(scratch.queries_free.at[buffer])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        scratch.result.weighted[...] = weighted
        scratch.result.largest[...] = largest
        scratch.result.total[...] = total.sum(axis=0)
        plgpu.commit_smem()
        for source, target in zip(scratch.result, out, strict=True):
            plgpu.copy_smem_to_gmem(source, target.at[unit, head])
        return step

    for_each_unit(work.units[0], geometry.kv_heads, attend_unit, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _write(geometry: Geometry, pages: Pages, row, head, position, key: Ref, value: Ref) -> None:
    """A row's own token to its page. Nobody else reads or writes it there in this call: the ring's copy of the block
    came for this unit alone."""
    page_size = jnp.int32(geometry.page_size)
    page, offset = pages.table[row, lax.div(position, page_size)], lax.rem(position, page_size)

    @pl.when(page > 0)
    def _copy():
        plgpu.copy_smem_to_gmem(key, pages.keys.at[page, head, offset])
        plgpu.copy_smem_to_gmem(value, pages.values.at[page, head, offset])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _clean_values(ring: Ring, converted: Ref | None, stage, block, begin, end) -> Ref:
    """A block's values in bfloat16, zero outside [begin, end): beyond a sequence's end lies another's garbage, and
    0 * NaN is NaN."""
    first, values = block * BLOCK, ring.values.at[stage]
    if converted is not None:
        transfer(values, converted, begin - first, end - first)
        return converted

    @pl.when((first < begin) | (first + BLOCK > end))
    def _clean_in_place():
        transfer(values, values, begin - first, end - first)

    return values
