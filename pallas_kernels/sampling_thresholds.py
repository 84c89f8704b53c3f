"""Where top-k and top-p cut the distributions of a step's rows, as one C++ call on CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.native_build import register


def sampling_thresholds(
    weights: Float32[Array, "row vocab"],
    top_k: Int32[Array, " row"] | None,
    top_p: Float32[Array, " row"] | None,
    *,
    arch: str = "native",
) -> Float32[Array, " row"]:
    """The smallest weight of each row that is within its top-k and, of what that leaves, its top-p, bit for bit.

    A row does not depend on the others, and one that asks for neither costs nothing and gives 0.

    Args:
        weights: in [0, 1], in proportion to the probabilities.
        top_k: of the likeliest tokens, this many are kept and those that equal the last; `vocab` takes all, and so do
            all rows without it.
        top_p: the likeliest tokens are kept until they have this share, and those that equal the last; 1 takes all, and
            so do all rows without it.
        arch: the processor that the kernel is compiled for, as in `native_build.load`.

    Raises NativeUnavailable where it cannot be built.
    """
    rows, vocab = weights.shape
    top_k = jnp.full(rows, vocab, jnp.int32) if top_k is None else top_k
    top_p = jnp.ones(rows, jnp.float32) if top_p is None else top_p
    out = jax.ShapeDtypeStruct((rows,), weights.dtype)
    return jax.ffi.ffi_call(register("JaxserveSamplingThresholds", arch), out)(weights, top_k, top_p)
