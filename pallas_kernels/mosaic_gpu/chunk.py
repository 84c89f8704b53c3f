"""Attention of a chunk of prompt tokens on Hopper, over the pages.

A unit is a run of neighbouring tokens of one row, for one kv head: its query heads and tokens fill the 64 rows of a
wgmma tile of each consumer warpgroup, so a group's heads share each key that is loaded. A producer warpgroup keeps the
ring of blocks of keys full (`ring.py`). The softmax is online, blocks in ascending order from the first that the
window reaches, so a token's bits depend on its own sequence alone.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.interface import Scoring
from pallas_kernels.mosaic_gpu.geometry import BLOCK, SHARED_BYTES, Geometry, tiled
from pallas_kernels.mosaic_gpu.grid import GRID_AXIS, MULTIPROCESSORS, for_each_unit
from pallas_kernels.mosaic_gpu.products import Product, Ref
from pallas_kernels.mosaic_gpu.ring import Pages, Ring, transfer, wait_for_last
from pallas_kernels.mosaic_gpu.scores import LOWEST, scores_of
from pallas_kernels.mosaic_gpu.work import ChunkWork

TILE = 64
"""Query rows of a consumer warpgroup, each a token's query head."""
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 232, 40


@dataclass(frozen=True)
class ChunkPlan:
    """How the grid and the shared memory of a multiprocessor are used."""

    blocks: int
    """Blocks of threads in the grid."""
    consumers: int
    """Warpgroups that attend, a tile each."""
    stages: int

    @staticmethod
    def of(geometry: Geometry) -> "ChunkPlan":
        """Two consumers, so that one has products to do while the other has its softmax; one at a head dim of 256,
        where a tile's output takes half of the registers."""
        consumers = 2 if geometry.head_dim <= 128 else 1
        tile_bytes = TILE * geometry.head_dim * 2
        beside = consumers * tile_bytes * (4 if geometry.quantized else 2)
        return ChunkPlan(MULTIPROCESSORS, consumers, min(8, (SHARED_BYTES - beside) // geometry.block_bytes))


class _Scratch(NamedTuple):
    """Shared memory of a block of threads; [consumer, ...] where each has its own."""

    queries: Ref
    queries_full: Ref
    queries_free: Ref
    ring: Ring
    cleaned: Ref
    """Passed when the first consumer has cleaned the values beyond the unit's end."""
    keys: Ref
    """A block's keys in bfloat16, where the cache is quantized; so the values."""
    values: Ref
    out: Ref

    @staticmethod
    def of(geometry: Geometry, plan: ChunkPlan) -> "_Scratch":
        consumers, head_dim, bfloat16 = plan.consumers, geometry.head_dim, jnp.bfloat16
        arranged = tiled(head_dim, bfloat16)
        converted = plgpu.SMEM((consumers, BLOCK, head_dim), bfloat16, transforms=arranged)
        return _Scratch(
            plgpu.SMEM((consumers, TILE, head_dim), bfloat16, transforms=arranged),
            plgpu.Barrier(num_arrivals=consumers),
            plgpu.Barrier(num_arrivals=consumers),
            Ring.scratch(geometry, plan.stages, consumers),
            plgpu.Barrier(),
            converted if geometry.quantized else None,
            converted if geometry.quantized else None,
            plgpu.SMEM((consumers, TILE, head_dim), bfloat16, transforms=arranged),
        )


@dataclass(frozen=True)
class ChunkKernel:
    """The kernel of one geometry."""

    geometry: Geometry
    scoring: Scoring
    plan: ChunkPlan
    product: Product

    @property
    def tokens_per_tile(self) -> int:
        """Tokens whose query heads fill a tile."""
        return TILE // self.geometry.group

    @property
    def tokens_per_unit(self) -> int:
        """Most tokens of a unit."""
        return self.plan.consumers * self.tokens_per_tile

    def __call__(
        self, queries: jax.Array, pages: Pages, work: ChunkWork, sinks: jax.Array | None, interpret=None
    ) -> jax.Array:
        """The chunk's attention, laid out as the queries. Rows beyond the live tokens mean nothing.

        Args:
            queries: bfloat16 [unit, consumer, kv_head, TILE, head_dim]: row r of consumer c's tile is token
                c * tokens_per_tile + r // group of the unit, and query head r % group of the kv head.
            pages: the cache and its table.
            work: the units, of `tokens_per_unit`.
            sinks: float32 [kv_head, TILE], of each row of a tile, in units of log 2.
            interpret: parameters of the interpreter, None on a GPU.
        """
        operands, structure = jax.tree.flatten((queries, work, pages, sinks))
        consumers = self.plan.consumers

        def kernel(*refs):
            queries, work, pages, sinks = structure.unflatten(refs[: len(operands)])
            out, scratch = refs[len(operands) :]
            warpgroup = lax.axis_index("warpgroup")

            @pl.when(warpgroup < consumers)
            def _attend():
                if consumers > 1:
                    plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
                self._consume(work, sinks, out, scratch, warpgroup)

            @pl.when(warpgroup == consumers)
            def _load():
                if consumers > 1:
                    plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
                self._produce(queries, pages, work, scratch)

        return plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            grid=(self.plan.blocks,),
            grid_names=(GRID_AXIS,),
            num_threads=consumers + 1,
            thread_name="warpgroup",
            scratch_types=(_Scratch.of(self.geometry, self.plan),),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=interpret,
        )(*operands)

    def _blocks_of(self, work: ChunkWork, unit):
        """First block of keys of a unit, and one past its last."""
        position, window = work.position[unit], self.scoring.sliding_window
        oldest = 0 if window is None else jnp.maximum(position - (window - 1), 0)
        end = position + work.tokens[unit]
        return lax.div(oldest, jnp.int32(BLOCK)), lax.div(end + (BLOCK - 1), jnp.int32(BLOCK))

    def _produce(self, queries: Ref, pages: Pages, work: ChunkWork, scratch: _Scratch) -> None:
        def load_unit(number, unit, head, step):
            @pl.when(number >= 1)
            def _wait_for_consumers():
                plgpu.barrier_wait(scratch.queries_free)

            for tile in range(self.plan.consumers):
                plgpu.copy_gmem_to_smem(queries.at[unit, tile, head], scratch.queries.at[tile], scratch.queries_full)

            def load_block(block, step):
                scratch.ring.load(self.geometry, pages, work.row[unit], head, block, step)
                return step + 1

            return lax.fori_loop(*self._blocks_of(work, unit), load_block, step)

        units, steps = for_each_unit(work.units[0], self.geometry.kv_heads, load_unit, jnp.int32(0))

        @pl.when(units >= 1)
        def _wait_for_last_unit():
            plgpu.barrier_wait(scratch.queries_free)

        wait_for_last(scratch.ring.free, steps)

    def _consume(self, work: ChunkWork, sinks: Ref | None, out: Ref, scratch: _Scratch, tile) -> None:
        wgmma, head_dim = plgpu.Layout.WGMMA, self.geometry.head_dim
        queries, staged = scratch.queries.at[tile], scratch.out.at[tile]

        def attend_unit(number, unit, head, step):
            plgpu.barrier_wait(scratch.queries_full)
            position = work.position[unit] + tile * self.tokens_per_tile
            end = work.position[unit] + work.tokens[unit]

            def attend_block(block, carry):
                largest, total, weighted, step = carry
                stage = scratch.ring.wait(step)
                score = self._score(scratch, queries, stage, tile)
                score = self._mask(score, block, position)
                new_largest = jnp.maximum(largest, score.max(axis=1))
                rescale = jnp.exp2(largest - new_largest)
                weight = jnp.exp2(score - _rows(new_largest, score.shape))
                total = total * rescale + weight.sum(axis=1)
                weighted = weighted * _rows(rescale, weighted.shape)
                weight, values = self._values(scratch, weight, stage, block, end, tile)
                weighted = self.product(weight.astype(jnp.bfloat16), values, onto=weighted)
                scratch.ring.release(stage)
                return new_largest, total, weighted, step + 1

            largest = plgpu.layout_cast(jnp.full((TILE,), LOWEST, jnp.float32), wgmma.reduce(1))
            total = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), wgmma.reduce(1))
            weighted = plgpu.layout_cast(jnp.zeros((TILE, head_dim), jnp.float32), wgmma)
            carry = (largest, total, weighted, step)
            largest, total, weighted, step = lax.fori_loop(*self._blocks_of(work, unit), attend_block, carry)
            plgpu.barrier_arrive(scratch.queries_free)
            if sinks is not None:
                # Weights are relative to the largest score, which a sink may exceed by far.
                sink = plgpu.load(sinks.at[head], layout=wgmma.reduce(1), optimized=False)
                new_largest = jnp.maximum(largest, sink)
                rescale = jnp.exp2(largest - new_largest)
                total = total * rescale + jnp.exp2(sink - new_largest)
                weighted = weighted * _rows(rescale, weighted.shape)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = (weighted / _rows(total, weighted.shape)).astype(staged.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, out.at[unit, tile, head])
            return step

        for_each_unit(work.units[0], self.geometry.kv_heads, attend_unit, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _score(self, scratch: _Scratch, queries: Ref, stage, tile):
        """Scores [TILE, BLOCK] of a tile's queries and a stage's keys."""
        keys = scratch.ring.keys.at[stage]
        if scratch.keys is None:
            return scores_of(self.product(queries, keys.transpose((1, 0))), self.scoring)
        converted = scratch.keys.at[tile]
        transfer(keys, converted)
        plgpu.commit_smem()
        scale = plgpu.load(scratch.ring.key_scales.at[stage], layout=plgpu.Layout.WGMMA.reduce(0))
        product = self.product(queries, converted.transpose((1, 0)))
        return scores_of(product * lax.broadcast_in_dim(scale, product.shape, [1]), self.scoring)

    def _mask(self, score, block, position):
        """-inf where a key lies after the row's position, or before its window."""
        group, window = self.geometry.group, self.scoring.sliding_window
        last_position = position + (TILE - 1) // group
        crosses = (block + 1) * BLOCK > position + 1
        if window is not None:
            crosses = crosses | (block * BLOCK <= last_position - window)

        def masked(score):
            key = block * BLOCK + plgpu.broadcasted_iota(jnp.int32, score.shape, 1, layout=plgpu.Layout.WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, score.shape, 0, layout=plgpu.Layout.WGMMA)
            # Row r holds token r // group of the tile; r // group >= n is r >= n * group.
            seen = (key - position) * group <= row
            if window is not None:
                seen = seen & ((key - position + window) * group > row)
            return jnp.where(seen, score, -jnp.inf)

        return lax.cond(crosses, masked, lambda score: score, score)

    def _values(self, scratch: _Scratch, weight, stage, block, end, tile):
        """Weights, scaled where the cache is quantized, and values in bfloat16, zero from position `end`: beyond a
        sequence's end lies another's garbage, and 0 * NaN is NaN."""
        values, live = scratch.ring.values.at[stage], end - block * BLOCK
        if scratch.values is not None:
            converted = scratch.values.at[tile]
            transfer(values, converted, 0, live)
            plgpu.commit_smem()
            scale = plgpu.load(scratch.ring.value_scales.at[stage], layout=plgpu.Layout.WGMMA.reduce(0))
            key = block * BLOCK + plgpu.broadcasted_iota(jnp.int32, weight.shape, 1, layout=plgpu.Layout.WGMMA)
            scaled = weight * lax.broadcast_in_dim(scale, weight.shape, [1])
            return jnp.where(key < end, scaled, 0.0), converted

        @pl.when((block + 1) * BLOCK > end)
        def _clean_once_for_all_consumers():
            @pl.when(tile == 0)
            def _clean():
                transfer(values, values, 0, live)
                plgpu.commit_smem()
                plgpu.barrier_arrive(scratch.cleaned)

            plgpu.barrier_wait(scratch.cleaned)

        return weight, values


def _rows(x, shape):
    """A number a row, over the columns."""
    return lax.broadcast_in_dim(x, shape, [0])
