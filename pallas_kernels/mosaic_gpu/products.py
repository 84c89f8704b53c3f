"""Matrix products of a kernel: by wgmma, or plain where a kernel is interpreted."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Ref = Any
"""A reference within a kernel, or what is to become one; Pallas has no public type of it."""
Product = Callable[..., Any]
"""product(a, b, onto=None): a times b in float32, added to `onto` where given. a [m, k] is a reference or an array, b
[k, n] a reference; both bfloat16, their references in shared memory and `tiled`."""


def wgmma_product(a: Any, b: Ref, onto: Any = None) -> Any:
    """On the tensor cores. Waits for the result."""
    if onto is None:

        def multiply(accumulator: Ref) -> Any:
            plgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))

    def multiply_onto(accumulator: Ref) -> None:
        plgpu.wgmma(accumulator, a, b)

    return pl.run_state(multiply_onto)(plgpu.WGMMAAccumulatorRef.init(onto))


def plain_product(a: Any, b: Ref, onto: Any = None) -> Any:
    """The same for the interpreter, which has no wgmma with an operand in registers."""
    contract = (((1,), (0,)), ((), ()))
    product = lax.dot_general(a[...], b[...], contract, preferred_element_type=jnp.float32)
    # These reads stand for those of wgmma, which the copy engine's writes are ordered with by a barrier alone.
    plgpu.commit_smem()
    return product if onto is None else onto + product


def to_bfloat16(values: Any) -> Any:
    """int8 or float8 values, exactly. The hardware converts float8 to float32 alone."""
    if values.dtype == jnp.float8_e4m3fn:
        values = values.astype(jnp.float32)
    return values.astype(jnp.bfloat16)
