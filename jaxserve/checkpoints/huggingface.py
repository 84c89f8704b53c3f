"""Hugging Face folders: config.json, safetensors in one file or in shards, and the tokenizer's files.

Nothing outside the folder is opened, no pickle is read, and no code of the folder is run.
"""

from pathlib import Path
from typing import Any

from jaxserve.checkpoints.folder import inside, read_json, read_text
from jaxserve.checkpoints.safetensors import read_safetensors
from jaxserve.checkpoints.tensors import Checkpoint, CheckpointError, StoredTensor
from jaxserve.models.config import ModelConfig, UnsupportedModel
from jaxserve.models.huggingface_config import from_hf_config
from jaxserve.tokenizing.tokenizer_source import HuggingFaceTokenizer, TokenizerSource

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_huggingface(folder: Path) -> Checkpoint:
    """Reads a folder's configuration and the headers of its weights. Raises CheckpointError naming the file."""
    raw = read_json(folder, "config.json")
    if raw is None:
        raise CheckpointError(f"{folder / 'config.json'}: is missing")
    try:
        config = from_hf_config(raw, read_json(folder, "generation_config.json"))
    except UnsupportedModel as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    return Checkpoint(folder, config, tokenizer_source(folder, config), _tensors(folder))


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    index = read_json(folder, _INDEX)
    if index is None:
        file = inside(folder, _WEIGHTS)
        if not file.exists():
            pickled = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _PICKLED)
            if pickled:
                raise CheckpointError(
                    f"{folder / pickled[0]}: is a pickle, which can run code and is never read; safetensors are needed"
                )
            raise CheckpointError(f"{file}: is missing")
        return read_safetensors(file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / _INDEX}: has no valid weight_map")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        file = inside(folder, name)
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{folder / _INDEX}: refers to {name!r}, which is not a safetensors file")
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing, though {_INDEX} refers to it")
        for tensor, stored in read_safetensors(file).items():
            if tensor in tensors:
                raise CheckpointError(f"{file}: tensor {tensor} is also in {tensors[tensor].file.name}")
            tensors[tensor] = stored
    for tensor, name in weight_map.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise CheckpointError(f"{folder / name}: tensor {tensor} is missing, though {_INDEX} places it there")
    return tensors


def tokenizer_source(folder: Path, config: ModelConfig) -> TokenizerSource:
    """The tokenizer's files in a folder. Raises CheckpointError."""
    tokenizer_json = read_text(folder, "tokenizer.json")
    if tokenizer_json is None:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: is missing")
    settings = read_json(folder, "tokenizer_config.json") or {}
    if "auto_map" in settings:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: auto_map asks for code from the model's folder, which is never run"
        )
    templates = _chat_templates(folder, settings)
    return TokenizerSource(
        tokenizer=HuggingFaceTokenizer(tokenizer_json, settings),
        vocab_size=config.vocab_size,
        bos_id=config.bos_id,
        eos_ids=config.eos_ids,
        add_bos=_flag(settings, "add_bos_token"),
        add_eos=_flag(settings, "add_eos_token"),
        chat_template=templates.get("default"),
        special_tokens=_special_tokens(settings, read_json(folder, "special_tokens_map.json") or {}),
        tool_template=templates.get("tool_use"),
    )


def _flag(settings: dict[str, Any], name: str) -> bool | None:
    value = settings.get(name)
    return value if isinstance(value, bool) else None


def _special_tokens(*given: dict[str, Any]) -> dict[str, str]:
    """Texts of the special tokens, `bos_token` and whatever else is named so, as in transformers; each is given as a
    string or as an object with `content`."""
    tokens: dict[str, str] = {}
    for settings in given:
        for name, value in settings.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens.setdefault(name, text)
    return tokens


def _chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """By name: `default`, and `tool_use` where chats with tools have another. From files of their own, or else, as in
    transformers, from the settings."""
    found: dict[str, object] = {
        "default": read_text(folder, "chat_template.jinja"),
        "tool_use": read_text(inside(folder, "additional_chat_templates"), "tool_use.jinja"),
    }
    if all(template is None for template in found.values()):
        given = settings.get("chat_template")
        listed = given if isinstance(given, list) else [{"name": "default", "template": given}]
        found = {str(entry.get("name")): entry.get("template") for entry in listed if isinstance(entry, dict)}
    return {name: template for name, template in found.items() if isinstance(template, str)}
