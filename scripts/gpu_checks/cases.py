"""What a section consists of: named cases, each of which gives figures of its own. Known without JAX."""

import json
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What a section is told."""

    rehearse: bool = False
    """Tiny sizes."""
    seconds: float = 240.0
    """What it has at most: with little, a section leaves out the cases that say least."""
    skip: tuple[str, ...] = ()
    """Names of cases that an earlier process of the section has done, or hung or failed in."""
    beside_xla: bool = False
    """The device's own attention failed its check: whole steps are measured with XLA's as well, and first."""


Case = tuple[str, Callable[[], dict]]
"""A name, and what gives the figures. Nothing is computed before that is called: all of a section may be skipped."""


def merge(result: dict, more: dict) -> None:
    """Adds a case's figures to those of its section: lists and dictionaries grow, and all cases have to pass."""
    for key, value in more.items():
        have = result.get(key)
        if key == "passed":
            result[key] = have is not False and value
        elif isinstance(have, list):
            result[key] = have + value
        elif isinstance(have, dict):
            result[key] = have | value
        else:
            result[key] = value


def json_object(line: str | bytes) -> dict | None:
    """What a printed line says, or None for a line that something else printed."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
