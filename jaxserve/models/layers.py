"""The parts of a decoder layer: linear maps, in floating point or int8, the RMS norm and the rotary embedding.

Weights are stored [out, in] and contracted over the last axes of both sides. Products accumulate in float32 (int8: in
int32) and are cast to the type of the activations once, after scale and bias.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int8, Int32

from jaxserve.models.config import FrequencyFactors, LinearScaling, Llama3Scaling, RopeConfig

Quantization = Literal["none", "int8"]
_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_INIT_STDDEV = 0.02


def project(
    x: Float[Array, "token in"], weight: Float[Array, "out in"], bias: Float32[Array, " out"] | None, dtype: jnp.dtype
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
    dtype: jnp.dtype,
) -> Float[Array, "token out"]:
    """As `project`, with int8 weights scaled by output channel and activations quantized by row on the way in."""
    rows, row_scale = quantize_rows(x)
    total = jax.lax.dot_general(rows, weight, _CONTRACT_LAST, preferred_element_type=jnp.int32)
    out = total.astype(jnp.float32) * row_scale[:, None] * scale
    return (out if bias is None else out + bias).astype(dtype)


def initial(rngs: nnx.Rngs | None, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Random weights, for tests and measurements without a checkpoint; zeros without `rngs`."""
    if rngs is None:
        return jnp.zeros(shape, dtype)
    return (_INIT_STDDEV * jax.random.normal(rngs.params(), shape)).astype(dtype)


class Linear(nnx.Module):
    """weight [out, in] in `dtype`, and bias [out] in float32 where there is one."""

    def __init__(self, size_in: int, size_out: int, dtype: jnp.dtype, rngs: nnx.Rngs | None, *, bias: bool = False):
        self.weight = nnx.Param(initial(rngs, (size_out, size_in), dtype))
        self.bias = nnx.Param(initial(rngs, (size_out,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "token in"], dtype: jnp.dtype | None = None) -> Float[Array, "token out"]:
        """In `dtype`; None takes that of x."""
        bias = None if self.bias is None else self.bias[...]
        return project(x, self.weight[...], bias, dtype or x.dtype)


class Int8Linear(nnx.Module):
    """weight [out, in] in int8, scale [out] and bias [out] in float32."""

    def __init__(self, size_in: int, size_out: int, dtype: jnp.dtype, rngs: nnx.Rngs | None, *, bias: bool = False):
        weight, scale = jnp.zeros((size_out, size_in), jnp.int8), jnp.zeros(size_out, jnp.float32)
        if rngs is not None:
            weight, scale = quantize_rows(initial(rngs, weight.shape, dtype))
        self.weight = nnx.Param(weight)
        self.scale = nnx.Param(scale)
        self.bias = nnx.Param(initial(rngs, (size_out,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "token in"], dtype: jnp.dtype | None = None) -> Float[Array, "token out"]:
        """In `dtype`; None takes that of x."""
        bias = None if self.bias is None else self.bias[...]
        return project_int8(x, self.weight[...], self.scale[...], bias, dtype or x.dtype)


LINEAR: dict[Quantization, type[Linear] | type[Int8Linear]] = {"none": Linear, "int8": Int8Linear}


class RMSNorm(nnx.Module):
    """Divides by the root of the mean square over the last axis (Zhang and Sennrich, arXiv 1910.07467), in float32."""

    def __init__(self, size: int, epsilon: float):
        self.weight = nnx.Param(jnp.ones(size, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.weight[...]).astype(x.dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a token of each of the head_dim / 2 rotations, float32. Llama 3's ramp: Grattafiori et al., 2407.21783."""
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
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "token head head_dim"], by: Rotation) -> Float[Array, "token head head_dim"]:
    """Rotary embedding (Su et al., arXiv 2104.09864), element i of the first half paired with i of the second."""
    cosine, sine = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
