"""Products with packed weights on CPU: a C++ kernel for what XLA does by repacking the weights at each call.

A packed weight is [panel, block, 16, 4 // itemsize]: 16 outputs side by side, and of each the inputs that fill 4 bytes;
sizes are rounded up with zeros. int8 begins each panel with one more block, the outputs' sums as int32. The bytes of
weights in blocks (`block_quantization`), uint8, are packed like any others. A gated weight has a first axis of 2. A
row's result does not depend, to the bit, on the other rows, their number or the threads.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Num

from pallas_kernels.block_quantization import row_widths
from pallas_kernels.native_build import register

PANEL = 16
"""Outputs of a panel."""
_BLOCK_BYTES = 4
_SYMBOL = "JaxserveLinear"
_TYPES = (jnp.bfloat16, jnp.float32, jnp.int8, jnp.uint8)
Packed = Num[Array, "*half panel block 16 pack"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LiveRows:
    """Rows [0, counts[0]) and [leading, leading + counts[1]) of a call; the others cost nothing and become zeros."""

    counts: Int32[Array, " 2"]
    leading: int = field(metadata={"static": True})
    """Rows that the first count is of: a step's decode rows, before its chunk."""


def packed_shape(size_out: int, size_in: int, dtype: jnp.dtype, *, gated: bool = False) -> tuple[int, ...]:
    """Shape of the packed form of a weight [out, in], or of [2 * out, in] where gated (size_out is then out).

    Of a weight in blocks, size_in is the bytes of an output.
    """
    itemsize = jnp.dtype(dtype).itemsize
    blocks = -(-size_in * itemsize // _BLOCK_BYTES) + (1 if dtype == jnp.int8 else 0)
    shape = (-(-size_out // PANEL), blocks, PANEL, _BLOCK_BYTES // itemsize)
    return (2, *shape) if gated else shape


def pack(weight: Num[Array, "out in"], *, gated: bool = False, arch: str = "native") -> Packed:
    """The packed form of a bfloat16, float32 or int8 weight, or of one in blocks (uint8).

    Gated: the first half of the outputs is the gate's.
    """
    if weight.dtype not in _TYPES:
        raise ValueError(f"a packed weight is bfloat16, float32, int8 or uint8, not {weight.dtype}")
    if gated and weight.shape[0] % 2:
        raise ValueError(f"a gated weight has as many outputs of the gate as others, got {weight.shape[0]} in all")
    shape = packed_shape(weight.shape[0] // (2 if gated else 1), weight.shape[1], weight.dtype, gated=gated)
    return jax.ffi.ffi_call(register("JaxservePack", arch), jax.ShapeDtypeStruct(shape, weight.dtype))(weight)


def unpack(packed: Packed, size_out: int, size_in: int) -> Num[Array, "out in"]:
    """The inverse of `pack`; size_out is the number of rows of what is returned."""
    if packed.ndim == 5:
        return jnp.concatenate([unpack(half, size_out // 2, size_in) for half in packed])
    blocks = packed[:, 1:] if packed.dtype == jnp.int8 else packed
    return blocks.swapaxes(1, 2).reshape(packed.shape[0] * PANEL, -1)[:size_out, :size_in]


def rows(packed: Packed, ids: Int32[Array, " token"], size_in: int, *, arch: str = "native") -> Num[Array, "token in"]:
    """Rows `ids` of the weight that was packed: an embedding that shares its memory with the lm head."""
    out = jax.ShapeDtypeStruct((ids.shape[0], size_in), packed.dtype)
    return jax.ffi.ffi_call(register("JaxservePackedRows", arch), out)(packed, ids)


def linear(
    x: Float[Array, "token in"],
    packed: Packed,
    size_out: int,
    *,
    scale: Float32[Array, " outputs"] | None = None,
    bias: Float32[Array, " outputs"] | None = None,
    residual: Float[Array, "token out"] | None = None,
    norm: Float32[Array, " in"] | None = None,
    epsilon: float = 0.0,
    live: LiveRows | None = None,
    dtype: jnp.dtype | None = None,
    arch: str = "native",
) -> Float[Array, "token out"]:
    """x times the packed weight: residual + (x @ weight.T * scale + bias), summed in float32 (int8: exactly, in int32;
    blocks: each exactly, then in float32).

    Args:
        x: bfloat16 or float32, the type of the weight unless that is quantized. x then becomes int8, scaled by row for
            an int8 weight, and by row and block for one in blocks.
        packed: as `pack` gives it. A gated one gives silu(x @ gate.T) * (x @ up.T).
        size_out: outputs of the result.
        scale: of each output of an int8 weight.
        residual: added to the result; of its dtype.
        norm: weight of an RMS norm of x, with `epsilon`, rounded to x's dtype.
        live: rows worth computing; None takes all.
        dtype: of the result; None takes that of x.
        arch: the processor that the kernel is compiled for, as in `native_build.load`.

    Raises NativeUnavailable where it cannot be built, ValueError for operands that do not fit.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    gated = packed.ndim == 5
    widths = row_widths(x.shape[1]) if packed.dtype == jnp.uint8 else (x.shape[1],)
    expected = [packed_shape(size_out, width, packed.dtype, gated=gated) for width in widths]
    if packed.shape not in expected:
        shapes = " or ".join(map(str, expected))
        raise ValueError(f"a weight for {x.shape[1]} inputs and {size_out} outputs is {shapes}, got {packed.shape}")
    if (packed.dtype == jnp.int8) != (scale is not None):
        raise ValueError("int8 weights, and no others, have a scale")
    if packed.dtype not in (jnp.int8, jnp.uint8, x.dtype):
        raise ValueError(f"x is {x.dtype}, the weight {packed.dtype}")
    if residual is not None and (residual.dtype, residual.shape) != (dtype, (x.shape[0], size_out)):
        raise ValueError(
            f"the residual must be {dtype}[{x.shape[0]}, {size_out}], got {residual.dtype}{residual.shape}"
        )
    optional = (scale, bias, residual, norm, None if live is None else live.counts)
    call = jax.ffi.ffi_call(register(_SYMBOL, arch), jax.ShapeDtypeStruct((x.shape[0], size_out), dtype))
    return call(
        x,
        packed,
        *(operand for operand in optional if operand is not None),
        present=np.int64(sum(1 << bit for bit, operand in enumerate(optional) if operand is not None)),
        leading_rows=np.int64(0 if live is None else live.leading),
        epsilon=np.float32(epsilon),
    )
