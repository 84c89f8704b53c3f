"""The parts of a decoder layer: linear maps, in floating point or quantized, the RMS norm and the rotary embedding.

Weights are stored [out, in] and contracted over the last axes of both sides. Products accumulate in float32 (int8: in
int32) and are cast to the type of the activations once, after scale and bias.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, Int32

from jaxserve.config import Matmul, Quantization
from jaxserve.models.config import FrequencyFactors, LinearScaling, Llama3Scaling, RopeConfig
from jaxserve.models.shards import UNSHARDED, Shards
from pallas_kernels import linear as packed
from pallas_kernels import rotary
from pallas_kernels.block_quantization import dequantize_blocks, quantize_blocks
from pallas_kernels.linear import LiveRows

_CONTRACT_LAST = (((1,), (1,)), ((), ()))


def project(
    x: Float[Array, "token in"], weight: Float[Array, "out in"], bias: Float32[Array, " out"] | None, dtype: DTypeLike
) -> Float[Array, "token out"]:
    """x times the transpose of weight, plus bias, in `dtype`. Exact float32 products where x is float32."""
    # A TPU multiplies float32 in one bfloat16 pass unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    out = jax.lax.dot_general(x, weight, _CONTRACT_LAST, precision=precision, preferred_element_type=jnp.float32)
    return (out if bias is None else out + bias).astype(dtype)


def quantize_rows(x: Float[Array, "row in"]) -> tuple[Int8[Array, "row in"], Float32[Array, " row"]]:
    """Symmetric int8 of each row: x is about `int8 * scale[:, None]`. A row of zeros has scale 0."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    inverse = jnp.where(largest > 0, 127.0 / largest, 0.0)
    return jnp.round(x * inverse[:, None]).astype(jnp.int8), largest / 127.0


def project_int8(
    x: Float[Array, "token in"],
    weight: Int8[Array, "out in"],
    scale: Float32[Array, " out"],
    bias: Float32[Array, " out"] | None,
    dtype: DTypeLike,
) -> Float[Array, "token out"]:
    """As `project`, with int8 weights scaled by output channel and activations quantized by row on the way in."""
    rows, row_scale = quantize_rows(x)
    total = jax.lax.dot_general(rows, weight, _CONTRACT_LAST, preferred_element_type=jnp.int32)
    out = total.astype(jnp.float32) * row_scale[:, None] * scale
    return (out if bias is None else out + bias).astype(dtype)


class RMSNorm(nnx.Module):
    """Divides by the root of the mean square over the last axis (Zhang and Sennrich, arXiv 1910.07467), in float32."""

    def __init__(self, size: int, epsilon: float):
        self.weight = nnx.Param(jnp.ones(size, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        """In the type of x."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.weight[...]).astype(x.dtype)


@dataclass(frozen=True)
class LinearForm:
    """How a model's linear maps are stored and multiplied; chosen before tracing."""

    dtype: DTypeLike
    """Of the weights, where they are not quantized."""
    quantization: Quantization = "none"
    matmul: Matmul = "xla"
    """native: weights packed for the C++ kernel of `pallas_kernels.linear`, on CPU only."""
    shards: Shards = UNSHARDED
    """Each device has an equal share of every map's outputs. With more than one, matmul is xla."""


class Linear(nnx.Module):
    """A linear map, with what comes right before and after it.

    weight [out, in] in the form's dtype, or in int8 with scale [out] in float32, or for int4 in blocks of `block_bits`;
    packed where native. bias [out] in float32 where there is one. A gated map is two of `size_out` outputs, the gate's
    first: silu(gate) * up, the SwiGLU of Shazeer, arXiv 2002.05202. Where devices share the map, `gathers` says whether
    each gets all of its outputs or keeps its own share.
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        form: LinearForm,
        *,
        bias: bool = False,
        gated: bool = False,
        gathers: bool = True,
        block_bits: int = 4,
    ):
        outputs = 2 * size_out if gated else size_out
        weight, scale = jnp.zeros((outputs, size_in), form.dtype), None
        if form.quantization == "int8":
            weight, scale = quantize_rows(weight)
        elif form.quantization == "int4":
            weight = quantize_blocks(weight, block_bits)
        if form.matmul == "native":
            weight = packed.pack(weight, gated=gated)
        self.weight = nnx.Param(weight)
        self.scale = None if scale is None else nnx.Param(scale)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None
        self.size_out, self.gated = size_out, gated
        self.matmul: Matmul = form.matmul
        self.shards = form.shards if gathers else UNSHARDED

    def __call__(
        self,
        x: Float[Array, "token in"],
        *,
        norm: RMSNorm | None = None,
        residual: Float[Array, "token out"] | None = None,
        live: LiveRows | None = None,
        dtype: DTypeLike | None = None,
    ) -> Float[Array, "token out"]:
        """The map of x, or of norm(x), added to `residual` where given.

        Args:
            live: rows worth computing, None for all; the others may come out as anything finite.
            dtype: of the result; None takes that of x.
        """
        weight, dtype = self.weight[...], jnp.dtype(dtype or x.dtype)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        if self.matmul == "native":
            before = {} if norm is None else {"norm": norm.weight[...], "epsilon": norm.epsilon}
            return packed.linear(
                x, weight, self.size_out, scale=scale, bias=bias, residual=residual, live=live, dtype=dtype, **before
            )
        x = x if norm is None else norm(x)
        if weight.dtype == jnp.uint8:
            # Activations stay as they are: without the kernel nothing would be won by integers.
            weight = dequantize_blocks(weight, x.shape[1]).astype(x.dtype)
        out = project(x, weight, bias, dtype) if scale is None else project_int8(x, weight, scale, bias, dtype)
        if self.gated:
            gate, up = jnp.split(out, 2, axis=-1)
            out = jax.nn.silu(gate) * up
        out = self.shards.gather(out)
        return out if residual is None else residual + out


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a token of each of the head_dim / 2 rotations, float32. The ramp is that of Llama 3, arXiv 2407.21783."""
    frequency = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match rope.scaling:
        case LinearScaling(factor):
            frequency = frequency / factor
        case FrequencyFactors(factors):
            frequency = frequency / np.asarray(factors, np.float64)
        case Llama3Scaling(factor, low, high, original_context):
            # Rotations within the original context: fewer than `low` are interpolated, more than `high` kept.
            rotations = original_context * frequency / (2 * math.pi)
            kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
            frequency = frequency * kept + frequency / factor * (1 - kept)
        case None:
            pass
    return frequency.astype(np.float32)


Rotation = tuple[Float32[Array, "token 1 half"], Float32[Array, "token 1 half"]]


def rotation(positions: Int32[Array, " token"], rope: RopeConfig, head_dim: int) -> Rotation:
    """Cosine and sine of each token's angles, to be shared by all layers."""
    angles = positions[:, None, None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    # Without the barrier XLA computes them again for each element of each layer, a tenth of a step on CPU.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate(x: Float[Array, "token head head_dim"], by: Rotation) -> Float[Array, "token head head_dim"]:
    """Rotary embedding (Su et al., arXiv 2104.09864), element i of the first half paired with i of the second."""
    cosine, sine = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def split_heads(
    qkv: Float[Array, "token qkv"],
    by: Rotation,
    q_heads: int,
    kv_heads: int,
    norms: tuple[RMSNorm, RMSNorm] | None,
    *,
    matmul: Matmul,
    live: LiveRows | None,
) -> tuple[Array, Array, Array]:
    """q [token q_head head_dim], k and v [token kv_head head_dim] of their product; q and k normed, then rotated."""
    if matmul == "native":
        given = {} if norms is None else {"norms": tuple(n.weight[...] for n in norms), "epsilon": norms[0].epsilon}
        return rotary.split_heads(qkv, *by, q_heads, kv_heads, live=live, **given)
    head_dim = qkv.shape[1] // (q_heads + 2 * kv_heads)
    parts = jnp.split(qkv, (q_heads * head_dim, (q_heads + kv_heads) * head_dim), axis=-1)
    q, k, v = (part.reshape(qkv.shape[0], -1, head_dim) for part in parts)
    if norms is not None:
        # Without the barrier a GPU's norms are made once for each half of the heads that rotation takes apart.
        q, k = jax.lax.optimization_barrier((norms[0](q), norms[1](k)))
    return rotate(q, by), rotate(k, by), v
