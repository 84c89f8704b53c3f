"""The soak's arithmetic: a slope is found with its error, and noise alone exceeds no limit."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.soak.trend import trend_of


def test_a_slope_is_found_within_its_error_and_noise_is_none():
    random_ = random.Random(1)
    noise = [(float(at), random_.gauss(0.0, 5.0)) for at in range(600)]
    flat, rising = trend_of(noise), trend_of([(at, value + 0.1 * at) for at, value in noise])
    assert flat is not None and rising is not None
    assert not flat.exceeds(0.01) and rising.exceeds(0.05)
    assert rising.slope == pytest.approx(0.1, abs=3 * rising.error)
    assert trend_of(noise[:2]) is None
