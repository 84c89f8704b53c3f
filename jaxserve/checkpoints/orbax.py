"""The native format: parameters as the model has them, written by Orbax, with the configuration and tokenizer beside.

A folder holds `jaxserve.json` (configuration, types, the tokenizer's settings), the tokenizer's own files, and
`params/`. It loads faster than its source: nothing is fused, permuted, dequantized or cast.
"""

import json
import shutil
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import orbax.checkpoint as ocp
from flax import nnx

from jaxserve.checkpoints.folder import NATIVE_DESCRIPTION as DESCRIPTION
from jaxserve.checkpoints.folder import read_json, read_text
from jaxserve.checkpoints.tensors import CheckpointError
from jaxserve.device.sharding import Placement, in_shard_order
from jaxserve.models.config import ModelConfig, UnsupportedModel
from jaxserve.models.layers import Quantization
from jaxserve.models.llama import abstract_llama
from jaxserve.models.parameters import named_parameters, with_values
from jaxserve.models.quantize import quantize_params
from jaxserve.tokenizing.tokenizer_source import GGUFTokenizer, HuggingFaceTokenizer, TokenizerSource

_VERSION = 1
_PARAMS = "params"
_GGUF_TOKENIZER = "tokenizer_gguf.json"
_CHAT_TEMPLATE = "chat_template.jinja"
_IN_FILES = ("tokenizer", "chat_template")
"""Fields of TokenizerSource that have files of their own."""


def save_orbax(
    folder: Path,
    config: ModelConfig,
    params: nnx.State,
    dtype: str,
    quantization: Quantization,
    source: TokenizerSource,
) -> None:
    """Writes a folder, which must not exist. It appears under its name only when it is complete."""
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with ocp.Checkpointer(_handler()) as checkpointer:
            checkpointer.save((partial / _PARAMS).absolute(), args=ocp.args.PyTreeSave(named_parameters(params)))
        _write_tokenizer(partial, source)
        description = {
            "version": _VERSION,
            "dtype": dtype,
            "quantization": quantization,
            "config": config.to_json(),
            "files": _file_sizes(partial),
            "tokenizer": {name: value for name, value in vars(source).items() if name not in _IN_FILES},
        }
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def describe_orbax(folder: Path) -> tuple[ModelConfig, TokenizerSource, str, Quantization]:
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


def load_orbax(
    folder: Path, dtype: str, quantization: Quantization, placement: Placement
) -> tuple[nnx.GraphDef, nnx.State, ModelConfig, TokenizerSource]:
    """Restores a folder straight into the parameters' types and shards.

    A folder in another floating-point type is cast; one in floating point is quantized where that is asked for. Raises
    CheckpointError naming the file or the parameter.
    """
    config, source, stored_dtype, stored_quantization = describe_orbax(folder)
    placement.check(config)
    if stored_quantization not in ("none", quantization):
        raise CheckpointError(
            f"{folder}: holds {stored_quantization} weights; quantization {quantization!r} was asked for"
        )
    with ocp.Checkpointer(_handler()) as checkpointer:
        _check_structure(folder, checkpointer, config, stored_dtype, stored_quantization)
        _, abstract = abstract_llama(config, dtype, stored_quantization)
        params = _restore(folder, checkpointer, abstract, config, placement)
    graphdef, _ = abstract_llama(config, dtype, quantization, shards=placement.shards)
    if quantization != stored_quantization:
        params = quantize_params(config, params, quantization)
    return graphdef, params, config, source


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Compression would save a quarter of the size and cost twice the time to load.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)


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


def _write_tokenizer(folder: Path, source: TokenizerSource) -> None:
    match source.tokenizer:
        case HuggingFaceTokenizer(tokenizer_json, tokenizer_config):
            (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
            (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1), encoding="utf-8")
        case GGUFTokenizer():
            text = json.dumps(asdict(source.tokenizer), ensure_ascii=False)
            (folder / _GGUF_TOKENIZER).write_text(text, encoding="utf-8")
    if source.chat_template is not None:
        (folder / _CHAT_TEMPLATE).write_text(source.chat_template, encoding="utf-8")


def _read_tokenizer(folder: Path, settings: dict[str, Any]) -> TokenizerSource:
    """The inverse of `_write_tokenizer`. Raises CheckpointError, KeyError or TypeError."""
    from_gguf = read_json(folder, _GGUF_TOKENIZER)
    tokenizer: HuggingFaceTokenizer | GGUFTokenizer
    if from_gguf is not None:
        # JSON has lists where the dataclass has tuples.
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in from_gguf.items()}
        tokenizer = GGUFTokenizer(**given)
    else:
        tokenizer_json = read_text(folder, "tokenizer.json")
        if tokenizer_json is None:
            raise CheckpointError(f"{folder / 'tokenizer.json'}: is missing")
        tokenizer = HuggingFaceTokenizer(tokenizer_json, read_json(folder, "tokenizer_config.json") or {})
    settings = {**settings, "eos_ids": tuple(settings["eos_ids"])}
    return TokenizerSource(tokenizer=tokenizer, chat_template=read_text(folder, _CHAT_TEMPLATE), **settings)


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
