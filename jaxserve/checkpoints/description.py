"""What a checkpoint of any format says of itself, without JAX and without its weights."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from jaxserve.checkpoints import registry
from jaxserve.checkpoints.folder import parse_json, read_json
from jaxserve.checkpoints.huggingface import open_huggingface
from jaxserve.checkpoints.native_folder import DESCRIPTION, check_quantization, describe_folder
from jaxserve.checkpoints.tensors import Checkpoint, CheckpointError
from jaxserve.config import EngineConfig
from jaxserve.models.config import ModelConfig, UnsupportedModel
from jaxserve.models.huggingface_config import from_hf_config
from jaxserve.models.published import PUBLISHED
from jaxserve.paths import user_path
from jaxserve.tokenizing.tokenizer_source import TokenizerSource


def describe_model(path_or_name: str) -> tuple[ModelConfig, TokenizerSource]:
    """A model's configuration and tokenizer, from its headers: no weights are read. Raises CheckpointError."""
    path = resolve(path_or_name)
    if (path / DESCRIPTION).exists():
        return describe_folder(path)[:2]
    checkpoint = open_checkpoint(path)
    return checkpoint.config, checkpoint.tokenizer_source


def as_stored(config: EngineConfig) -> EngineConfig:
    """`config`, with the quantization of its model's folder where `jaxserve convert` has quantized that one. Raises
    CheckpointError where another quantization is asked for."""
    folder = user_path(config.model)
    if config.model in registry.MODELS or not (folder / DESCRIPTION).exists():
        return config
    held = describe_folder(folder)[3]
    if config.quantization == "none":
        return replace(config, quantization=held)
    check_quantization(folder, held, config.quantization)
    return config


def describe_config(path_or_name: str) -> ModelConfig:
    """A model's configuration alone: of what `describe_model` takes, of a config.json without weights or tokenizer
    beside it, or of a shape in `models.published`. Raises CheckpointError."""
    path = user_path(path_or_name)
    file = path / "config.json" if path.is_dir() else path
    try:
        if file.suffix == ".json" and file.is_file():
            raw = parse_json(file, file.read_text(encoding="utf-8"))
            return from_hf_config(raw, read_json(file.parent, "generation_config.json"))
        if path_or_name in PUBLISHED:
            return PUBLISHED[path_or_name]
        if not path.exists():
            raise _unknown(path_or_name, PUBLISHED)
        return describe_model(path_or_name)[0]
    except (UnsupportedModel, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def open_checkpoint(path: Path) -> Checkpoint:
    """A `.gguf` file or a Hugging Face folder. Raises CheckpointError."""
    if path.suffix != ".gguf" or not path.is_file():
        return open_huggingface(path)
    # The package gguf is imported by whoever reads such a file: a machine without it serves other checkpoints.
    from jaxserve.checkpoints.gguf import open_gguf

    return open_gguf(path)


def resolve(path_or_name: str) -> Path:
    """The file or folder of what `load_model` takes. Raises CheckpointError."""
    path = registry.find(path_or_name) if path_or_name in registry.MODELS else user_path(path_or_name)
    if not path.exists():
        raise _unknown(path_or_name, registry.MODELS)
    if path.suffix != ".gguf" and not path.is_dir():
        raise CheckpointError(f"{path}: is not a checkpoint of a known format")
    return path


def _unknown(path_or_name: str, names: Iterable[str]) -> CheckpointError:
    known = ", ".join(names)
    return CheckpointError(f"{path_or_name} is neither a file, nor a folder, nor a model known by name ({known})")
