"""The splits of a row put together, in ascending order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels.mosaic_gpu.products import Ref
from pallas_kernels.mosaic_gpu.scores import LOWEST


class Partial(NamedTuple):
    """What the splits of rows came to, float32 [unit, kv_head, ...], as arrays or as a kernel's references."""

    weighted: Ref
    """[head_dim, q_row], the sum of values by weight, not yet divided by the total."""
    largest: Ref
    """[q_row], the largest score, in units of log 2."""
    total: Ref
    """[q_row], the sum of weights."""


def combine(
    partial: Partial,
    row_start: Int32[Array, " row_and_end"],
    sinks: Float32[Array, "kv_head q_row"] | None,
    group: int,
    interpret=None,
) -> BFloat16[Array, "row kv_head group head_dim"]:
    """The attention of each row; zeros for a row without units.

    Args:
        partial: of the units.
        row_start: first unit of each row, then one past the last.
        sinks: a score that takes part in each total and has no value, in units of log 2.
        group: query heads a kv head, of the q_rows that they are padded to.
        interpret: parameters of the interpreter, None on a GPU.
    """
    _, kv_heads, head_dim, q_rows = partial.weighted.shape
    rows = row_start.shape[0] - 1
    wgmma = plgpu.Layout.WGMMA
    operands = [*partial, row_start, *(() if sinks is None else (sinks,))]

    def columns(x, shape):
        return lax.broadcast_in_dim(x, shape, [1])

    def kernel(*refs):
        weighted_in, largest_in, total_in, starts, *sink = refs[: len(operands)]
        out, staged = refs[len(operands) :]
        row, head = lax.axis_index("row"), lax.axis_index("head")

        def add_split(unit, carry):
            largest, total, weighted = carry
            split_largest, split_total = (
                plgpu.load(ref.at[unit, head], layout=wgmma.reduce(0), optimized=False)
                for ref in (largest_in, total_in)
            )
            split_weighted = plgpu.load(weighted_in.at[unit, head], layout=wgmma, optimized=False)
            new_largest = jnp.maximum(largest, split_largest)
            kept, added = jnp.exp2(largest - new_largest), jnp.exp2(split_largest - new_largest)
            total = total * kept + split_total * added
            shape = weighted.shape
            weighted = weighted * columns(kept, shape) + split_weighted * columns(added, shape)
            return new_largest, total, weighted

        largest = plgpu.layout_cast(jnp.full((q_rows,), LOWEST, jnp.float32), wgmma.reduce(0))
        total = plgpu.layout_cast(jnp.zeros((q_rows,), jnp.float32), wgmma.reduce(0))
        weighted = plgpu.layout_cast(jnp.zeros((head_dim, q_rows), jnp.float32), wgmma)
        largest, total, weighted = lax.fori_loop(starts[row], starts[row + 1], add_split, (largest, total, weighted))
        if sink:
            score = plgpu.load(sink[0].at[head], layout=wgmma.reduce(0), optimized=False)
            new_largest = jnp.maximum(largest, score)
            kept = jnp.exp2(largest - new_largest)
            total = total * kept + jnp.exp2(score - new_largest)
            weighted = weighted * columns(kept, weighted.shape)
        # A row without units has no weights, and is zero.
        result = weighted / columns(jnp.maximum(total, jnp.finfo(jnp.float32).tiny), weighted.shape)
        _store_plainly(staged.transpose((1, 0)), result.astype(jnp.bfloat16))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, group)], out.at[row, head])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, kv_heads, group, head_dim), jnp.bfloat16),
        grid=(rows, kv_heads),
        grid_names=("row", "head"),
        scratch_types=(plgpu.SMEM((q_rows, head_dim), jnp.bfloat16),),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)


def _store_plainly(target: Ref, value: jax.Array) -> None:
    """Stores to shared memory without swizzles, bank conflicts or not: JAX 0.12 wants to be told that they may be."""
    if hasattr(plgpu, "store"):
        plgpu.store(target, value, optimized=False)
    else:
        target[...] = value
