"""The header of a GGUF file: metadata and the table of tensors, every count and offset checked against the file's size.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader makes an array of
each of the vocabulary's strings, which takes seconds, and trusts the counts.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxserve.checkpoints.tensors import CheckpointError

Value = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` has the slowest axis first, as numpy; the file has it last."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Header:
    """Metadata by key, tensors by name."""

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def read_header(file: Path) -> Header:
    """Reads the header alone. Raises CheckpointError where it is malformed or points outside the file."""
    with file.open("rb") as stream:
        if stream.seek(0, 2) < 24:
            raise CheckpointError(f"{file}: is not a GGUF file: shorter than a header")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(file, data).header()


class _Reader:
    """A cursor over the header; each step checks that the file goes on as far."""

    def __init__(self, file: Path, data: mmap.mmap):
        self.file = file
        self.data = data
        self.at = 0

    def header(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise CheckpointError(f"{self.file}: is not a GGUF file: it starts with {self.data[:4]!r}")
        self.at = 4
        version = self.scalar("<I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.file}: GGUF version {version} is not supported (2 and 3 are)")
        num_tensors, num_values = self.count("tensors", 24), self.count("metadata values", 13)
        metadata: dict[str, Value] = {}
        for _ in range(num_values):
            key = self.string("a metadata key")
            metadata[key] = self.value(key, self.scalar("<I"))
        infos = [self.tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise CheckpointError(f"{self.file}: general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise CheckpointError(f"{self.file}: tensor {name} is listed twice")
            tensors[name] = self.placed(name, shape, kind, start + offset)
        return Header(metadata, tensors)

    def scalar(self, form: str) -> int:
        size = struct.calcsize(form)
        self.need(size, "the header")
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return value

    def need(self, size: int, what: str) -> None:
        if size > len(self.data) - self.at:
            raise CheckpointError(f"{self.file}: {what} is truncated, or its length of {size} bytes is wrong")

    def count(self, what: str, least_bytes: int) -> int:
        count = self.scalar("<Q")
        if count * least_bytes > len(self.data) - self.at:
            raise CheckpointError(f"{self.file}: claims {count} {what}, more than fit in the file")
        return count

    def string(self, what: str) -> str:
        size = self.scalar("<Q")
        self.need(size, what)
        raw = self.data[self.at : self.at + size]
        self.at += size
        return raw.decode("utf-8", errors="replace")

    def value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key, self.scalar("<I"))
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.file}: {key} has the unknown value type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self, key: str, kind: int) -> list:
        if kind == _STRING:
            return self.strings(key, self.count(f"elements of {key}", 8))
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.file}: {key} is an array of the unsupported type {kind}")
        size = struct.calcsize(_SCALARS[kind])
        count = self.count(f"elements of {key}", size)
        values = struct.unpack_from(f"<{count}{_SCALARS[kind][1]}", self.data, self.at)
        self.at += count * size
        return list(values)

    def strings(self, key: str, count: int) -> list[str]:
        """As `string`, `count` times; a vocabulary has 10^5, so with nothing but locals."""
        data, at, end = self.data, self.at, len(self.data)
        unpack = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            if at + 8 > end:
                raise CheckpointError(f"{self.file}: {key} is truncated")
            start = at + 8
            at = start + unpack(data, at)[0]
            if at > end:
                raise CheckpointError(f"{self.file}: {key} is truncated")
            strings.append(data[start:at].decode("utf-8", errors="replace"))
        self.at = at
        return strings

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor name")
        dimensions = self.scalar("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise CheckpointError(f"{self.file}: tensor {name} has {dimensions} dimensions (limit {_MAX_DIMENSIONS})")
        shape = tuple(self.scalar("<Q") for _ in range(dimensions))
        return name, shape[::-1], self.scalar("<I"), self.scalar("<Q")

    def placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError:
            raise CheckpointError(f"{self.file}: tensor {name} has the unknown type {kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        if not shape or shape[-1] % block:
            raise CheckpointError(f"{self.file}: tensor {name} of shape {shape} does not divide into blocks of {block}")
        size = math.prod(shape) // block * block_bytes
        if offset + size > len(self.data):
            raise CheckpointError(
                f"{self.file}: tensor {name} of shape {shape} ends at byte {offset + size}; "
                f"the file has {len(self.data)}: truncated, or a wrong shape or offset"
            )
        return TensorInfo(shape, quantization, offset, size)
