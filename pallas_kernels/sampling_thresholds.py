"""Where top-k and top-p cut the distributions of a step's rows, as one C++ call on CPU."""

import jax
from jaxtyping import Array, Float32, Int32

from pallas_kernels.native_build import register


def sampling_thresholds(
    weights: Float32[Array, "row vocab"],
    top_k: Int32[Array, " row"],
    top_p: Float32[Array, " row"],
    *,
    arch: str = "native",
) -> Float32[Array, " row"]:
    """The smallest weight of each row that is within its top-k and, of what that leaves, its top-p, bit for bit.

    A row does not depend on the others, and one that asks for neither costs nothing and gives 0.

    Args:
        weights: in [0, 1], in proportion to the probabilities.
        top_k: of the likeliest tokens, this many are kept and those that equal the last; `vocab` takes all.
        top_p: the likeliest tokens are kept until they have this share, and those that equal the last; 1 takes all.
        arch: the processor that the kernel is compiled for, as in `native_build.load`.

    Raises NativeUnavailable where it cannot be built.
    """
    out = jax.ShapeDtypeStruct(top_k.shape, weights.dtype)
    return jax.ffi.ffi_call(register("JaxserveSamplingThresholds", arch), out)(weights, top_k, top_p)
