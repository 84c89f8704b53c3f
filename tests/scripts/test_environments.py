"""The shell scripts find a Python, or say what is missing, on machines that are not like ours."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts in a folder whose name has a space, without an environment."""
    folder = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """All programs of a machine. Its one Python is python3, which has no package."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "sed"):
        (folder / name).symlink_to(str(shutil.which(name)))
    (folder / "python3").write_text(f'#!/bin/sh\nexec "{sys.base_prefix}/bin/python3" -I "$@"\n')
    (folder / "python3").chmod(0o755)
    return folder


def run(checkout: Path, bin_folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c", script]
    environment = {"PATH": str(bin_folder)}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)


def test_a_python_is_found_without_a_home_folder(checkout: Path, bin_folder: Path):
    found = run(checkout, bin_folder, ". scripts/find_python; find_python")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.strip() == os.path.realpath(f"{sys.base_prefix}/bin/python3")


def test_gpu_check_names_what_a_machine_lacks_whose_python_has_no_jax(checkout: Path, bin_folder: Path):
    done = run(checkout, bin_folder, "scripts/gpu_check --rehearse")
    assert done.returncode == 2
    assert "missing Python packages: jax" in done.stderr


def test_an_environment_without_pip_gets_it_and_keeps_what_it_has(checkout: Path, bin_folder: Path):
    """One of uv, or one whose making was interrupted."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    (checkout / ".venv" / "ours").touch()
    for name in ("paste", "rm", "sort"):
        (bin_folder / name).symlink_to(str(shutil.which(name)))
    done = run(checkout, bin_folder, "PIP_NO_INDEX=1 scripts/setup")
    assert "installing jaxserve" in done.stderr and "No module named pip" not in done.stderr
    assert (checkout / ".venv" / "ours").exists()
    assert subprocess.run([checkout / ".venv" / "bin" / "python", "-c", "import pip"], check=False).returncode == 0
