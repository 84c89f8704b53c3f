"""Checkpoints of every format, loaded into one tree of parameters."""

from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from jaxserve.checkpoints import registry
from jaxserve.checkpoints.gguf import open_gguf
from jaxserve.checkpoints.huggingface import open_huggingface
from jaxserve.checkpoints.parameters import Progress, load_params
from jaxserve.checkpoints.tensors import Checkpoint, CheckpointError
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Quantization
from jaxserve.tokenizer_source import TokenizerSource


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be merged: `nnx.merge(graphdef, params)`."""

    graphdef: nnx.GraphDef
    params: nnx.State
    """On the default device."""
    config: ModelConfig
    tokenizer_source: TokenizerSource


def load_model(
    path_or_name: str, dtype: str, quantization: Quantization = "none", progress: Progress | None = None
) -> LoadedModel:
    """Loads a model by its name in `registry`, or from a `.gguf` file.

    Args:
        path_or_name: the checkpoint.
        dtype: of weights and activations, `bfloat16` or `float32`.
        quantization: `int8` quantizes the linear maps while they are loaded.
        progress: told what is being done, and the fraction of it.

    Raises CheckpointError, before anything large is allocated.
    """
    checkpoint = open_checkpoint(path_or_name)
    graphdef, params = load_params(checkpoint, dtype, quantization, progress or (lambda what, fraction: None))
    return LoadedModel(graphdef, params, checkpoint.config, checkpoint.tokenizer_source)


def open_checkpoint(path_or_name: str) -> Checkpoint:
    """Reads the headers of a checkpoint. Raises CheckpointError."""
    path = registry.find(path_or_name) if path_or_name in registry.MODELS else Path(path_or_name).expanduser()
    if not path.exists():
        known = ", ".join(registry.MODELS)
        raise CheckpointError(f"{path_or_name} is neither a file, nor a folder, nor a model known by name ({known})")
    if path.suffix == ".gguf":
        return open_gguf(path)
    if path.is_dir():
        return open_huggingface(path)
    raise CheckpointError(f"{path}: is not a checkpoint of a known format")


__all__ = ["Checkpoint", "CheckpointError", "LoadedModel", "load_model", "open_checkpoint"]
