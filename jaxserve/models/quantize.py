"""From the parameters of a floating-point model to those of its int8 variation."""

import jax
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import quantize_rows
from jaxserve.models.llama import abstract_llama
from jaxserve.models.parameters import named_parameters, with_values

quantize_weight = jax.jit(quantize_rows)
"""`quantize_rows`, compiled: what every int8 weight is made by, whether while loading or afterwards."""


def quantize_params(config: ModelConfig, params: nnx.State) -> nnx.State:
    """The parameters of `Llama(config, dtype, "int8")` from those of `Llama(config, dtype)`.

    Each linear map's weight becomes int8 with a float32 scale a row. A tied lm head becomes an int8 copy of the
    embedding, which stays as it is for the lookup. `params` is left alone and shares what is not quantized.
    """
    given = named_parameters(params)
    _, abstract = abstract_llama(config, given["embedding"].dtype, "int8")
    values: dict[str, jax.Array] = {}
    targets = named_parameters(abstract)
    # The scale of an int8 weight is made with the weight.
    for name in (name for name in targets if not name.endswith(".scale")):
        scale = scale_name(name)
        if scale in targets:
            weight = given["embedding"] if name == "lm_head.weight" and name not in given else given[name]
            values[name], values[scale] = quantize_weight(weight)
        else:
            values[name] = given[name]
    return with_values(abstract, values)


def scale_name(name: str) -> str:
    """Of the scale that goes with a weight: `lm_head.weight` -> `lm_head.scale`; a bias has none of its own."""
    return name.removesuffix(".weight") + ".scale"
