"""The model with packed weights and the native kernel against the portable one."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense_logits
from flax import nnx
from random_model import random_model
from test_llama import TINY

from jaxserve.models.llama import abstract_llama
from jaxserve.models.packing import pack_params
from pallas_kernels import linear, native_build

pytestmark = pytest.mark.skipif(not native_build.available(), reason="the native kernels cannot be built here")

# Sizes that fill neither panels nor blocks.
TINY = replace(TINY, vocab_size=99, hidden_size=36, intermediate_size=50)


def shapes(params: nnx.State) -> dict[tuple, tuple]:
    return {path: (v.get_value().shape, str(v.get_value().dtype)) for path, v in nnx.to_flat_state(params)}


@pytest.mark.parametrize(
    ("dtype", "quantization", "error"),
    [
        ("float32", "none", 1e-5),
        ("bfloat16", "none", 0.02),
        ("float32", "int8", 0.02),
        ("bfloat16", "int8", 0.05),
        ("float32", "int4", 0.02),
        ("bfloat16", "int4", 0.05),
    ],
)
def test_packed_parameters_give_the_logits_of_those_they_were_packed_from(dtype, quantization, error):
    graphdef, params = random_model(TINY, dtype, quantization)
    packed_graphdef, packed = pack_params(TINY, params, quantization)
    token_ids = jnp.arange(20, dtype=jnp.int32)
    expected = dense_logits(graphdef, TINY, params, token_ids)
    ours = dense_logits(packed_graphdef, TINY, packed, token_ids)
    assert float(jnp.sqrt(jnp.mean((expected - ours) ** 2) / jnp.mean(expected**2))) < error


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_packing_gives_the_abstract_native_model_and_shares_the_rest(quantization):
    _, params = random_model(TINY, "bfloat16", quantization)
    graphdef, packed = pack_params(TINY, params, quantization)
    abstract_graphdef, abstract = abstract_llama(TINY, "bfloat16", quantization, "native")
    assert graphdef == abstract_graphdef
    assert shapes(packed) == shapes(abstract)
    assert packed["norm"]["weight"].get_value() is params["norm"]["weight"].get_value()
    weight = params["layers"][0]["feed_forward"]["gate_up"]["weight"].get_value()
    np.testing.assert_array_equal(
        linear.unpack(packed["layers"][0]["feed_forward"]["gate_up"]["weight"].get_value(), *weight.shape), weight
    )
