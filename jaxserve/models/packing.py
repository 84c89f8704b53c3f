"""From the parameters of a model for XLA's products to those for the native kernel on CPU."""

import jax
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import abstract_llama
from jaxserve.models.quantize import quantization_of
from pallas_kernels.linear import pack

_pack = jax.jit(pack, static_argnames="gated")


def pack_params(config: ModelConfig, params: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure and the parameters of `Llama(config, dtype, quantization, "native")` from those of "xla".

    dtype and quantization are those of `params`, which are left alone and share what is not packed. Raises
    NativeUnavailable where the kernel cannot be built.
    """
    given = {path: variable.get_value() for path, variable in nnx.to_flat_state(params)}
    quantization = quantization_of(params)
    graphdef, abstract = abstract_llama(config, given["embedding",].dtype, quantization, "native")
    packed = {}
    for path, target in nnx.to_flat_state(abstract):
        shape = target.get_value().shape
        value = given[path] if shape == given[path].shape else _pack(given[path], gated=len(shape) == 5)
        packed[path] = target.replace(value)
    return graphdef, nnx.from_flat_state(packed)
