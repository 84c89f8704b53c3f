"""From the parameters of a floating-point model to those of its int8 variation."""

import jax
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import quantize_rows
from jaxserve.models.llama import abstract_llama

quantize_weight = jax.jit(quantize_rows)
"""`quantize_rows`, compiled: what every int8 weight is made by, whether while loading or afterwards."""


def quantize_params(config: ModelConfig, params: nnx.State) -> nnx.State:
    """The parameters of `Llama(config, dtype, "int8")` from those of `Llama(config, dtype)`.

    Each linear map's weight becomes int8 with a float32 scale a row. A tied lm head becomes an int8 copy of the
    embedding, which stays as it is for the lookup. `params` is left alone and shares what is not quantized.
    """
    given = {path: variable.get_value() for path, variable in nnx.to_flat_state(params)}
    _, abstract = abstract_llama(config, given["embedding",].dtype, "int8")
    targets = dict(nnx.to_flat_state(abstract))
    values: dict[tuple[str | int, ...], jax.Array] = {}
    for path in targets:
        scale = (*path[:-1], "scale")
        if path == scale:
            continue
        source = ("embedding",) if path == ("lm_head", "weight") and path not in given else path
        if scale in targets and path[-1] == "weight":
            values[path], values[scale] = quantize_weight(given[source])
        else:
            values[path] = given[source]
    return nnx.from_flat_state({path: target.replace(values[path]) for path, target in targets.items()})
