"""Attention's numerics on a real GPU: what `scripts/gpu_check --sections kernels` runs, as tests."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from gpu_checks.kernels import CASES, check

from pallas_kernels import AttentionNeeds, select

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [90, 1500])
def test_attention_agrees_with_dense_attention_and_rows_do_not_depend_on_neighbours(case: str, length: int):
    shape = CASES[case]
    needs = AttentionNeeds(shape.kv_dtype or shape.dtype, device_kind=jax.devices("gpu")[0].device_kind)
    outcome = check(select("cuda", None, needs), shape, length, seed=0)
    assert outcome.passes(shape.dtype), outcome
