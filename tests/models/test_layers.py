"""Linear maps, norm and rotary embedding against their definitions in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.config import FrequencyFactors, LinearScaling, Llama3Scaling, RopeConfig
from jaxserve.models.layers import (
    Linear,
    LinearForm,
    RMSNorm,
    inverse_frequencies,
    project,
    project_int8,
    quantize_rows,
    rotate,
    rotation,
)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def normal(random: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(random.standard_normal(shape), jnp.float32)


def test_int8_rows_are_within_half_a_step_and_zeros_stay_zero(random):
    x = normal(random, 5, 33).at[2].set(0.0)
    quantized, scale = quantize_rows(x)
    assert quantized.dtype == jnp.int8
    assert int(jnp.abs(quantized[0]).max()) == 127
    assert float(scale[2]) == 0.0
    assert not quantized[2].any()
    error = jnp.abs(quantized * scale[:, None] - x)
    assert bool((error <= scale[:, None] * 0.5001).all())


def test_int8_product_is_the_product_of_the_quantized_sides(random):
    x, weight, bias = normal(random, 3, 64), normal(random, 16, 64), normal(random, 16)
    rows, row_scale = quantize_rows(x)
    weights, scale = quantize_rows(weight)
    exact = np.asarray(rows, np.int64) @ np.asarray(weights, np.int64).T
    expected = exact * np.asarray(row_scale)[:, None] * np.asarray(scale) + np.asarray(bias)
    ours = project_int8(x, weights, scale, bias, jnp.float32)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours, project(x, weight, bias, jnp.float32), atol=0.25)


def test_int8_accumulates_beyond_the_range_of_int16(random):
    x = jnp.full((8, 4096), 1.0)
    weights, scale = quantize_rows(jnp.full((8, 4096), 1.0))
    np.testing.assert_allclose(project_int8(x, weights, scale, None, jnp.float32), 4096.0, rtol=1e-6)


def test_bfloat16_products_accumulate_in_float32():
    # A sum of 4,096 ones in bfloat16 would stop at 256.
    x = jnp.ones((8, 4096), jnp.bfloat16)
    assert float(project(x, jnp.ones((8, 4096), jnp.bfloat16), None, jnp.float32)[0, 0]) == 4096.0


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_row_of_a_linear_map_does_not_depend_on_its_neighbours(random, quantization):
    linear = Linear(64, 32, LinearForm(jnp.bfloat16, quantization), bias=True)
    weight = normal(random, 32, 64).astype(jnp.bfloat16)
    if linear.scale is not None:
        weight, linear.scale[...] = quantize_rows(weight)
    linear.weight[...] = weight
    x = normal(random, 16, 64).astype(jnp.bfloat16)
    other = x.at[1:].set(100.0)
    assert linear(x).dtype == jnp.bfloat16
    assert linear(x, dtype=jnp.float32).dtype == jnp.float32
    np.testing.assert_array_equal(linear(x)[0], linear(other)[0])


def test_norm_has_unit_mean_square_and_keeps_the_type(random):
    norm = RMSNorm(64, 1e-6)
    y = norm(100 * normal(random, 4, 64))
    np.testing.assert_allclose(jnp.mean(y * y, axis=-1), 1.0, rtol=1e-5)
    assert norm(y.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_rotation_keeps_lengths_and_depends_on_distance_alone(random):
    rope = RopeConfig(theta=10000.0)
    q, k = normal(random, 1, 2, 16), normal(random, 1, 2, 16)

    def score(q_position: int, k_position: int) -> jax.Array:
        rotated_q = rotate(q, rotation(jnp.array([q_position]), rope, 16))
        rotated_k = rotate(k, rotation(jnp.array([k_position]), rope, 16))
        np.testing.assert_allclose(jnp.linalg.norm(rotated_q), jnp.linalg.norm(q), rtol=1e-5)
        return jnp.sum(rotated_q * rotated_k, axis=-1)

    np.testing.assert_allclose(score(17, 5), score(112, 100), atol=1e-4)
    np.testing.assert_array_equal(rotate(q, rotation(jnp.array([0]), rope, 16)), q)


def test_rotation_pairs_the_halves_of_a_head():
    x = jnp.zeros((1, 1, 4)).at[0, 0, 0].set(1.0)
    rotated = rotate(x, rotation(jnp.array([1]), RopeConfig(), 4))[0, 0]
    np.testing.assert_allclose(rotated, [np.cos(1), 0, np.sin(1), 0], rtol=1e-6)


def test_linear_scaling_divides_every_frequency():
    plain = inverse_frequencies(RopeConfig(), 64)
    np.testing.assert_allclose(inverse_frequencies(RopeConfig(scaling=LinearScaling(4.0)), 64), plain / 4, rtol=1e-6)


def test_llama3_scaling_keeps_short_wavelengths_and_divides_long_ones():
    plain = inverse_frequencies(RopeConfig(theta=500000.0), 128)
    scaled = inverse_frequencies(RopeConfig(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)), 128)
    ratio = plain / scaled
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 8192], 8.0, rtol=1e-6)
    assert (np.diff(ratio) >= -1e-6).all()


def test_frequency_factors_divide_their_own_frequency():
    factors = tuple(1.0 + index for index in range(8))
    plain = inverse_frequencies(RopeConfig(), 16)
    scaled = inverse_frequencies(RopeConfig(scaling=FrequencyFactors(factors)), 16)
    np.testing.assert_allclose(scaled, plain / np.asarray(factors), rtol=1e-6)
