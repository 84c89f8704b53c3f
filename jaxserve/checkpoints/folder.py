"""Reading the files of a checkpoint folder, and none outside it."""

import json
from pathlib import Path
from typing import Any

from jaxserve.checkpoints.tensors import CheckpointError

_MAX_TEXT = 256 << 20
"""Bytes of the longest text file that is read; tokenizers of large vocabularies have tens of millions."""


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises CheckpointError where it would lie elsewhere, through `..` or a link."""
    file = folder / name
    if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise CheckpointError(f"{folder}: refers to {name!r}; only files directly in the folder are opened")
    if file.resolve().parent != folder.resolve():
        raise CheckpointError(
            f"{file}: is a link out of the folder, which is not followed: copy the files into one folder"
        )
    return file


def read_text(folder: Path, name: str) -> str | None:
    """Content of a text file of `folder`; None where there is none. Raises CheckpointError."""
    file = inside(folder, name)
    if not file.exists():
        return None
    if not file.is_file():
        raise CheckpointError(f"{file}: is not a file")
    if file.stat().st_size > _MAX_TEXT:
        raise CheckpointError(f"{file}: has {file.stat().st_size} bytes (limit {_MAX_TEXT})")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is not UTF-8: {error}") from None


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Content of a JSON object file of `folder`; None where there is none. Raises CheckpointError."""
    text = read_text(folder, name)
    return None if text is None else parse_json(folder / name, text)


def parse_json(file: Path, text: str) -> dict[str, Any]:
    """Parses a JSON object. Raises CheckpointError naming the file."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: is not a JSON object")
    return value
