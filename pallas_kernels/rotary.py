"""Heads out of the product of q, k and v, normed and rotated, as one C++ call on CPU."""

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from pallas_kernels.linear import LiveRows
from pallas_kernels.native_build import register


def split_heads(
    qkv: Float[Array, "token qkv"],
    cosine: Float32[Array, "token 1 half"],
    sine: Float32[Array, "token 1 half"],
    q_heads: int,
    kv_heads: int,
    *,
    norms: tuple[Float32[Array, " head_dim"], Float32[Array, " head_dim"]] | None = None,
    epsilon: float = 0.0,
    live: LiveRows | None = None,
    arch: str = "native",
) -> tuple[
    Float[Array, "token q_head head_dim"],
    Float[Array, "token kv_head head_dim"],
    Float[Array, "token kv_head head_dim"],
]:
    """q, k and v, those of dead rows zero; q and k rotated, element i of a head's first half with i of the second.

    Args:
        qkv: bfloat16 or float32, a token's heads of q, then of k, then of v.
        cosine: of each token's angles, as `sine`.
        q_heads: heads of q; of k and of v there are `kv_heads`.
        norms: weights of an RMS norm of each head of q and of k before it is rotated, with `epsilon`.
        live: rows worth computing; None takes all.
        arch: the processor that the kernel is compiled for, as in `native_build.load`.

    Raises NativeUnavailable where it cannot be built.
    """
    tokens, head_dim = qkv.shape[0], 2 * cosine.shape[2]
    if qkv.shape[1] != (q_heads + 2 * kv_heads) * head_dim:
        raise ValueError(f"{q_heads} + 2 * {kv_heads} heads of {head_dim} do not make {qkv.shape[1]}")
    shapes = [jax.ShapeDtypeStruct((tokens, heads, head_dim), qkv.dtype) for heads in (q_heads, kv_heads, kv_heads)]
    operands = (*(norms or ()), *(() if live is None else (live.counts,)))
    q, k, v = jax.ffi.ffi_call(register("JaxserveSplitHeads", arch), shapes)(
        qkv,
        cosine,
        sine,
        *operands,
        norms=norms is not None,
        lives=live is not None,
        leading_rows=np.int64(0 if live is None else live.leading),
        epsilon=np.float32(epsilon),
    )
    return q, k, v
