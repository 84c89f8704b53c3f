"""The soak finds what is planted: a slope beyond its error, and pages, descriptors and memory that do not come back."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.soak.trend import memory_limit, trend_of

ROOT = Path(__file__).resolve().parents[2]


def test_a_slope_is_found_within_its_error_and_noise_is_none():
    random_ = random.Random(1)
    noise = [(float(at), random_.gauss(0.0, 5.0)) for at in range(600)]
    flat, rising = trend_of(noise), trend_of([(at, value + 0.1 * at) for at, value in noise])
    assert flat is not None and rising is not None
    assert not flat.exceeds(0.01) and rising.exceeds(0.05)
    assert rising.slope == pytest.approx(0.1, abs=3 * rising.error)
    assert trend_of(noise[:2]) is None


def test_a_long_run_finds_a_slow_leak_and_a_sawtooth_is_none():
    """Memory in MB by hours, as a soak of half an hour samples it: now and then in its last 20 minutes."""
    random_ = random.Random(2)
    hours = [second / 3600 for second in range(600, 1800, 2)]
    sawtooth = [(at, 250 + (at * 3600 % 150) / 150 * 0.4 + random_.gauss(0.0, 0.05)) for at in hours]
    leaking = [(at, value + 4.0 * at) for at, value in sawtooth]
    limit = memory_limit(20 * 60)
    assert limit == 1.0 < memory_limit(60)
    whole, grown = trend_of(sawtooth), trend_of(leaking)
    assert whole is not None and grown is not None
    assert not whole.exceeds(limit) and grown.exceeds(limit)


def soaked(kind: str, minutes: float) -> tuple[int, dict[str, Any]]:
    """Exit status and report of a soak on a server of a kind."""
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/scripts/leaking_server.py"), kind], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        address = json.loads(server.stdout.readline())["address"]
        soak = [sys.executable, str(ROOT / "scripts/soak.py"), "--address", address, "--pid", str(server.pid)]
        options = ["--minutes", str(minutes), "--clients", "8", "--settle", "2", "--warmup", "2", "--json"]
        ended = subprocess.run([*soak, *options], capture_output=True, text=True, timeout=1000)
        return ended.returncode, json.loads(ended.stdout.splitlines()[-1])
    finally:
        server.kill()
        server.communicate()


def test_a_short_soak_passes_a_sound_server():
    status, report = soaked("sound", 0.1)
    assert status == 0 and report["broken"] == 0, report
    assert report["recompiles"] == 0 and report["canaries"] > 1 and report["done"]["complete"] > 10


def test_pages_descriptors_and_memory_that_do_not_come_back_each_make_a_soak_fail():
    status, report = soaked("leaking", 0.25)
    assert status == 1
    for found in ("pages at rest", "memory grows by", "descriptors:"):
        assert any(found in text for text in report["broken_first"]), report
