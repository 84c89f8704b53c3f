"""What each platform finds in the vocabulary, here by the CPU, against sorting it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.device.thresholds import xla_thresholds
from jaxserve.device.vocabulary import search_on

PLATFORMS = ["cpu", "cuda", "tpu"]
SIZES = [1, 20, 127, 128, 129, 260, 5000, 49152]


def logits_with_ties(size: int, rows: int = 9) -> jax.Array:
    """Of few values, some of them -inf; a row of a single value, one of -inf, one of distinct values."""
    random = np.random.default_rng(size)
    logits = np.round(random.normal(size=(rows, size)) * 2) / 2 + 0.0  # no -0.0, which XLA puts under 0.0
    logits[random.random((rows, size)) < 0.2] = -np.inf
    logits[0], logits[1] = 1.5, -np.inf
    logits[2] = random.permutation(size)
    return jnp.asarray(logits, jnp.float32)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("size", SIZES)
def test_the_likeliest_token_is_the_first_of_the_largest(platform, size):
    logits = logits_with_ties(size)
    np.testing.assert_array_equal(search_on(platform).argmax(logits), np.argmax(logits, axis=-1))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize("size", SIZES)
def test_top_tokens_are_in_the_order_of_a_stable_sort(platform, size, count):
    logits, count = logits_with_ties(size), min(count, size)
    order = np.argsort(-np.asarray(logits), axis=-1, kind="stable")[:, :count]
    values, tokens = search_on(platform).top_k(logits, count)
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_array_equal(values, np.take_along_axis(np.asarray(logits), order, axis=-1))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("size", SIZES)
def test_a_mask_has_a_bit_for_each_token(platform, size):
    allowed = np.random.default_rng(size).random((9, size)) < 0.5
    allowed[0], allowed[1] = True, False
    padded = np.pad(allowed, ((0, 0), (0, -size % 32)))
    words = np.packbits(padded, axis=-1, bitorder="little").view("<i4")
    np.testing.assert_array_equal(search_on(platform).bits(jnp.asarray(words), size), allowed)


def test_steps_for_other_platforms_are_not_given_a_kernel_of_the_cpu():
    assert search_on("cuda").thresholds is search_on("tpu").thresholds is xla_thresholds
