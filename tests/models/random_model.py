"""Models with random parameters, for tests that need no checkpoint."""

import jax
from flax import nnx

from jaxserve.config import Quantization
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import abstract_llama
from jaxserve.models.parameters import named_parameters, with_values
from jaxserve.models.quantize import quantize_params


def random_model(
    config: ModelConfig, dtype: str, quantization: Quantization = "none"
) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's structure and its parameters, small and random."""
    graphdef, abstract = abstract_llama(config, dtype)
    shapes = named_parameters(abstract)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    values = {
        name: ((1.0 if "norm" in name else 0.0) + 0.02 * jax.random.normal(key, shape.shape)).astype(shape.dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    params = with_values(abstract, values)
    if quantization == "none":
        return graphdef, params
    return abstract_llama(config, dtype, quantization)[0], quantize_params(config, params, quantization)
