"""Numbers into figures, and figures onto the terminal."""

import json
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

Figure = float | int | str | bool | None
Result = Mapping[str, "Figure | Result | Sequence[Figure] | Sequence[Result]"]
"""What a benchmark reports: JSON, in its own words."""


def percentiles(values: Sequence[float], name: str, scale: float = 1.0) -> dict[str, float | None]:
    """`name_p50`, `name_p90` and `name_p99` of values times `scale`; None where there are none."""
    return {
        f"{name}_p{percent}": rounded(scale * float(np.percentile(values, percent))) if values else None
        for percent in (50, 90, 99)
    }


def median_of(rounds: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """Rounds of the same figures into one: the median of each number; of anything else, the last."""
    result: dict[str, Figure] = {}
    for name, last in rounds[-1].items():
        numbers = [value for one in rounds if isinstance(value := one[name], int | float)]
        is_number = isinstance(last, int | float) and not isinstance(last, bool)
        result[name] = rounded(statistics.median(numbers)) if is_number else last
    return result


def rounded(value: float) -> float:
    """Four significant digits, and no fewer than those before the point: 12345.6 is 12346. Integers stay."""
    return value if isinstance(value, int) else round(value) if abs(value) >= 1000 else float(f"{value:.4g}")


def report(result: Result, as_json: bool, also: Result | None = None) -> None:
    """Prints a result, a figure a line; if `as_json`, one JSON object with it and `also` as the last line besides."""
    width = max(len(line) for line, _ in _lines(result))
    for name, value in _lines(result):
        print(f"{name:{width}}  {value}")
    if as_json:
        print(json.dumps({**result, **(also or {})}), flush=True)


def _lines(result: Result, prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in result.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{prefix}{name}.")
        elif isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
            for number, part in enumerate(value):
                assert isinstance(part, Mapping)
                lines += _lines(part, f"{prefix}{name}[{number}].")
        else:
            lines.append((prefix + name, str(value)))
    return lines
