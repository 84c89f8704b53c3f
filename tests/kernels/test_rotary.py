"""Heads split, normed and rotated by the native kernel, against the portable form."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.config import RopeConfig
from jaxserve.models.layers import RMSNorm, rotation, split_heads
from pallas_kernels import native_build
from pallas_kernels.linear import LiveRows

pytestmark = pytest.mark.skipif(not native_build.available(), reason="the native kernels cannot be built here")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 40, 6])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("tokens", [1, 75])
def test_heads_are_those_of_the_portable_form(dtype, head_dim, normed, tokens):
    random = np.random.default_rng(0)
    qkv = jnp.asarray(random.standard_normal((tokens, (4 + 2 * 2) * head_dim)), dtype)
    by = rotation(jnp.asarray(random.integers(0, 1000, tokens), jnp.int32), RopeConfig(), head_dim)
    norms = (RMSNorm(head_dim, 1e-6), RMSNorm(head_dim, 1e-6)) if normed else None
    for norm in norms or ():
        norm.weight[...] = jnp.asarray(random.standard_normal(head_dim), jnp.float32)
    expected = split_heads(qkv, by, 4, 2, norms, matmul="xla", live=None)
    ours = split_heads(qkv, by, 4, 2, norms, matmul="native", live=None)
    tolerance = 2e-6 if dtype == jnp.float32 else 2**-7
    for wanted, got in zip(expected, ours, strict=True):
        assert got.shape == wanted.shape and got.dtype == dtype
        largest = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(got.astype(jnp.float32), wanted.astype(jnp.float32), atol=tolerance * largest)


def test_dead_rows_are_zero_and_live_ones_as_without_them():
    random = np.random.default_rng(0)
    qkv = jnp.asarray(random.standard_normal((40, 4 * 16)), jnp.float32)
    by = rotation(jnp.arange(40, dtype=jnp.int32), RopeConfig(), 16)
    everything = split_heads(qkv, by, 2, 1, None, matmul="native", live=None)
    live = split_heads(qkv, by, 2, 1, None, matmul="native", live=LiveRows(jnp.array([3, 5], jnp.int32), 8))
    lives = np.isin(np.arange(40), [0, 1, 2, 8, 9, 10, 11, 12])[:, None, None]
    for whole, part in zip(everything, live, strict=True):
        np.testing.assert_array_equal(part, jnp.where(lives, whole, 0))


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="heads"):
        split_heads(jnp.zeros((2, 60)), (jnp.zeros((2, 1, 8)),) * 2, 2, 1, None, matmul="native", live=None)
