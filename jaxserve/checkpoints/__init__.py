"""Checkpoints of every format, loaded into one tree of parameters."""

from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from jaxserve.checkpoints import registry
from jaxserve.checkpoints.folder import NATIVE_DESCRIPTION as DESCRIPTION
from jaxserve.checkpoints.folder import parse_json, read_json
from jaxserve.checkpoints.huggingface import open_huggingface
from jaxserve.checkpoints.parameters import Progress, load_params
from jaxserve.checkpoints.tensors import Checkpoint, CheckpointError
from jaxserve.device.sharding import Placement
from jaxserve.models.config import ModelConfig, UnsupportedModel
from jaxserve.models.huggingface_config import from_hf_config
from jaxserve.models.layers import Quantization
from jaxserve.models.published import PUBLISHED
from jaxserve.tokenizing.tokenizer_source import TokenizerSource


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be merged: `nnx.merge(graphdef, params)`."""

    graphdef: nnx.GraphDef
    params: nnx.State
    """On the devices of `placement`."""
    config: ModelConfig
    tokenizer_source: TokenizerSource
    placement: Placement


def load_model(
    path_or_name: str,
    dtype: str,
    quantization: Quantization = "none",
    progress: Progress | None = None,
    placement: Placement | None = None,
) -> LoadedModel:
    """Loads a model by its name in `registry`, a `.gguf` file, a Hugging Face folder or a folder made by `convert`.

    Args:
        path_or_name: the checkpoint.
        dtype: of weights and activations, `bfloat16` or `float32`.
        quantization: `int8` quantizes the linear maps while they are loaded.
        progress: told what is being done, and the fraction of it.
        placement: the devices that share the model; None takes the first.

    Raises CheckpointError, or PlacementError where the devices cannot share the model, before anything large is
    allocated.
    """
    placement = placement or Placement.of_replica()
    path = _resolve(path_or_name)
    progress = progress or (lambda what, fraction: None)
    if (path / DESCRIPTION).exists():
        # Imported here: Orbax takes a third of a second, which the other formats need not wait for.
        from jaxserve.checkpoints.orbax import load_orbax

        progress("restoring weights", None)
        return LoadedModel(*load_orbax(path, dtype, quantization, placement), placement)
    checkpoint = _open(path)
    placement.check(checkpoint.config)
    graphdef, params = load_params(checkpoint, dtype, quantization, progress, placement)
    return LoadedModel(graphdef, params, checkpoint.config, checkpoint.tokenizer_source, placement)


def describe_model(path_or_name: str) -> tuple[ModelConfig, TokenizerSource]:
    """A model's configuration and tokenizer, from its headers: no weights are read. Raises CheckpointError."""
    path = _resolve(path_or_name)
    if (path / DESCRIPTION).exists():
        from jaxserve.checkpoints.orbax import describe_orbax

        return describe_orbax(path)[:2]
    checkpoint = _open(path)
    return checkpoint.config, checkpoint.tokenizer_source


def describe_config(path_or_name: str) -> ModelConfig:
    """A model's configuration alone: of what `describe_model` takes, of a config.json without weights or tokenizer
    beside it, or of a shape in `models.published`. Raises CheckpointError."""
    path = Path(path_or_name).expanduser()
    file = path / "config.json" if path.is_dir() else path
    try:
        if file.suffix == ".json" and file.is_file():
            raw = parse_json(file, file.read_text(encoding="utf-8"))
            return from_hf_config(raw, read_json(file.parent, "generation_config.json"))
        if path_or_name in PUBLISHED:
            return PUBLISHED[path_or_name]
        return describe_model(path_or_name)[0]
    except (UnsupportedModel, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def convert(
    source: str, folder: str | Path, dtype: str, quantization: Quantization = "none", progress: Progress | None = None
) -> None:
    """Writes any checkpoint as a folder of the native format, which loads fastest. The folder must not exist.

    Raises CheckpointError.
    """
    from jaxserve.checkpoints.orbax import save_orbax

    path = Path(folder).expanduser()
    if path.exists():
        raise CheckpointError(f"{path}: exists already")
    model = load_model(source, dtype, quantization, progress)
    save_orbax(path, model.config, model.params, dtype, quantization, model.tokenizer_source)


def _open(path: Path) -> Checkpoint:
    if path.suffix != ".gguf" or not path.is_file():
        return open_huggingface(path)
    # The package gguf is imported by whoever reads such a file: a machine without it serves other checkpoints.
    from jaxserve.checkpoints.gguf import open_gguf

    return open_gguf(path)


def _resolve(path_or_name: str) -> Path:
    path = registry.find(path_or_name) if path_or_name in registry.MODELS else Path(path_or_name).expanduser()
    if not path.exists():
        known = ", ".join(registry.MODELS)
        raise CheckpointError(f"{path_or_name} is neither a file, nor a folder, nor a model known by name ({known})")
    if path.suffix != ".gguf" and not path.is_dir():
        raise CheckpointError(f"{path}: is not a checkpoint of a known format")
    return path


__all__ = ["CheckpointError", "LoadedModel", "convert", "describe_config", "describe_model", "load_model"]
