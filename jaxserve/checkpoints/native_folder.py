"""A folder of the native format, but for its weights, which `orbax` writes and reads.

It holds `jaxserve.json` (configuration, types, the tokenizer's settings), the tokenizer's own files, and `params/`.
"""

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from jaxserve.checkpoints.folder import read_json, read_text
from jaxserve.checkpoints.tensors import CheckpointError
from jaxserve.config import Quantization
from jaxserve.models.config import ModelConfig, UnsupportedModel, with_tuples
from jaxserve.tokenizing.tokenizer_source import GGUFTokenizer, HuggingFaceTokenizer, TokenizerSource

DESCRIPTION = "jaxserve.json"
"""The file that marks a folder as of the native format."""

_VERSION = 1
_REMOVALS = 1000
"""Tries, of 5 ms and more, to remove what is written to meanwhile."""
_GGUF_TOKENIZER = "tokenizer_gguf.json"
_TEMPLATES = {"chat_template": "chat_template.jinja", "tool_template": "tool_template.jinja"}
_IN_FILES = ("tokenizer", *_TEMPLATES)
"""Fields of TokenizerSource that have files of their own."""


def partial_folder(folder: Path) -> Path:
    """Where this process writes a folder until it is complete."""
    return folder.with_name(f".{folder.name}-{os.getpid()}")


def remove_partial(folder: Path) -> None:
    """Removes what was written of a folder, though other threads may be writing still."""
    partial = partial_folder(folder)
    for _ in range(_REMOVALS):
        shutil.rmtree(partial, ignore_errors=True)
        if not partial.exists():
            return
        time.sleep(0.005)


def describe_folder(folder: Path) -> tuple[ModelConfig, TokenizerSource, str, Quantization]:
    """Configuration, tokenizer, dtype and quantization of a folder. Raises CheckpointError naming the file."""
    _refuse_links(folder)
    description = read_json(folder, DESCRIPTION) or {}
    file = folder / DESCRIPTION
    if description.get("version") != _VERSION:
        raise CheckpointError(f"{file}: version {description.get('version')!r} is not supported, only {_VERSION}")
    try:
        config = ModelConfig.from_json(description["config"])
        dtype, quantization = description["dtype"], description["quantization"]
        if dtype not in ("bfloat16", "float32") or quantization not in get_args(Quantization):
            raise CheckpointError(f"{file}: dtype {dtype!r}, quantization {quantization!r} are not known")
        _check_files(folder, description["files"])
        source = _read_tokenizer(folder, description["tokenizer"])
    except (KeyError, TypeError, UnsupportedModel) as error:
        raise CheckpointError(f"{file}: {error}") from None
    return config, source, dtype, quantization


def check_quantization(folder: Path, held: Quantization, asked: Quantization) -> None:
    """Raises CheckpointError where a folder's weights are quantized otherwise than asked for."""
    if held not in ("none", asked):
        raise CheckpointError(f"{folder}: holds {held} weights; quantization {asked!r} was asked for")


def write_description(
    folder: Path, config: ModelConfig, dtype: str, quantization: Quantization, source: TokenizerSource
) -> None:
    """Writes all but the weights into a folder that has these already."""
    _write_tokenizer(folder, source)
    description = {
        "version": _VERSION,
        "dtype": dtype,
        "quantization": quantization,
        "config": config.to_json(),
        "files": _file_sizes(folder),
        "tokenizer": {name: value for name, value in vars(source).items() if name not in _IN_FILES},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, source: TokenizerSource) -> None:
    match source.tokenizer:
        case HuggingFaceTokenizer(tokenizer_json, tokenizer_config):
            (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
            (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1), encoding="utf-8")
        case GGUFTokenizer():
            text = json.dumps(asdict(source.tokenizer), ensure_ascii=False)
            (folder / _GGUF_TOKENIZER).write_text(text, encoding="utf-8")
    for field, name in _TEMPLATES.items():
        template = getattr(source, field)
        if template is not None:
            (folder / name).write_text(template, encoding="utf-8")


def _read_tokenizer(folder: Path, settings: dict[str, Any]) -> TokenizerSource:
    """The inverse of `_write_tokenizer`. Raises CheckpointError, KeyError or TypeError."""
    from_gguf = read_json(folder, _GGUF_TOKENIZER)
    tokenizer: HuggingFaceTokenizer | GGUFTokenizer
    if from_gguf is not None:
        tokenizer = GGUFTokenizer(**with_tuples(from_gguf))
    else:
        tokenizer_json = read_text(folder, "tokenizer.json")
        if tokenizer_json is None:
            raise CheckpointError(f"{folder / 'tokenizer.json'}: is missing")
        tokenizer = HuggingFaceTokenizer(tokenizer_json, read_json(folder, "tokenizer_config.json") or {})
    settings = {**settings, "eos_ids": tuple(settings["eos_ids"])}
    templates = {field: read_text(folder, name) for field, name in _TEMPLATES.items()}
    return TokenizerSource(tokenizer=tokenizer, **templates, **settings)


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file but the description, by its path in the folder."""
    files = (file for file in folder.rglob("*") if file.is_file() and file != folder / DESCRIPTION)
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(files)}


def _check_files(folder: Path, expected: dict[str, int]) -> None:
    """Finds a lost or truncated file at once; Orbax may notice one only when all else has been read."""
    if not isinstance(expected, dict):
        raise CheckpointError(f"{folder / DESCRIPTION}: files is not an object")
    found = _file_sizes(folder)
    for name, size in expected.items():
        if name not in found:
            raise CheckpointError(f"{folder / name}: is missing")
        if found[name] != size:
            raise CheckpointError(f"{folder / name}: has {found[name]} bytes, and was written with {size}: truncated?")


def _refuse_links(folder: Path) -> None:
    for entry in folder.rglob("*"):
        if entry.is_symlink():
            raise CheckpointError(f"{entry}: is a link, which is not followed")
