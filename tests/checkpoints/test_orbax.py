"""The native format: what is written comes back, and what does not fit its description is refused."""

import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.checkpoints import loading
from jaxserve.checkpoints.loading import convert, load_model
from jaxserve.checkpoints.tensors import CheckpointError
from jaxserve.config import EngineConfig
from jaxserve.engine import Engine, EngineStartError
from jaxserve.models.parameters import named_parameters

FAMILIES = Path(__file__).parent.parent / "fixtures" / "families"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "model"
    convert(str(FAMILIES / "qwen2"), folder, "bfloat16")
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def describe(folder: Path, **changes: Any) -> None:
    file = folder / "jaxserve.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", "none"), ("float32", "none"), ("bfloat16", "int8"), ("bfloat16", "int4")]
)
def test_a_converted_model_is_the_model(tmp_path, name, dtype, quantization):
    convert(str(FAMILIES / name), tmp_path / "native", dtype, quantization)
    ours = load_model(str(tmp_path / "native"), dtype, quantization)
    theirs = load_model(str(FAMILIES / name), dtype, quantization)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert jax.tree.map(lambda x: x.dtype, ours.params) == jax.tree.map(lambda x: x.dtype, theirs.params)
    assert (ours.config, ours.tokenizer_source) == (theirs.config, theirs.tokenizer_source)
    assert ours.graphdef == theirs.graphdef


def test_a_converted_model_keeps_its_chat_template_for_tools(tmp_path):
    copy = shutil.copytree(FAMILIES / "qwen2", tmp_path / "copy")
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    convert(str(copy), tmp_path / "native", "bfloat16")
    source = load_model(str(tmp_path / "native"), "bfloat16").tokenizer_source
    assert source == load_model(str(copy), "bfloat16").tokenizer_source
    assert source.tool_template == "{{ tools }}"


def test_floating_point_weights_are_quantized_on_loading(original):
    ours = load_model(str(original), "bfloat16", "int8")
    theirs = load_model(str(FAMILIES / "qwen2"), "bfloat16", "int8")
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_another_type_is_cast_to(original):
    ours, theirs = load_model(str(original), "float32"), load_model(str(original), "bfloat16")
    assert named_parameters(ours.params)["embedding"].dtype == np.float32
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), ours.params, theirs.params)


def test_an_existing_folder_is_not_written_over(original):
    with pytest.raises(CheckpointError, match="exists already"):
        convert(str(FAMILIES / "qwen3"), original, "bfloat16")


def test_a_disk_without_room_for_the_weights_is_told_before_they_are_read(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1_000))
    monkeypatch.delattr(loading, "load_model")
    with pytest.raises(CheckpointError, match=r"new/native: the weights take 0\.\d MB, and 0\.0 are free there"):
        convert(str(FAMILIES / "qwen2"), tmp_path / "new" / "native", "bfloat16")
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_behind_but_the_folder(original):
    assert [entry.name for entry in original.parent.iterdir()] == ["model"]


def test_int8_weights_do_not_become_floating_point(tmp_path):
    convert(str(FAMILIES / "qwen2"), tmp_path / "native", "bfloat16", "int8")
    with pytest.raises(CheckpointError, match="holds int8 weights"):
        load_model(str(tmp_path / "native"), "bfloat16")


def test_an_engine_serves_a_folder_of_int8_weights_without_being_told(tmp_path):
    source, folder = str(FAMILIES / "qwen2"), str(tmp_path / "native")
    convert(source, folder, "bfloat16", "int8")
    answers = []
    for config in (EngineConfig(folder), EngineConfig(source, quantization="int8")):
        with Engine(config, slots=2, small_slots=1, prefill_chunks=(16,), max_context=64) as engine:
            assert engine.config.quantization == "int8"
            answers.append(engine.generate([{"token_ids": [5, 6, 7]}], temperature=0.0, max_tokens=8)[0].token_ids)
    assert answers[0] == answers[1]
    with pytest.raises(EngineStartError, match="holds int8 weights; quantization 'int4' was asked for"):
        Engine(model=folder, quantization="int4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 7}, "version 7"),
        ({"dtype": "float32"}, "is bfloat16 of shape .* asks for float32"),
        ({"dtype": "float64"}, "dtype 'float64'"),
        ({"quantization": "int8"}, "is missing"),
        ({"config": {}}, "is not a model configuration"),
        ({"tokenizer": {}}, "eos_ids"),
        ({"files": ["params"]}, "files is not an object"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(folder, changes, message):
    describe(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(folder), "bfloat16", "int8" if "quantization" in changes else "none")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 321, r"parameter embedding is bfloat16 of shape \(320, 64\).*\(321, 64\)"),
        ("qk_norm", True, r"parameter layers\.0\.attention\.k_norm\.weight is missing"),
        ("qkv_bias", False, r"parameter layers\.0\.attention\.qkv\.bias has no place"),
        ("num_layers", 3, r"parameter layers\.2\.\S+ is missing"),
        ("num_layers", 10**9, "parameters for 1000000000 layers"),
        ("family", "gpt2", "architecture 'gpt2'"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(folder, field, value, message):
    config = json.loads((folder / "jaxserve.json").read_text())["config"]
    describe(folder, config={**config, field: value})
    with pytest.raises(CheckpointError, match=message):
        load_model(str(folder), "bfloat16")


def test_a_truncated_and_a_missing_file_are_named(folder):
    for file in [file for file in folder.rglob("*") if file.is_file() and file.name != "jaxserve.json"]:
        data = file.read_bytes()
        file.write_bytes(data[:-1])
        with pytest.raises(CheckpointError, match=f"{file.name}: has {len(data) - 1} bytes"):
            load_model(str(folder), "bfloat16")
        file.unlink()
        with pytest.raises(CheckpointError, match=f"{file.name}: is missing"):
            load_model(str(folder), "bfloat16")
        file.write_bytes(data)
    load_model(str(folder), "bfloat16")


@pytest.mark.parametrize(("damaged", "problem"), [("index", "is missing, damaged or not of"), ("arrays", "cannot be")])
def test_damaged_weights_are_refused_and_nothing_reads_on(folder, damaged, problem, monkeypatch):
    """A read that ends after Orbax's event loop was closed can tell it to nobody but `unraisablehook`."""
    untold: list[sys.UnraisableHookArgs] = []
    monkeypatch.setattr(sys, "unraisablehook", untold.append)
    if damaged == "index":
        for file in (folder / "params" / "d").iterdir():
            file.write_bytes(bytes(file.stat().st_size))
    else:
        file = max((folder / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        files = json.loads((folder / "jaxserve.json").read_text())["files"]
        describe(folder, files={**files, str(file.relative_to(folder)): file.stat().st_size})
    for _ in range(3):
        with pytest.raises(CheckpointError, match=f"copy/params: {problem}"):
            load_model(str(folder), "bfloat16")
    time.sleep(0.3)  # what would still be read, would be by now
    assert not untold


def test_a_link_is_refused(folder, tmp_path):
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link"):
        load_model(str(folder), "bfloat16")
