"""Where top-k and top-p cut a distribution: by each implementation, against a sorted list."""

import functools
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.device.row_sums import row_sums
from jaxserve.device.thresholds import xla_thresholds
from pallas_kernels import native_build
from pallas_kernels.sampling_thresholds import sampling_thresholds

NATIVE = pytest.mark.skipif(not native_build.available(), reason="the native kernels cannot be built here")
X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="an x86 target")
FINDERS = [
    pytest.param(xla_thresholds, id="xla"),
    pytest.param(sampling_thresholds, id="native", marks=NATIVE),
    *(
        pytest.param(functools.partial(sampling_thresholds, arch=arch), id=arch, marks=[NATIVE, X86, pytest.mark.slow])
        for arch in ("x86-64-v3", "x86-64")
    ),
]
SIZES = (1, 7, 16, 63, 64, 65, 260, 49152)
TOP_P = (1.0, 0.875, 0.5, 1 / 64, 2**-20)


def rows_of_sixteenths(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights with ties and zeros, and a top-k and top-p for each row. All sums of them are exact in float32."""
    top_k, top_p = (
        axis.ravel() for axis in np.meshgrid(np.unique(np.minimum((1, 2, 20, size - 1, size), size)), TOP_P)
    )
    top_k = np.maximum(top_k, 1)
    weights = np.floor(random.random((len(top_k), size)) ** 8 * 17).clip(0, 16) / 16
    weights[np.arange(len(top_k)), random.integers(0, size, len(top_k))] = 1.0
    weights[::7] = np.where(weights[::7] == 1.0, 1.0, 0.0)
    return weights.astype(np.float32), top_k.astype(np.int32), top_p.astype(np.float32)


def kept_of(weights: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens are within top-k and top-p, by the definition."""
    within = weights >= np.sort(weights)[::-1][top_k - 1]
    if top_p < 1.0:
        ordered = np.sort(weights[within])[::-1]
        needed = np.searchsorted(np.cumsum(ordered), top_p * ordered.sum())
        within &= weights >= ordered[needed]
    return within


@pytest.mark.parametrize("find", FINDERS)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_kept_is_what_a_sorted_list_keeps(find, size):
    weights, top_k, top_p = rows_of_sixteenths(np.random.default_rng(size), size)
    thresholds = np.asarray(jax.jit(find)(weights, top_k, top_p))
    for row, *asked, threshold in zip(weights, top_k, top_p, thresholds, strict=True):
        np.testing.assert_array_equal((row >= threshold) & (row > 0), kept_of(row, *asked) & (row > 0))


@pytest.mark.parametrize("find", FINDERS)
def test_top_p_is_of_all_that_top_k_keeps_wherever_it_lies(find):
    """Powers of two, each the largest far and wide; all sums are exact."""
    random = np.random.default_rng(0)
    top_k, top_p = (axis.ravel().astype(np.float32) for axis in np.meshgrid((2, 3, 9, 20), (0.9, 0.7, 0.55, 0.3)))
    weights = np.zeros((len(top_k), 49152), np.float32)
    for row in weights:
        row[random.permutation(len(row))[:20]] = 0.5 ** np.arange(20)
    thresholds = np.asarray(jax.jit(find)(weights, top_k.astype(np.int32), top_p))
    for row, k, p, threshold in zip(weights, top_k.astype(int), top_p, thresholds, strict=True):
        np.testing.assert_array_equal((row >= threshold) & (row > 0), kept_of(row, k, p) & (row > 0))


@pytest.mark.parametrize("find", FINDERS)
def test_the_likeliest_is_left_alone_though_the_next_is_nearly_as_likely(find):
    weights = np.full((2, 300), 0.25, np.float32)
    weights[:, 7], weights[:, 200] = 1.0, np.nextafter(np.float32(1), np.float32(0))
    top_k, top_p = np.array([1, 300], np.int32), np.array([1.0, 1e-3], np.float32)
    assert np.asarray(jax.jit(find)(weights, top_k, top_p)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("find", FINDERS)
def test_a_row_that_asks_for_neither_loses_nothing(find):
    weights, *_ = rows_of_sixteenths(np.random.default_rng(0), 260)
    top_k, top_p = np.full(len(weights), 260, np.int32), np.ones(len(weights), np.float32)
    top_k[0], top_p[0] = 1, 0.5
    assert (np.asarray(jax.jit(find)(weights, top_k, top_p))[1:] == 0).all()


@pytest.mark.parametrize("find", FINDERS)
def test_a_row_has_the_same_bits_in_any_company(find):
    random = np.random.default_rng(0)
    weights = np.exp(random.normal(size=(32, 5000)).astype(np.float32) * 2)
    weights /= weights.max(axis=1, keepdims=True)
    top_k, top_p = random.integers(1, 5001, 32).astype(np.int32), random.random(32).astype(np.float32)
    together = np.asarray(jax.jit(find)(weights, top_k, top_p))
    for count in (1, 8):
        apart = [np.asarray(jax.jit(find)(*(x[i : i + count] for x in (weights, top_k, top_p)))) for i in range(8)]
        np.testing.assert_array_equal(apart, [together[i : i + count] for i in range(8)])
    assert len(set(together.tolist())) > 16


@pytest.mark.parametrize("size", [1, 8, 9, 49152])
def test_sums_do_not_depend_on_the_number_of_rows(size):
    values = jnp.asarray(np.random.default_rng(0).random((32, size)), jnp.float32)
    together = np.asarray(jax.jit(row_sums)(values))
    np.testing.assert_array_equal(together, [jax.jit(row_sums)(row[None])[0] for row in values])
    np.testing.assert_allclose(together, np.asarray(values, np.float64).sum(axis=1), rtol=1e-5)
