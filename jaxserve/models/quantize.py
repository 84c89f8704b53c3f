"""From the parameters of a floating-point model to those of its quantized variations."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.config import Quantization
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import quantize_rows
from jaxserve.models.llama import abstract_llama
from jaxserve.models.parameters import named_parameters, with_values
from pallas_kernels.block_quantization import block_bits, quantize_blocks

_quantize_rows = jax.jit(quantize_rows)
quantize_matrix = jax.jit(quantize_blocks, static_argnums=1)
"""`quantize_blocks`, compiled."""


def quantize_params(config: ModelConfig, params: nnx.State, quantization: Quantization) -> nnx.State:
    """The parameters of `Llama(config, dtype, quantization)` from those of `Llama(config, dtype)`.

    Each linear map's weight becomes int8 with a float32 scale a row, or blocks. A tied lm head becomes a quantized copy
    of the embedding, which stays as it is for the lookup. `params` is left alone and shares what is not quantized.
    """
    given = named_parameters(params)
    _, abstract = abstract_llama(config, given["embedding"].dtype, quantization)
    values: dict[str, jax.Array] = {}
    targets = named_parameters(abstract)
    # The scale of an int8 weight is made with the weight.
    for name in (name for name in targets if not name.endswith(".scale")):
        value = given["embedding"] if name == "lm_head.weight" and name not in given else given[name]
        values |= quantize_weight(name, value, targets)
    return with_values(abstract, values)


def quantize_weight(
    name: str, value: Float[Array, "..."], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """A parameter as `targets` asks for it, with the scale of an int8 weight: what every quantized weight is made by,
    whether while loading or afterwards. One that is not quantized is given back."""
    if (scale := scale_name(name)) in targets:
        weight, scales = _quantize_rows(value)
        return {name: weight, scale: scales}
    if targets[name].dtype == jnp.uint8:
        return {name: quantize_matrix(value, block_bits(targets[name].shape[1], value.shape[1]))}
    return {name: value}


def scale_name(name: str) -> str:
    """Of the scale that goes with a weight: `lm_head.weight` -> `lm_head.scale`; a bias has none of its own."""
    return name.removesuffix(".weight") + ".scale"
