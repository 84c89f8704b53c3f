"""Hugging Face folders: what is read, what is refused, and that an error names the file and the tensor."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoints.huggingface import open_huggingface
from jaxserve.checkpoints.loading import load_model
from jaxserve.checkpoints.tensors import CheckpointError
from jaxserve.models.parameters import named_parameters
from jaxserve.tokenizing.tokenizer_source import HuggingFaceTokenizer

FAMILIES = Path(__file__).parent.parent / "fixtures" / "families"
WEIGHTS = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a model in one file, tied."""
    return Path(shutil.copytree(FAMILIES / "smollm2", tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path) -> Path:
    return Path(shutil.copytree(FAMILIES / "llama3", tmp_path / "model"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_header(file: Path, **changes: Any) -> None:
    """Changes the entry of the embedding in a safetensors header, leaving the data where it is."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[EMBEDDING] |= changes
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(str(folder), "float32")


def test_shards_and_types_are_put_together(sharded):
    model = load_model(str(sharded), "float32")
    tensors = {name: values for file in sharded.glob("*.safetensors") for name, values in load_file(file).items()}
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert tensors[EMBEDDING].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(named_parameters(model.params)["embedding"], tensors[EMBEDDING].astype(np.float32))
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"].astype(np.float32) for name in "qkv"]
    fused = named_parameters(model.params)["layers.1.attention.qkv.weight"]
    np.testing.assert_array_equal(fused, np.concatenate(parts))


def test_a_model_is_loaded_in_the_type_asked_for(folder):
    params = named_parameters(load_model(str(folder), "bfloat16").params)
    assert params["embedding"].dtype == ml_dtypes.bfloat16
    assert params["norm.weight"].dtype == np.float32


def test_tokenizer_files_and_settings_come_along(sharded):
    source = load_model(str(sharded), "float32").tokenizer_source
    assert isinstance(source.tokenizer, HuggingFaceTokenizer)
    assert json.loads(source.tokenizer.tokenizer_json)["model"]["type"] == "BPE"
    assert source.special_tokens["eos_token"] == "<|end|>"
    assert source.chat_template is not None
    assert source.chat_template.startswith("{{ bos_token }}")
    assert source.eos_ids == (0, 2)
    assert source.add_bos is None


def test_the_default_of_several_chat_templates_is_taken_and_the_one_for_tools(folder):
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": name, "template": f"of {name}"} for name in ("rag", "tool_use", "default")]
    edit_json(folder / "tokenizer_config.json", chat_template=templates, eos_token={"content": "<|turn|>"})
    source = load_model(str(folder), "float32").tokenizer_source
    assert (source.chat_template, source.tool_template) == ("of default", "of tool_use")
    assert source.special_tokens["eos_token"] == "<|turn|>"


def test_every_special_token_that_is_named_is_known_to_chat_templates(folder):
    edit_json(folder / "tokenizer_config.json", sep_token="<|turn|>", image_token={"content": "x"}, add_bos_token=True)
    tokens = open_huggingface(folder).tokenizer_source.special_tokens
    assert (tokens["sep_token"], tokens["image_token"]) == ("<|turn|>", "x")
    assert "add_bos_token" not in tokens


def test_chat_templates_in_files_come_before_those_of_the_settings(folder):
    edit_json(folder / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "of the settings"}])
    assert open_huggingface(folder).tokenizer_source.tool_template is None
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("of a file")
    assert open_huggingface(folder).tokenizer_source.tool_template == "of a file"
    (folder / "additional_chat_templates").rename(folder.parent / "elsewhere")
    (folder / "additional_chat_templates").symlink_to(folder.parent / "elsewhere")
    refused(folder, "additional_chat_templates: is a link out of the folder")


def test_progress_ends_at_one(folder):
    fractions = []
    load_model(str(folder), "float32", progress=lambda what, fraction: fractions.append(fraction))
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "sub/weights.safetensors", "..", "a\\b"])
def test_an_index_that_points_out_of_the_folder_is_refused(sharded, name):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"][EMBEDDING] = name
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, "only files directly in the folder")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "generation_config.json"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(folder, f"{name}: is a link out of the folder")


def test_a_folder_that_is_itself_a_link_is_read(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    load_model(str(tmp_path / "link"), "float32")


def test_pickled_weights_are_refused(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin: is a pickle")


def test_an_index_of_pickles_is_refused(sharded):
    index = {"weight_map": {EMBEDDING: "pytorch_model.bin"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, "not a safetensors file")


def test_code_in_the_folder_is_refused(folder):
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.py", None]})
    refused(folder, r"tokenizer_config\.json: auto_map")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.Model"})
    refused(folder, r"config\.json: auto_map")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, f"{name}: is missing")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": ' * 100_000, "\ufffe{"])
def test_a_damaged_configuration_is_named(folder, content):
    (folder / "config.json").write_text(content, encoding="utf-8")
    refused(folder, r"config\.json: ")


def test_a_missing_shard_is_named(sharded):
    next(iter(sharded.glob("model-00002*"))).unlink()
    refused(sharded, r"model-00002-of-\d+\.safetensors: is missing")


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.x"] = next(iter(index["weight_map"].values()))
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, r"tensor model\.layers\.9\.x is missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [320, 63]}, r"shape \(320, 63\) and dtype BF16 needs 40320 bytes"),
        ({"shape": [2**62, 2**62]}, "needs"),
        ({"shape": [2**70, 64]}, "no valid shape"),
        ({"shape": [-1, 64]}, "no valid shape"),
        ({"shape": [320.0, 64]}, "no valid shape"),
        ({"dtype": "F32"}, "dtype F32 needs"),
        ({"dtype": "I8"}, "dtype 'I8'"),
        ({"dtype": None}, "dtype None"),
        ({"data_offsets": [2**62, 2**62 + 40960]}, "ends at byte"),
        ({"data_offsets": [40960, 0]}, "backwards"),
        ({"data_offsets": [0]}, "no valid data_offsets"),
        ({"data_offsets": [-2, 40958]}, "no valid data_offsets"),
    ],
)
def test_a_wrong_header_entry_names_the_tensor(folder, changes, message):
    edit_header(folder / WEIGHTS, **changes)
    refused(folder, rf"model\.safetensors: tensor {EMBEDDING} .*{message}")


def test_overlapping_tensors_are_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({EMBEDDING: tensors[EMBEDDING], "another": tensors[EMBEDDING]}, folder / WEIGHTS)
    edit_header(folder / WEIGHTS, data_offsets=[2, 40962])
    refused(folder, "overlaps another")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9])
def test_a_header_longer_than_the_file_is_refused(folder, length):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])
    refused(folder, rf"model\.safetensors: claims a header of {length} bytes")


@pytest.mark.parametrize("keep", [0, 4, 8, 100])
def test_a_file_cut_off_in_the_header_is_named(folder, keep):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    refused(folder, r"model\.safetensors: ")


def test_a_file_cut_off_in_the_data_names_the_tensor(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-2])
    refused(folder, r"model\.safetensors: tensor model\.\S+ ends at byte \d+; the file is truncated")


def test_a_missing_a_misshapen_and_a_needless_tensor_are_named(folder):
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, folder / WEIGHTS)
    refused(folder, f"tensor {name} is missing")
    save_file({**tensors, name: tensors[name][:, 1:].copy()}, folder / WEIGHTS)
    refused(folder, rf"tensor {name} has shape \(64, 95\); the configuration asks for \(64, 96\)")
    save_file({**tensors, "model.layers.1.self_attn.q_proj.bias": tensors["model.norm.weight"]}, folder / WEIGHTS)
    refused(folder, r"tensor model\.layers\.1\.self_attn\.q_proj\.bias has no place")


def test_a_redundant_lm_head_and_old_buffers_are_ignored(folder):
    tensors = load_file(folder / WEIGHTS)
    extra = {
        "lm_head.weight": tensors[EMBEDDING],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    save_file({**tensors, **extra}, folder / WEIGHTS)
    load_model(str(folder), "float32")


def test_a_configuration_of_a_billion_layers_is_refused_at_once(folder):
    edit_json(folder / "config.json", num_hidden_layers=10**9)
    refused(folder, "tensors for 1000000000 layers")


@pytest.mark.parametrize("name", ["no-such-model", "no/such/folder"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(CheckpointError, match="smollm2-135m"):
        load_model(name, "float32")


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    refused(tmp_path / "model.bin", "not a checkpoint of a known format")
