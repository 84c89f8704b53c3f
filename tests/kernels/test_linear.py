"""Products with packed weights against numpy in float64 and in integers, and row by row to the bit."""

import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.layers import RMSNorm, project_int8, quantize_rows
from pallas_kernels import native_build
from pallas_kernels.block_quantization import dequantize_blocks, quantize_blocks
from pallas_kernels.linear import LiveRows, linear, pack, packed_shape, rows, unpack

pytestmark = pytest.mark.skipif(not native_build.available(), reason="the native kernels cannot be built here")

X86 = platform.machine() == "x86_64"
ARCHES = [
    "native",
    *(
        pytest.param(arch, marks=[pytest.mark.slow, pytest.mark.skipif(not X86, reason="an x86 target")])
        for arch in ("x86-64-v3", "x86-64")
    ),
]
# (rows, in, out): whole panels and blocks, ragged ones, less than one of each.
SIZES = [(8, 64, 96), (3, 33, 50), (1, 1, 1), (37, 130, 161)]
F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def normal(random: np.random.Generator, *shape: int, dtype: jnp.dtype = F32) -> jax.Array:
    return jnp.asarray(random.standard_normal(shape), dtype)


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def quantized(
    weight: jax.Array, form: str | int | None, *, gated: bool = False, arch: str = "native"
) -> tuple[jax.Array, jax.Array | None]:
    """Packed, and the scale of int8: as it is, int8, or in blocks of `form` bits."""
    scale = None
    if form == "int8":
        weight, scale = quantize_rows(weight)
    elif isinstance(form, int):
        weight = quantize_blocks(weight, form)
    return pack(weight, gated=gated, arch=arch), scale


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_product_is_that_of_float64(random, dtype, size, arch):
    count, size_in, size_out = size
    x, weight = normal(random, count, size_in, dtype=dtype), normal(random, size_out, size_in, dtype=dtype)
    bias = normal(random, size_out)
    expected = exact(x) @ exact(weight).T + exact(bias)
    ours = linear(x, pack(weight, arch=arch), size_out, bias=bias, dtype=F32, arch=arch)
    # Inputs are exact; what is left is the rounding of float32 sums.
    bound = 2e-7 * (np.abs(exact(x)) @ np.abs(exact(weight)).T + 1) * np.sqrt(size_in)
    assert (np.abs(exact(ours) - expected) <= bound).all()
    rounded = linear(x, pack(weight, arch=arch), size_out, bias=bias, arch=arch)
    np.testing.assert_array_equal(rounded, ours.astype(dtype))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("size", SIZES)
def test_int8_sums_are_those_of_integers(random, size, arch):
    count, size_in, size_out = size
    x = random.integers(-127, 128, (count, size_in))
    x[:, 0] = 127  # the scale of each row is then 1
    weight = random.integers(-128, 128, (size_out, size_in))
    packed = pack(jnp.asarray(weight, jnp.int8), arch=arch)
    ours = linear(jnp.asarray(x, F32), packed, size_out, scale=jnp.ones(size_out), arch=arch)
    np.testing.assert_array_equal(ours, x @ weight.T)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_int8_quantizes_rows_as_the_portable_form_does(random, dtype):
    x, bias = normal(random, 9, 65, dtype=dtype).at[2].set(0.0), normal(random, 48)
    weight, scale = quantize_rows(normal(random, 48, 65))
    expected = project_int8(x, weight, scale, bias, F32)
    ours = linear(x, pack(weight), 48, scale=scale, bias=bias, dtype=F32)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_int8_is_exact_at_the_ends_of_its_range(random, dtype):
    x = jnp.full((2, 4096), 1.0, dtype).at[1].set(-1.0)
    weight = jnp.full((16, 4096), -127, jnp.int8)
    ours = linear(x, pack(weight), 16, scale=jnp.ones(16), dtype=F32)
    np.testing.assert_allclose(ours, np.array([[-1.0], [1.0]]) * 4096 * 127 * np.ones((1, 16)), rtol=1e-6)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_give_the_product_of_what_they_hold(random, bits, size, arch):
    count, size_in, size_out = size
    blocks = quantize_blocks(normal(random, size_out, size_in), bits)
    x = random.integers(-127, 128, (count, size_in))
    x[:, ::32] = 127  # the scale of each block of x is then 1: x is exact
    bias = normal(random, size_out)
    ours = linear(jnp.asarray(x, F32), pack(blocks, arch=arch), size_out, bias=bias, arch=arch)
    weight = exact(dequantize_blocks(blocks, size_in))
    # Sums of a block are exact; what is left is the rounding of float32 where blocks are scaled and added up. The scale
    # and the minimum may cancel, so that their own size counts.
    largest = np.abs(weight).max() * (2 if bits == 4 else 256)
    bound = 4e-7 * (np.abs(x).sum(1, keepdims=True) * largest + 1)
    assert (np.abs(exact(ours) - (x @ weight.T + exact(bias))) <= bound).all()


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_exact_at_the_ends_of_their_range(bits, arch):
    x = jnp.full((2, 4096), 127.0, F32).at[1].set(-127.0)
    weight = jnp.tile(jnp.array([0.0, 2.0**bits - 1], F32), (16, 2048))  # the scale is 1, the minimum 0
    ours = linear(x, pack(quantize_blocks(weight, bits), arch=arch), 16, arch=arch)
    expected = np.array([[127.0], [-127.0]]) * 2048 * (2**bits - 1) * np.ones((1, 16))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("arch", ARCHES)
def test_scales_below_the_normal_range_of_float16_count(random, arch):
    weight = normal(random, 16, 64) * 1e-6
    blocks = quantize_blocks(weight, 8)
    ours = linear(jnp.full((1, 64), 127.0), pack(blocks, arch=arch), 16, arch=arch)
    expected = 127 * exact(dequantize_blocks(blocks, 64)).sum(1)
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(ours[0], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("damaged", [np.nan, np.inf, 1e6])
def test_a_weight_that_blocks_cannot_hold_is_seen_in_its_output_alone(random, damaged, arch):
    weight = normal(random, 16, 64).at[3, 5].set(damaged)  # 1e6 / 15 is beyond float16
    ours = linear(normal(random, 2, 64), pack(quantize_blocks(weight, 4), arch=arch), 16, arch=arch)
    assert (np.isfinite(ours) == (np.arange(16) != 3)).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_quantize_each_32_of_a_row_by_themselves(random, bits, dtype):
    x = normal(random, 9, 96, dtype=dtype).at[2].set(0.0).at[3, :32].mul(1e3)
    blocks = quantize_blocks(normal(random, 48, 96), bits)
    parts = exact(x).reshape(9, 3, 32)
    step = np.abs(parts).max(-1, keepdims=True) / 127
    weight = exact(dequantize_blocks(blocks, 96))
    # Each number of x is off by half a step of its block at most.
    bound = (np.broadcast_to(step, parts.shape).reshape(9, 96) / 2 * 1.001) @ np.abs(weight).T + 1e-3 * step.max()
    ours = linear(x, pack(blocks), 48, dtype=F32)
    assert (np.abs(exact(ours) - exact(x) @ weight.T) <= bound).all()
    assert not np.asarray(ours[2]).any()


@pytest.mark.parametrize("form", ["int8", 4, 8])
def test_a_row_that_is_not_a_number_stays_so_and_alone(random, form):
    x = normal(random, 3, 64, dtype=BF16).at[1, 40].set(jnp.nan)
    packed, scale = quantized(normal(random, 48, 64), form)
    ours = linear(x, packed, 48, scale=scale, dtype=F32)
    assert np.isnan(ours[1]).all()
    assert np.isfinite(ours[jnp.array([0, 2])]).all()


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("dtype", "form"), [(F32, None), (BF16, None), (BF16, "int8"), (BF16, 4), (F32, 4), (BF16, 8)])
def test_a_row_is_the_same_to_the_bit_whatever_else_is_in_the_call(random, dtype, form, arch):
    size_in, size_out = 70, 100
    x, norm = normal(random, 300, size_in, dtype=dtype), normal(random, size_in)
    packed, scale = quantized(normal(random, 2 * size_out, size_in, dtype=dtype), form, gated=True, arch=arch)

    def compute(x: jax.Array) -> np.ndarray:
        return np.asarray(linear(x, packed, size_out, scale=scale, norm=norm, epsilon=1e-6, dtype=F32, arch=arch))

    whole = compute(x)
    for begin, end in [(0, 1), (1, 2), (5, 12), (3, 11), (0, 9), (17, 33), (100, 199), (299, 300)]:
        np.testing.assert_array_equal(compute(x[begin:end]), whole[begin:end])
    poisoned = compute(jnp.where(jnp.arange(300)[:, None] == 7, x, jnp.nan))
    np.testing.assert_array_equal(poisoned[7], whole[7])


@pytest.mark.parametrize("form", [None, "int8", 4])
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (8, 5), (0, 21), (8, 32), (1, 31)])
def test_dead_rows_are_zero_and_live_ones_as_without_them(random, counts, form):
    x = normal(random, 8 + 32, 64, dtype=BF16)
    packed, scale = quantized(normal(random, 80, 64, dtype=BF16), form)
    live = np.concatenate([np.arange(8) < counts[0], np.arange(32) < counts[1]])
    everything = linear(x, packed, 80, scale=scale)
    x = jnp.where(live[:, None], x, jnp.nan)
    ours = linear(x, packed, 80, scale=scale, live=LiveRows(jnp.asarray(counts, jnp.int32), 8))
    np.testing.assert_array_equal(ours, jnp.where(live[:, None], everything, 0))


def test_live_counts_beyond_the_call_are_clipped(random):
    x, packed = normal(random, 6, 16), pack(normal(random, 16, 16))
    ours = linear(x, packed, 16, live=LiveRows(jnp.array([9, 9], jnp.int32), 2))
    np.testing.assert_array_equal(ours, linear(x, packed, 16))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norm_gate_and_residual_are_those_done_apart(random, dtype, arch):
    x, weight = normal(random, 11, 50, dtype=dtype), normal(random, 2 * 35, 50, dtype=dtype)
    residual, norm = normal(random, 11, 35, dtype=dtype), RMSNorm(50, 1e-5)
    norm.weight[...] = normal(random, 50)
    ours = linear(
        x, pack(weight, gated=True, arch=arch), 35, norm=norm.weight[...], epsilon=1e-5, residual=residual, arch=arch
    )
    gate, up = np.split(exact(norm(x)) @ exact(weight).T, 2, axis=-1)
    expected = exact(residual) + gate / (1 + np.exp(-gate)) * up
    tolerance = 2e-6 if dtype == F32 else 2**-7
    np.testing.assert_allclose(exact(ours), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_gate_saturates_without_overflow():
    packed = pack(jnp.eye(2, dtype=F32), gated=True)
    gate = jnp.array([-1e30, -200.0, -20.0, 0.0, 20.0, 200.0, 1e30])
    ours = linear(jnp.stack([gate, jnp.ones(7)], axis=1), packed, 1)[:, 0]
    np.testing.assert_allclose(ours, jax.nn.silu(gate), rtol=1e-5, atol=1e-30)
    assert np.isnan(linear(jnp.array([[jnp.nan, 1.0]]), packed, 1)).all()


@pytest.mark.parametrize("dtype", [F32, BF16, jnp.dtype(jnp.int8), jnp.dtype(jnp.uint8)])
@pytest.mark.parametrize(("size_out", "size_in"), [(32, 64), (50, 33), (1, 1)])
def test_packing_loses_nothing(random, dtype, size_out, size_in):
    weight = jnp.asarray(random.integers(0 if dtype == jnp.uint8 else -128, 128, (size_out, size_in)), dtype)
    packed = pack(weight)
    assert packed.shape == packed_shape(size_out, size_in, dtype)
    np.testing.assert_array_equal(unpack(packed, size_out, size_in), weight)
    ids = jnp.asarray(random.integers(0, size_out, 7), jnp.int32)
    np.testing.assert_array_equal(rows(packed, ids, size_in), weight[ids])
    doubled = jnp.concatenate([weight, weight[::-1]])
    np.testing.assert_array_equal(unpack(pack(doubled, gated=True), 2 * size_out, size_in), doubled)


def test_operands_that_do_not_fit_are_refused(random):
    x, packed = normal(random, 2, 16), pack(normal(random, 16, 16))
    with pytest.raises(ValueError, match="inputs"):
        linear(normal(random, 2, 17), packed, 16)
    with pytest.raises(ValueError, match="scale"):
        linear(x, packed, 16, scale=jnp.ones(16))
    with pytest.raises(ValueError, match="weight"):
        linear(x.astype(BF16), packed, 16)
    with pytest.raises(ValueError, match="33 inputs"):
        linear(normal(random, 2, 33), pack(quantize_blocks(normal(random, 16, 16), 4)), 16)
    with pytest.raises(ValueError, match="residual"):
        linear(x, packed, 16, residual=x.astype(BF16))
    with pytest.raises(ValueError, match="float16"):
        pack(jnp.ones((16, 16), jnp.float16))
