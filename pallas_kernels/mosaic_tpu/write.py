"""The kernel that writes a chunk's keys and values into their pages, in place.

A token is less than the least that a DMA to a TPU's memory can write, so a page is read, changed and written back; the
pipeline does so for one page while it fetches the next. All of a page's new tokens are written at once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.interface import LayerCache
from pallas_kernels.mosaic_tpu.layout import VMEM_LIMIT, in_hbm
from pallas_kernels.mosaic_tpu.select import select
from pallas_kernels.mosaic_tpu.work import WriteUnits


def write_pages(cache: LayerCache, new: LayerCache, units: WriteUnits, *, interpret: object = False) -> LayerCache:
    """The cache with the new tokens in their pages.

    Args:
        cache: DONATED.
        new: for each unit what its page shall hold, [unit, kv_head, page_size, lanes], scales [unit, kv_head, lanes].
        units: which page, and which of its tokens.
        interpret: as of `pl.pallas_call`.
    """
    pages, structure = jax.tree.flatten(in_hbm(cache))
    news = jax.tree.leaves(new)

    def unit_block(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, *array.shape[1:]), lambda unit, page, start, end: (unit, *[0] * (array.ndim - 1)))

    def page_block(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, *array.shape[1:]), lambda unit, page, start, end: (page[unit], *[0] * (array.ndim - 1)))

    page_blocks = [page_block(array) for array in pages]
    touched = units.page.shape[0] * sum(array.size // array.shape[0] * array.dtype.itemsize for array in pages)
    written = pl.pallas_call(
        partial(_write_kernel, arrays=len(pages)),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in pages],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(units.page.shape[0],),
            in_specs=[*map(unit_block, news), *page_blocks],
            out_specs=page_blocks,
        ),
        input_output_aliases={3 + len(pages) + number: number for number in range(len(pages))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * touched),
        interpret=interpret,
        name="jaxserve_write_pages",
    )(*units, *news, *pages)
    return jax.tree.unflatten(structure, written)


def _write_kernel(page_ref, start_ref, end_ref, *refs, arrays: int):
    unit = pl.program_id(0)
    start, end = start_ref[unit], end_ref[unit]
    news, olds, outs = refs[:arrays], refs[arrays : 2 * arrays], refs[2 * arrays :]

    # A unit without tokens comes after one of the same page, whose block must stay; or at page 0, which is copied.
    @pl.when((start < end) | (page_ref[unit] == 0))
    def _():
        for new, old, out in zip(news, olds, outs, strict=True):
            shape = old.shape[1:]
            at = lax.broadcasted_iota(jnp.int32, shape, 1)  # of pages and of scales, axis 1 counts tokens
            is_new = (at >= start) & (at < end)
            out[0] = select(is_new, new[0], old[0])
