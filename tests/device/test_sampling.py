"""What is found of a vocabulary by blocks, against looking through the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxserve.device.sampling import argmax, top_tokens

SIZES = [1, 20, 127, 128, 129, 260, 5000, 49152]


def logits_with_ties(size: int, rows: int = 9) -> jax.Array:
    """Of few values, some of them -inf; a row of a single value, one of -inf, one of distinct values."""
    random = np.random.default_rng(size)
    logits = np.round(random.normal(size=(rows, size)) * 2) / 2
    logits[random.random((rows, size)) < 0.2] = -np.inf
    logits[0], logits[1] = 1.5, -np.inf
    logits[2] = random.permutation(size)
    return jnp.asarray(logits, jnp.float32)


@pytest.mark.parametrize("size", SIZES)
def test_the_likeliest_token_is_the_first_of_the_largest(size):
    logits = logits_with_ties(size)
    np.testing.assert_array_equal(argmax(logits), np.argmax(logits, axis=-1))


@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize("size", SIZES)
def test_top_tokens_are_those_of_the_whole_row_in_its_order(size, count):
    logits, count = logits_with_ties(size), min(count, size)
    for found, expected in zip(top_tokens(logits, count), lax.top_k(logits, count), strict=True):
        np.testing.assert_array_equal(found, expected)
