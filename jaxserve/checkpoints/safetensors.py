"""Safetensors files: the header, each entry checked against the file's size, and tensors read one at a time.

Format: https://huggingface.co/docs/safetensors. Parsed here rather than by the package, to name the tensor at fault and
to check everything before anything is allocated.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.checkpoints.tensors import CheckpointError, StoredTensor, read_bytes

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Types that are read."""

_MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. Raises CheckpointError where the header does not fit the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{file}: claims a header of {length} bytes; the file has {size}")
        header = _parse(file, stream.read(length))
    start = 8 + length
    tensors = {}
    end_of_last = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(file, *item)):
        begin, end = _offsets(file, name, entry)
        if begin < end_of_last:
            raise CheckpointError(f"{file}: tensor {name} overlaps another: its data_offsets are [{begin}, {end}]")
        end_of_last = end
        shape, dtype = _shape_and_dtype(file, name, entry)
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise CheckpointError(
                f"{file}: tensor {name} of shape {shape} and dtype {entry['dtype']} needs "
                f"{math.prod(shape) * dtype.itemsize} bytes; its data_offsets give {end - begin}"
            )
        if start + end > size:
            raise CheckpointError(f"{file}: tensor {name} ends at byte {start + end}; the file is truncated at {size}")
        read = partial(_read, file, name, start + begin, end - begin, shape, dtype)
        tensors[name] = StoredTensor(file, shape, read)
    return tensors


def _parse(file: Path, raw: bytes) -> dict[str, dict[str, Any]]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not isinstance(entry, dict):
            raise CheckpointError(f"{file}: the entry of tensor {name} is not a JSON object")
    return header


def _offsets(file: Path, name: str, entry: dict[str, Any]) -> tuple[int, int]:
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise CheckpointError(f"{file}: tensor {name} has no valid data_offsets: {offsets!r}")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{file}: tensor {name} has data_offsets that run backwards: [{begin}, {end}]")
    return begin, end


def _shape_and_dtype(file: Path, name: str, entry: dict[str, Any]) -> tuple[tuple[int, ...], np.dtype]:
    shape, dtype = entry.get("shape"), entry.get("dtype")
    if not isinstance(shape, list) or not all(_is_size(axis) for axis in shape):
        raise CheckpointError(f"{file}: tensor {name} has no valid shape: {shape!r}")
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name} has dtype {dtype!r}; {', '.join(DTYPES)} are supported")
    return tuple(shape), DTYPES[dtype]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _read(file: Path, name: str, offset: int, size: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return read_bytes(file, offset, size, name).view(dtype).reshape(shape)
