"""Keys and values in 8 bits, and numbers of every size."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized import LARGEST, quantize


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("size", [3e38, 1.0, 1e-30, 1e-36, 1e-38, 1e-45, 0.0])
def test_vectors_of_any_size_come_back_with_an_error_of_their_own_size(dtype: str, size: float):
    """Zeros too, which a head's padding is: a factor beyond float32 would make NaNs of them."""
    x = np.float32(size) * np.array([[[1.0, 0.0, -0.5, 0.25]]], np.float32)
    values, scales = quantize(jnp.asarray(x), dtype)
    back = np.asarray(values, np.float32) * np.asarray(scales)[..., None]
    least = LARGEST[dtype] * float(jnp.finfo(jnp.float32).tiny)
    assert np.abs(back - x).max() <= max(0.02 * size, least)
