"""SmolLM2 in float32 gives the greedy tokens that transformers gives from the same file."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense_logits

from jaxserve.checkpoints.loading import LoadedModel, load_model

FIXTURE = json.loads((Path(__file__).parent.parent / "fixtures" / "smollm2_greedy.json").read_text())
PADDED = 128
"""Tokens; one shape for all prompts, so that the model is compiled once."""
PROMPTS = [prompt for prompt in FIXTURE["prompts"] if len(prompt["token_ids"]) + 32 <= PADDED]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("smollm2-135m", "float32")


@pytest.fixture(scope="module")
def logits_of(model):
    """Teacher forcing: the logits [token, vocab] of a prompt and its continuation at once."""
    logits = jax.jit(dense_logits, static_argnums=(0, 1))

    def call(token_ids):
        # What follows the text cannot be seen by it.
        padded = jnp.zeros(PADDED, jnp.int32).at[: len(token_ids)].set(jnp.asarray(token_ids))
        return np.asarray(logits(model.graphdef, model.config, model.params, padded))[: len(token_ids)]

    return call


@pytest.mark.parametrize("index", range(0, len(PROMPTS), 3))
def test_greedy_tokens_and_logprobs_are_those_of_transformers(logits_of, index):
    prompt = PROMPTS[index]
    first = len(prompt["token_ids"]) - 1
    logits = logits_of(prompt["token_ids"] + prompt["generated_ids"][:-1])[first:]
    chosen = np.asarray(prompt["generated_ids"])
    logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(chosen)), chosen]
    np.testing.assert_allclose(logprobs, prompt["logprobs"], rtol=0, atol=1e-3)
    masked = logits.copy()
    masked[:, FIXTURE["eos_ids"]] = -np.inf
    np.testing.assert_array_equal(masked.argmax(axis=-1), chosen)


def test_the_configuration_comes_from_the_file(model):
    assert model.config.family == "llama"
    assert (model.config.vocab_size, model.config.num_layers, model.config.max_context) == (49152, 30, 8192)
    assert model.config.tie_embeddings
    assert model.config.eos_ids == (2, 0)
    assert model.tokenizer_source.add_bos is False
    assert model.tokenizer_source.special_tokens["eos_token"] == "<|im_end|>"
