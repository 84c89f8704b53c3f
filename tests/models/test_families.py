"""Each family's logits against those of transformers, from tiny random models it saved."""

from pathlib import Path

import jax
import numpy as np
import pytest
from dense_attention import dense_logits

from jaxserve.checkpoints.loading import load_model
from jaxserve.config import Quantization

FAMILIES = Path(__file__).parent.parent / "fixtures" / "families"
NAMES = sorted(folder.name for folder in FAMILIES.iterdir())


def logits_of(name: str, dtype: str, quantization: Quantization = "none") -> tuple[np.ndarray, np.ndarray]:
    """Ours and transformers', [token, vocab]."""
    expected = np.load(FAMILIES / name / "expected.npz")
    model = load_model(str(FAMILIES / name), dtype, quantization)
    logits = jax.jit(dense_logits, static_argnums=(0, 1))(
        model.graphdef, model.config, model.params, expected["token_ids"]
    )
    assert logits.dtype == np.float32
    return np.asarray(logits), expected["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_float32_logits_are_those_of_transformers(name):
    ours, theirs = logits_of(name, "float32")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits_are_near_those_of_transformers(name):
    ours, theirs = logits_of(name, "bfloat16")
    error = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
    assert error < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_int8_logits_are_near_those_of_transformers(name):
    ours, theirs = logits_of(name, "bfloat16", "int8")
    error = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
    assert error < 0.06
