"""What every checkpoint format gives: a configuration, a tokenizer, and named tensors that are read one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.tokenizing.tokenizer_source import TokenizerSource


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and, where it is about one, the tensor."""


@dataclass(frozen=True)
class StoredBlocks:
    """A tensor that its file has in blocks, as `pallas_kernels.block_quantization` means them."""

    bits: int
    read: Callable[[], np.ndarray]
    """Reads them, uint8 [out, width], with the weights that the tensor's own `read` gives; raises CheckpointError."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, of which only the header has been read."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Reads the data into floating-point numpy of `shape`; raises CheckpointError."""
    blocks: StoredBlocks | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and checked."""

    path: Path
    config: ModelConfig
    tokenizer_source: TokenizerSource
    tensors: Mapping[str, StoredTensor]
    """By Hugging Face name, as `model.layers.0.self_attn.q_proj.weight`."""


def read_bytes(file: Path, offset: int, size: int, name: str) -> np.ndarray:
    """`size` bytes of a file from `offset`, as uint8; raises CheckpointError where the file ends before."""
    data = np.empty(size, np.uint8)
    with file.open("rb") as stream:
        stream.seek(offset)
        if stream.readinto(memoryview(data)) != size:
            raise CheckpointError(f"{file}: the data of tensor {name} is truncated")
    return data
