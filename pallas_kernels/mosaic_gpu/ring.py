"""The ring of shared memory through which pages reach the consumers of a kernel."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.geometry import BLOCK, Geometry, tile_width, tiled
from pallas_kernels.mosaic_gpu.products import Ref, to_bfloat16


class Pages(NamedTuple):
    """A layer's cache and the table of its pages, in global memory."""

    keys: Ref
    values: Ref
    key_scales: Ref
    value_scales: Ref
    table: Ref


class Ring(NamedTuple):
    """Stages of one block of keys and values each. Step s of producer and consumers uses stage s % stages."""

    keys: Ref
    values: Ref
    key_scales: Ref
    value_scales: Ref
    full: Ref
    free: Ref

    @staticmethod
    def scratch(geometry: Geometry, stages: int, consumers: int) -> "Ring":
        """What to allocate."""
        block = (stages, BLOCK, geometry.head_dim)
        pages = plgpu.SMEM(block, geometry.dtype, transforms=tiled(geometry.head_dim, geometry.dtype))
        scales = plgpu.SMEM((stages, BLOCK), jnp.float32) if geometry.quantized else None
        copies = geometry.pages_per_block * (4 if geometry.quantized else 2)
        full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        free = plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
        return Ring(pages, pages, scales, scales, full, free)

    @property
    def stages(self) -> int:
        """Stages in the ring."""
        return self.keys.shape[0]

    def load(self, geometry: Geometry, pages: Pages, row, head, block, step) -> None:
        """The producer's part: waits until the step's stage is free and starts the copies of a block into it."""
        stage = lax.rem(step, jnp.int32(self.stages))
        self._wait_until_free(stage, step)
        size = min(BLOCK, geometry.page_size)
        copied = [_page_of(geometry, pages.table, row, block, index) for index in range(geometry.pages_per_block)]
        for index, (page, offset) in enumerate(copied):
            source, target = (page, head, pl.ds(offset, size)), (stage, pl.ds(index * size, size))
            for array, buffer in zip(pages[:4], self[:4], strict=True):
                if array is not None:
                    plgpu.copy_gmem_to_smem(array.at[source], buffer.at[target], self.full.at[stage])

    def _wait_until_free(self, stage, step) -> None:
        @pl.when(step >= self.stages)
        def _wait_for_consumers():
            plgpu.barrier_wait(self.free.at[stage])

    def wait(self, step):
        """The consumers' part: waits for the step's copies; the stage to read."""
        stage = lax.rem(step, jnp.int32(self.stages))
        plgpu.barrier_wait(self.full.at[stage])
        return stage

    def insert(self, stage, index, key: Ref, value: Ref) -> None:
        """The consumers' part: puts a token at an index of the stage's block, in place of what came from its page."""
        layout = plgpu.Layout.WGMMA
        for block, new in ((self.keys.at[stage], key), (self.values.at[stage], value)):
            for columns in column_tiles(block):
                part = block.at[:, columns]
                here = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=layout) == index
                spread = plgpu.load(new.at[columns], layout=layout.reduce(0), optimized=False)
                part[...] = jnp.where(here, lax.broadcast_in_dim(spread, part.shape, [1]), part[...])
        plgpu.commit_smem()

    def release(self, stage) -> None:
        """The consumers' part: nothing of the stage is read any more."""
        if self.key_scales is not None:
            # Quantized blocks are read by plain loads, and the copy engine writes next.
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.free.at[stage])


def _page_of(geometry: Geometry, table: Ref, row, block, index: int):
    """Page number of the index-th page of a block, and where in that page the block starts."""
    first = block * BLOCK
    entry = lax.div(first, jnp.int32(geometry.page_size)) + index
    # The last block may reach past the table. What is copied there is masked.
    page = table[row, jnp.minimum(entry, table.shape[1] - 1)]
    offset = lax.rem(first, jnp.int32(geometry.page_size)) if geometry.page_size > BLOCK else 0
    return page, offset


def transfer(source: Ref, target: Ref, begin: Any = 0, end: Any = None) -> None:
    """A block in shared memory as bfloat16 into another or the same, zero outside rows [begin, end) where given."""
    for columns in column_tiles(source):
        part = to_bfloat16(source.at[:, columns][...])
        if end is not None:
            row = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA)
            part = jnp.where((row >= begin) & (row < end), part, jnp.zeros((), part.dtype))
        target.at[:, columns][...] = part


def column_tiles(block: Ref) -> list[Any]:
    """Slices of a block's columns: tile by tile, what goes by way of registers takes fewer of them."""
    width = tile_width(block.shape[1], block.dtype)
    return [pl.ds(first, width) for first in range(0, block.shape[1], width)]


def wait_for_last(free: Ref, uses) -> None:
    """Waits for the releases that nobody waited for: those of the last uses of each of the buffers."""
    buffers = free.shape[0]

    def wait(use, _):
        plgpu.barrier_wait(free.at[lax.rem(use, jnp.int32(buffers))])

    lax.fori_loop(jnp.maximum(uses - buffers, 0), uses, wait, None)
