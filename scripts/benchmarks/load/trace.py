"""Traces of real traffic: when requests came, and how long they were. JSON lines or CSV, by the names that are usual:
Azure's (TIMESTAMP, ContextTokens, GeneratedTokens), Mooncake's (timestamp in ms, input_length, output_length), ours."""

import csv
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

NAMES = {
    "timestamp": ("timestamp", "TIMESTAMP", "arrival", "arrival_time"),
    "prompt": ("prompt_tokens", "input_length", "ContextTokens", "input_tokens"),
    "output": ("output_tokens", "output_length", "GeneratedTokens", "completion_tokens"),
}


class TraceError(ValueError):
    """A trace that cannot be used; says where and why."""


def read_trace(path: Path) -> list[tuple[float, int, int]]:
    """Seconds after the first request, prompt and output tokens of each, in order of time. Raises TraceError.

    Numbers are seconds; in a file that names `input_length` they are milliseconds, as Mooncake's are.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file)))
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: {error}") from error
    entries = []
    for number, row in enumerate(rows, 1):
        try:
            scale = 1e-3 if "input_length" in row else 1.0
            at = _seconds(_value(row, "timestamp"), scale)
            entries.append((at, int(_value(row, "prompt")), int(_value(row, "output"))))
        except (KeyError, ValueError, TypeError) as error:
            raise TraceError(f"{path}, entry {number}: {error}") from error
    if not entries:
        raise TraceError(f"{path}: has no entries")
    entries.sort()
    first = entries[0][0]
    return [(at - first, max(1, prompt), max(1, output)) for at, prompt, output in entries]


def _value(row: Mapping[str, str], what: str) -> str:
    for name in NAMES[what]:
        if name in row:
            return row[name]
    raise KeyError(f"has none of {', '.join(NAMES[what])}")


def _seconds(value: str | float, scale: float) -> float:
    try:
        return scale * float(value)
    except ValueError:
        text = str(value)
        # Azure writes seven digits of a second, one more than Python reads.
        head, dot, fraction = text.partition(".")
        return datetime.fromisoformat(head + dot + fraction[:6]).timestamp()
