"""`jaxserve convert` writes a whole folder or none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running_commands import PATIENCE, failure

pytestmark = pytest.mark.usefixtures("logging_unchanged")

FAMILY = Path(__file__).parents[1] / "fixtures" / "families" / "qwen2"


def test_an_interrupted_convert_leaves_nothing_of_what_it_was_writing(tmp_path: Path):
    folder = tmp_path / "native"
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from jaxserve.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "convert", "smollm2-135m", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as converting:
        while not any(files for _, _, files in os.walk(tmp_path)) and converting.poll() is None:
            time.sleep(0.001)
        converting.send_signal(signal.SIGINT)
        _, errors = converting.communicate(timeout=PATIENCE)
    assert (converting.returncode, list(tmp_path.iterdir())) == (130, [])
    assert "Traceback" not in errors


def test_convert_finds_that_a_folder_cannot_be_made_before_it_loads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxserve.checkpoints.loading.load_model", None)
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "folder" / "native"
    assert f"{place}: cannot be made: {tmp_path}/file is not a folder" in failure(
        capsys, "convert", str(FAMILY), str(place)
    )
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    place = tmp_path / "folder" / "native"
    assert f"{place}: cannot be made: {tmp_path} cannot be written" in failure(
        capsys, "convert", str(FAMILY), str(place)
    )
