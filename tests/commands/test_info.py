"""`jaxserve info` describes a model, one that `jaxserve convert` wrote too."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from running_commands import failure

from jaxserve.cli import main
from pallas_kernels.native_build import NativeUnavailable

pytestmark = pytest.mark.usefixtures("logging_unchanged")

FAMILY = Path(__file__).parents[1] / "fixtures" / "families" / "qwen2"


def test_convert_writes_a_folder_that_info_describes(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = str(tmp_path / "native")
    assert main(["convert", str(FAMILY), folder, "--dtype", "float32"]) == 0
    assert f"wrote {folder}: float32" in capsys.readouterr().out
    assert main(["info", "--model", folder, "--dtype", "float32", "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert main(["info", "--model", str(FAMILY), "--dtype", "float32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == description
    assert description["model"]["family"] == "qwen2"
    assert description["weights"]["bytes"] == 4 * description["weights"]["parameters"]
    assert "exists already" in failure(capsys, "convert", str(FAMILY), folder)


def test_info_tells_the_types_that_a_converted_folder_holds(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = str(tmp_path / "native")
    types = ("--quantization", "int8", "--dtype", "float32")
    assert main(["convert", str(FAMILY), folder, *types]) == 0
    capsys.readouterr()
    assert main(["info", "--model", folder, "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert (description["weights"]["dtype"], description["weights"]["quantization"]) == ("float32", "int8")
    assert main(["info", "--model", str(FAMILY), *types, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == description
    assert "holds int8 weights; quantization 'int4'" in failure(
        capsys, "info", "--model", folder, "--quantization", "int4"
    )


def test_info_says_that_there_is_no_compiler_for_the_attention_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    reason = NativeUnavailable("no C++ compiler found")
    monkeypatch.setattr("pallas_kernels.cpu_native.register", Mock(side_effect=reason))
    assert str(reason) in failure(capsys, "info", "--model", str(FAMILY), "--attention", "cpu_native")


def test_info_for_people_has_a_fact_a_line(capsys: pytest.CaptureFixture[str]):
    assert main(["info", "--max-context", "2048"]) == 0
    facts = dict(text.split(maxsplit=1) for text in capsys.readouterr().out.splitlines() if text.startswith(" "))
    assert (facts["parameters"], facts["context_pages"], facts["page_bytes"]) == ("134,515,008", "128", "368,640")


def test_info_counts_the_parameters_of_the_model_however_they_are_stored(capsys: pytest.CaptureFixture[str]):
    counted = []
    for quantization in ("none", "int8", "int4"):
        assert main(["info", "--model", str(FAMILY), "--quantization", quantization, "--json"]) == 0
        counted.append(json.loads(capsys.readouterr().out)["weights"]["parameters"])
    assert counted == counted[:1] * 3


def test_info_tells_the_context_that_an_engine_would_serve(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = shutil.copytree(FAMILY, tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131072}))
    assert main(["info", "--model", str(folder), "--slots", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache"]["context_tokens"] == 8192
    assert found["allocation"]["pages_for_all_slots"] == 4 * found["cache"]["context_pages"]
