"""`scripts/gpu_check` rehearsed on the CPU, and that it can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_check  # noqa: E402
from gpu_checks import kernels  # noqa: E402


def rehearse(*arguments: str) -> tuple[int, dict]:
    command = [str(SCRIPTS / "gpu_check"), "--rehearse", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_section_runs_and_gives_its_figures(tmp_path: Path):
    code, results = rehearse("--budget-s", "880", "--section-s", "600", "--json", str(tmp_path / "result.json"))
    assert code == 0, results
    assert json.loads((tmp_path / "result.json").read_text()) == results
    assert list(results) == list(gpu_check.SECTIONS)
    assert all(result["device"] == "cpu" for result in results.values())
    assert results["kernels"]["passed"] and results["engine"]["passed"]
    assert results["attention"]["decode"][0]["gb_per_s"] > 0 and results["steps"]["decode"][0]["mbu"] > 0
    profile = results["steps"]["profile"]
    assert {line["step"] for line in profile} == {"2 rows", "prompt of 64"} and profile[1]["us"] > 0
    overlap = results["overlap"]
    assert 0 <= overlap["device_idle_in_long_gaps"] <= overlap["device_idle_ratio"] <= 1
    assert 0 <= overlap["device_idle_ratio_untraced"] <= 1 and overlap["untraced_step_ms"] > 0


def test_a_section_without_time_is_ended_and_fails():
    code, results = rehearse("--sections", "kernels", "--section-s", "0.2")
    assert code == 1
    assert results["kernels"]["failed"] == "stopped after 0 s"


def test_a_kernel_error_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "REHEARSED", ("d64 page16 kv3",))
    monkeypatch.setattr(kernels, "LIMIT", 1e-9)
    (result,) = kernels.run(rehearse=True)
    assert result["passed"] is False
