"""Checkpoints of every format, loaded into one tree of parameters."""

from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from jaxserve.checkpoints.description import describe_model, open_checkpoint, resolve
from jaxserve.checkpoints.native_folder import DESCRIPTION
from jaxserve.checkpoints.parameters import Progress, load_params
from jaxserve.checkpoints.tensors import CheckpointError
from jaxserve.config import Quantization
from jaxserve.device.sharding import Placement
from jaxserve.models.config import ModelConfig
from jaxserve.paths import user_path
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
    path = resolve(path_or_name)
    progress = progress or (lambda what, fraction: None)
    if (path / DESCRIPTION).exists():
        # Imported here: Orbax takes a third of a second, which the other formats need not wait for.
        from jaxserve.checkpoints.orbax import load_orbax

        progress("restoring weights", None)
        return LoadedModel(*load_orbax(path, dtype, quantization, placement), placement)
    checkpoint = open_checkpoint(path)
    placement.check(checkpoint.config)
    graphdef, params = load_params(checkpoint, dtype, quantization, progress, placement)
    return LoadedModel(graphdef, params, checkpoint.config, checkpoint.tokenizer_source, placement)


def convert(
    source: str, folder: str | Path, dtype: str, quantization: Quantization = "none", progress: Progress | None = None
) -> None:
    """Writes any checkpoint as a folder of the native format, which loads fastest. The folder must not exist.

    Raises CheckpointError; where the disk has no room, before weights are read.
    """
    from jaxserve.checkpoints.orbax import check_room, save_orbax

    path = user_path(folder)
    if path.exists():
        raise CheckpointError(f"{path}: exists already")
    check_room(path, describe_model(source)[0], dtype, quantization)
    model = load_model(source, dtype, quantization, progress)
    save_orbax(path, model.config, model.params, dtype, quantization, model.tokenizer_source)
