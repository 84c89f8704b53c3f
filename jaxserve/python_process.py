"""Programs of this package that run in Python processes of their own."""

import os
import sys
from collections.abc import Mapping, Sequence


def python_command(program: Sequence[str]) -> list[str]:
    """The command that runs a program, given as Python's arguments, in the environment of `python_environment`.

    -P: neither the working folder nor the program's own is a place to import from. Where a server is started there may
    lie a `json.py`, and the program's folder has modules with names like `request`.
    """
    return [sys.executable, "-P", *program]


def python_environment() -> Mapping[str, str]:
    """The environment of a process that imports from where this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
