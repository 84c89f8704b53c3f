"""Command-line options made from dataclasses: name, type and default of a field, its docstring as the help.

A fact about an option is stated once, in the dataclass that has the field. Docstrings of fields are not kept at run
time, so they are read from the source.
"""

import argparse
import ast
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from jaxserve.config import EngineConfig

METAVARS: dict[type, str] = {str: "TEXT", int: "INT", float: "NUMBER"}
"""What help calls a value of a type."""


class Options(Protocol):
    """Where options are added: a parser, or a group of one."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """As ArgumentParser.add_argument."""
        ...


@cache
def field_docs(dataclass_type: type) -> dict[str, str]:
    """The docstrings of the fields that have one, each in one line, for help: without backticks."""
    (class_def,) = ast.parse(inspect.getsource(dataclass_type)).body
    assert isinstance(class_def, ast.ClassDef)
    found: dict[str, str] = {}
    for pair in pairwise(class_def.body):
        match pair:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                found[name] = " ".join(text.split()).replace("`", "")
    return found


def add_field_options(
    options: Options, dataclass_type: type, names: Iterable[str] | None = None, defaults: Mapping[str, object] = {}
) -> None:
    """Adds an option for each field of a dataclass, or for those named.

    Options that are not given leave no trace in the namespace, so that `given_fields` knows them.

    Args:
        options: the parser, or a group of it.
        dataclass_type: the dataclass.
        names: fields; None takes all.
        defaults: those of the command where they are not the field's own; shown in the help.
    """
    docs = field_docs(dataclass_type)
    hints = get_type_hints(dataclass_type)
    for field in fields(dataclass_type):
        if names is not None and field.name not in names:
            continue
        assert field.default is not MISSING, f"{field.name} has no plain default"
        default = defaults.get(field.name, field.default)
        text = f"{docs[field.name]} (default: {_shown(default)})".replace("%", "%%")
        settings = _settings(field.name, hints[field.name])
        options.add_argument(option_name(field.name), default=argparse.SUPPRESS, help=text, **settings)


def given_fields(arguments: argparse.Namespace, dataclass_type: type) -> dict[str, Any]:
    """The fields of a dataclass that the command line gave."""
    given = vars(arguments)
    return {field.name: given[field.name] for field in fields(dataclass_type) if field.name in given}


def engine_config(arguments: argparse.Namespace, defaults: Mapping[str, Any] = {}) -> EngineConfig:
    """The configuration that the command line asks for, over `defaults`. Raises ValueError naming field and limit."""
    return EngineConfig(**{**defaults, **given_fields(arguments, EngineConfig)})


def option_name(field: str) -> str:
    """`max_context` is given as `--max-context`."""
    return "--" + field.replace("_", "-")


def _shown(default: object) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return str(default)


def _settings(name: str, hint: Any) -> dict[str, Any]:
    """What argparse needs for a type: plain ones, `X | None`, literals, and tuples of one type."""
    parts = get_args(hint)
    if get_origin(hint) in (types.UnionType, Union):
        (inner,) = (part for part in parts if part is not types.NoneType)
        settings = _settings(name, inner)
        settings["type"] = _or_none(settings.get("type", str))
        if "choices" in settings:
            settings["metavar"] = "{" + ",".join([*settings["choices"], "none"]) + "}"
            settings["choices"] = (*settings["choices"], None)
        return settings
    if get_origin(hint) is Literal:
        return {"choices": parts}
    if get_origin(hint) is tuple:
        return {"type": parts[0], "nargs": "+", "action": _StoreTuple, "metavar": METAVARS[parts[0]]}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint not in METAVARS:
        raise TypeError(f"{name}: no option can be made for {hint}")
    return {"type": hint, "metavar": METAVARS[hint]}


def _or_none(convert: Callable[[str], object]) -> Callable[[str], object]:
    """Reads `none`, and `None` as help has it, as None."""

    def read(text: str) -> object:
        return None if text in ("none", "None") else convert(text)

    read.__name__ = getattr(convert, "__name__", "value")  # what argparse calls it where a value is refused
    return read


class _StoreTuple(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: object) -> None:
        setattr(namespace, self.dest, tuple(values))
