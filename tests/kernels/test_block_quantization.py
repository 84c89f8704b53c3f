"""Weights in blocks: the values of the gguf package, and steps as small as the bits allow."""

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from pallas_kernels.block_quantization import block_bits, dequantize_blocks, quantize_blocks, row_width


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((48, 96), np.float32)


def test_four_bits_are_a_row_of_q4_1(weight):
    theirs = quants.quantize(weight, GGMLQuantizationType.Q4_1)
    ours = dequantize_blocks(jnp.asarray(theirs), 96)
    np.testing.assert_array_equal(ours, quants.dequantize(theirs, GGMLQuantizationType.Q4_1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size_in", [96, 70, 1])
def test_weights_are_within_half_a_step(weight, bits, size_in):
    weight = weight[:, :size_in]
    blocks = quantize_blocks(jnp.asarray(weight), bits)
    assert blocks.shape == (48, row_width(size_in, bits))
    assert block_bits(blocks.shape[1], size_in) == bits
    error = np.abs(dequantize_blocks(blocks, size_in) - weight)
    for start in range(0, size_in, 32):
        part = weight[:, start : start + 32]
        step = (part.max(1) - part.min(1)) / (2**bits - 1)
        # float16 rounds the scale, the last number counting it 2**bits times, and the minimum.
        rounding = (np.abs(part).max(1) * 3 + 1e-7) * 2.0**-11
        assert (error[:, start : start + 32].max(1) <= step / 2 + rounding).all()


def test_equal_weights_become_their_minimum():
    blocks = quantize_blocks(jnp.full((1, 32), 0.5), 4)
    np.testing.assert_array_equal(dequantize_blocks(blocks, 32), np.full((1, 32), 0.5))


def test_a_width_that_the_inputs_do_not_have_is_refused():
    with pytest.raises(ValueError, match="64 inputs take 40 or 72 bytes"):
        block_bits(48, 64)
