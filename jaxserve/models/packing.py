"""From the parameters of a model for XLA's products to those for the native kernel on CPU."""

import jax
from flax import nnx

from jaxserve.config import Quantization
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import abstract_llama
from jaxserve.models.parameters import named_parameters, with_values
from pallas_kernels.linear import pack

_pack = jax.jit(pack, static_argnames="gated")


def pack_params(config: ModelConfig, params: nnx.State, quantization: Quantization) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure and the parameters of `Llama(config, dtype, quantization, "native")` from those of "xla".

    dtype is that of `params`, which are left alone and share what is not packed. Raises NativeUnavailable where the
    kernel cannot be built.
    """
    values = named_parameters(params)
    graphdef, abstract = abstract_llama(config, values["embedding"].dtype, quantization, "native")
    for name, target in named_parameters(abstract).items():
        if target.shape != values[name].shape:
            values[name] = _pack(values[name], gated=len(target.shape) == 5)
    return graphdef, with_values(abstract, values)
