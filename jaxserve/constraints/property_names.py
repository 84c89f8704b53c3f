r"""Objects with further properties than those that their schema names.

A JSON string may write any character as an escape, so that `"\u0061ge"` is the name `age`. llguidance tells further
names from those of `properties` by how they are written, and would take it for another; by `patternProperties` it
writes letters as they are alone. So what may follow is said by a pattern.
"""

from collections.abc import Mapping
from typing import Any

from jaxserve.constraints.schema_keywords import PARTS, PARTS_BY_NAME

_ANY = "(?s)^.*$"


def with_plain_names(schema: Any) -> Any:
    """The same schema, in which no name of a property is written with escapes of letters."""
    if not isinstance(schema, Mapping):
        return schema
    changed = {keyword: _with_plain_names(keyword, value) for keyword, value in schema.items()}
    named, further = schema.get("properties"), changed.get("additionalProperties", True)
    if isinstance(named, Mapping) and named and further is not False:
        # Of what may be anything the names need not be told apart: a property is what all say of it.
        pattern = _ANY if further in (True, {}) else f"(?s)^{_not_among(list(named))}$"
        changed |= {"patternProperties": {pattern: further}, "additionalProperties": False}
    return changed


def _with_plain_names(keyword: str, value: Any) -> Any:
    if keyword in PARTS_BY_NAME and isinstance(value, Mapping):
        return {name: with_plain_names(part) for name, part in value.items()}
    if keyword in PARTS:
        return [with_plain_names(part) for part in value] if isinstance(value, list) else with_plain_names(value)
    return value


def _not_among(words: list[str]) -> str:
    """A regular expression of every text but these words."""
    rests: dict[str, list[str]] = {}
    for word in words:
        if word:
            rests.setdefault(f"\\x{{{ord(word[0]):x}}}", []).append(word[1:])
    others = [f"[^{''.join(rests)}].*"] if rests else [".+"]
    either = "|".join(others + [first + _not_among(rest) for first, rest in rests.items()])
    return f"(?:{either})" if "" in words else f"(?:{either})?"
