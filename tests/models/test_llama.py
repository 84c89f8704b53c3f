"""The structure of the model: its parameters, its abstract form and its quantized variations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense_logits
from flax import nnx
from random_model import random_model

from jaxserve.models.config import ModelConfig, RopeConfig
from jaxserve.models.llama import Llama, abstract_llama
from jaxserve.models.parameters import named_parameters
from jaxserve.models.quantize import quantize_params

TINY = ModelConfig(
    family="qwen3",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope=RopeConfig(),
    max_context=64,
    tie_embeddings=True,
    qkv_bias=True,
    qk_norm=True,
)


logits_of = jax.jit(dense_logits, static_argnums=(0, 1))


def shapes(params: nnx.State) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (value.shape, str(value.dtype)) for name, value in named_parameters(params).items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_the_abstract_model_is_the_real_one_without_its_data(dtype, quantization):
    graphdef, abstract = abstract_llama(TINY, dtype, quantization)
    real_graphdef, real = nnx.split(Llama(TINY, dtype, quantization))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert shapes(abstract) == shapes(real)
    assert graphdef == real_graphdef


def test_weights_are_rows_of_outputs_and_fused():
    found = shapes(abstract_llama(TINY, "bfloat16")[1])
    assert found["embedding"] == ((96, 32), "bfloat16")
    assert found["layers.1.attention.qkv.weight"] == (((4 + 2 * 2) * 16, 32), "bfloat16")
    assert found["layers.1.feed_forward.gate_up.weight"] == ((2 * 48, 32), "bfloat16")
    assert found["layers.1.attention_norm.weight"] == ((32,), "float32")
    assert not any(name.startswith("lm_head") for name in found)


@pytest.mark.parametrize(
    ("quantization", "head", "error"), [("int8", ((96, 32), "int8"), 0.05), ("int4", ((96, 36), "uint8"), 0.15)]
)
def test_quantized_parameters_fit_their_model_and_leave_the_originals(quantization, head, error):
    graphdef, params = random_model(TINY, "float32")
    before = jax.tree.map(np.asarray, params)
    quantized_graphdef, abstract = abstract_llama(TINY, "float32", quantization)
    quantized = quantize_params(TINY, params, quantization)
    assert shapes(quantized) == shapes(abstract)
    assert shapes(quantized)["lm_head.weight"] == head
    assert named_parameters(quantized)["embedding"] is named_parameters(params)["embedding"]
    jax.tree.map(np.testing.assert_array_equal, before, params)
    token_ids = jnp.arange(20, dtype=jnp.int32)
    exact = logits_of(graphdef, TINY, params, token_ids)
    near = logits_of(quantized_graphdef, TINY, quantized, token_ids)
    assert float(jnp.sqrt(jnp.mean((exact - near) ** 2) / jnp.mean(exact**2))) < error


def test_a_token_does_not_see_later_ones():
    graphdef, params = random_model(TINY, "float32")
    token_ids = jnp.arange(16, dtype=jnp.int32)
    changed = token_ids.at[10:].set(50)
    logits, other = (logits_of(graphdef, TINY, params, ids) for ids in (token_ids, changed))
    np.testing.assert_array_equal(logits[:10], other[:10])
    assert bool((logits[10:] != other[10:]).any())
