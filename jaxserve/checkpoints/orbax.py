"""The native format: parameters as the model has them, written by Orbax into a `native_folder`.

It loads faster than its source: nothing is fused, permuted, dequantized or cast.
"""

import asyncio
import shutil
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from jaxserve.checkpoints.native_folder import (
    DESCRIPTION,
    check_quantization,
    describe_folder,
    partial_folder,
    remove_partial,
    write_description,
)
from jaxserve.checkpoints.tensors import CheckpointError
from jaxserve.config import Quantization
from jaxserve.device.roofline import model_cost
from jaxserve.device.sharding import Placement, in_shard_order
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import abstract_llama
from jaxserve.models.parameters import named_parameters, with_values
from jaxserve.models.quantize import quantize_params
from jaxserve.tokenizing.tokenizer_source import TokenizerSource

_PARAMS = "params"


def check_room(folder: Path, config: ModelConfig, dtype: str, quantization: Quantization) -> None:
    """Raises CheckpointError where less of the disk is free than the weights take. A disk that fills while Orbax writes
    is found out, too, and Orbax then prints a traceback for each write that was under way."""
    needed = model_cost(config, dtype, quantization, 0, 1).weight_bytes
    free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.exists())).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: the weights take {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} are free there"
        )


def save_orbax(
    folder: Path,
    config: ModelConfig,
    params: nnx.State,
    dtype: str,
    quantization: Quantization,
    source: TokenizerSource,
) -> None:
    """Writes a folder, which does not exist, under its name only when it is complete. Raises CheckpointError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)  # of a killed process of this number
    partial = partial_folder(folder)
    try:
        partial.mkdir()
        with ocp.Checkpointer(_handler()) as checkpointer:
            checkpointer.save((partial / _PARAMS).absolute(), args=ocp.args.PyTreeSave(named_parameters(params)))
        write_description(partial, config, dtype, quantization, source)
        partial.rename(folder)
    except (OSError, ValueError) as error:  # TensorStore raises a bare ValueError where a disk is full
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    finally:
        remove_partial(folder)


def load_orbax(
    folder: Path, dtype: str, quantization: Quantization, placement: Placement
) -> tuple[nnx.GraphDef, nnx.State, ModelConfig, TokenizerSource]:
    """Restores a folder straight into the parameters' types and shards.

    A folder in another floating-point type is cast; one in floating point is quantized where that is asked for. Raises
    CheckpointError naming the file or the parameter.
    """
    config, source, stored_dtype, stored_quantization = describe_folder(folder)
    placement.check(config)
    check_quantization(folder, stored_quantization, quantization)
    with ocp.Checkpointer(_handler()) as checkpointer:
        _check_structure(folder, checkpointer, config, stored_dtype, stored_quantization)
        _, abstract = abstract_llama(config, dtype, stored_quantization)
        params = _restore(folder, checkpointer, abstract, config, placement)
    graphdef, _ = abstract_llama(config, dtype, quantization, shards=placement.shards)
    if quantization != stored_quantization:
        params = quantize_params(config, params, quantization)
    return graphdef, params, config, source


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Fails when nothing is read any more: Orbax then closes the event loop, on which TensorStore's reads report."""

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Sequence[ocp.metadata.ArrayMetadata]:
        return await _to_its_end(super().metadata(infos))

    async def deserialize(
        self, infos: Sequence[ocp.type_handlers.ParamInfo], args: Sequence[ocp.RestoreArgs] | None = None
    ) -> Sequence[jax.Array]:
        return await _to_its_end(super().deserialize(infos, args))


async def _to_its_end[T](work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, and where it fails, the tasks too that it has left running."""
    others = asyncio.all_tasks()
    try:
        return await work
    except Exception:
        await asyncio.gather(*(asyncio.all_tasks() - others), return_exceptions=True)
        raise


def _handler() -> ocp.PyTreeCheckpointHandler:
    handlers = ocp.type_handlers.create_type_handler_registry((jax.Array, _ArrayHandler()))
    # Compression would save a quarter of the size and cost twice the time to load.
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=False, use_compression=False, type_handler_registry=handlers
    )


def _check_structure(
    folder: Path, checkpointer: ocp.Checkpointer, config: ModelConfig, dtype: str, quantization: Quantization
) -> None:
    """Compares the described model's parameters with what is stored.

    Orbax itself casts and pads without a word. Raises CheckpointError naming the parameter.
    """
    metadata = checkpointer.metadata((folder / _PARAMS).absolute()).item_metadata
    if metadata is None:
        raise CheckpointError(f"{folder / _PARAMS}: is missing, damaged or not of Orbax")
    stored = dict(metadata.tree)
    if config.num_layers > len(stored):
        raise CheckpointError(f"{folder}: has {len(stored)} parameters for {config.num_layers} layers")
    expected = named_parameters(abstract_llama(config, dtype, quantization)[1])
    for name in sorted(expected.keys() ^ stored.keys()):
        problem = "is missing" if name in expected else "has no place in the model"
        raise CheckpointError(f"{folder / _PARAMS}: parameter {name} {problem}")
    for name, wanted in expected.items():
        found = (tuple(stored[name].shape), str(stored[name].dtype))
        if found != (wanted.shape, str(wanted.dtype)):
            raise CheckpointError(
                f"{folder / _PARAMS}: parameter {name} is {found[1]} of shape {found[0]}; "
                f"{DESCRIPTION} asks for {wanted.dtype} of shape {wanted.shape}"
            )


def _restore(
    folder: Path, checkpointer: ocp.Checkpointer, abstract: nnx.State, config: ModelConfig, placement: Placement
) -> nnx.State:
    targets = {
        name: jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=placement.parameter(name))
        for name, target in named_parameters(abstract).items()
    }
    arguments = ocp.args.PyTreeRestore(item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets))
    try:
        restored = checkpointer.restore((folder / _PARAMS).absolute(), args=arguments)
    except Exception as error:  # Orbax wraps what TensorStore raises for damaged data in a bare Exception.
        raise CheckpointError(f"{folder / _PARAMS}: cannot be read: {error}") from error
    if placement.tensor_parallel > 1:
        # Stored in the order of one device, each device has read a share of that: fused rows change devices here.
        for name, target in targets.items():
            reorder = partial(in_shard_order, name=name, model=config, shards=placement.shards)
            restored[name] = jax.jit(reorder, out_shardings=target.sharding)(restored[name])
    return with_values(abstract, restored)
