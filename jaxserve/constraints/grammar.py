"""From a constraint to the grammar that says the same, in llguidance's variant of Lark."""

import json
from collections.abc import Mapping
from typing import Any

from jaxserve.constraints.property_names import with_plain_names
from jaxserve.constraints.schema_keywords import unsupported_keyword
from jaxserve.request import Constraint
from jaxserve.request_errors import InvalidRequest

_OPTIONS = '%llguidance {"no_forcing": true}'
"""Where only one text may follow, the tokens that write it are still the model's choice."""
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""A JSON text is one line, with at most a space after a comma or a colon: where more is allowed, white space is most of
what small models write, and each of it is a step."""


def grammar_of(constraint: Constraint, max_bytes: int) -> str:
    """The grammar of a constraint whose form is valid; that of the kind `grammar` is the client's own, unchecked.

    Raises InvalidRequest for one that is longer than `max_bytes` in UTF-8, and for a schema that is no JSON, or has a
    keyword that is not supported.
    """
    kind = constraint.kind
    if kind == "json_object":
        return _json({"type": "object"})
    value = getattr(constraint, kind)
    _check_size(kind, json.dumps(value) if kind == "choice" else value, max_bytes)
    match kind:
        case "choice":
            return _start(" | ".join(_quoted(text) for text in value))
        case "regex":
            from llguidance import regex_to_lark

            return _start(f"/{regex_to_lark(value, '')}/")
        case "json_schema":
            return _json(_checked_schema(value, max_bytes))
        case _:
            return f"{value}\n{_OPTIONS}\n"


def _quoted(text: str) -> str:
    """As a string of Lark: JSON's, in which the library takes DEL, which JSON lets stand, for no character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def _start(rule: str) -> str:
    return f"{_OPTIONS}\nstart: {rule}\n"


def _json(schema: Mapping[str, Any]) -> str:
    return _start(f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}")


def _check_size(kind: str, value: object, max_bytes: int) -> None:
    size = len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else 0
    if size > max_bytes:
        raise InvalidRequest(kind, f"has {size} bytes (limit {max_bytes})")


def _checked_schema(value: str | bool | Mapping[str, Any], max_bytes: int) -> Mapping[str, Any]:
    try:
        # Through text either way: what is no JSON is found, and what it takes to hold it is known.
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        _check_size("json_schema", text, max_bytes)
        schema = json.loads(text)
        wrong = unsupported_keyword(schema)
        plain = with_plain_names(schema)
    except (TypeError, ValueError) as error:
        raise InvalidRequest("json_schema", f"is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("json_schema", "is nested too deeply") from None
    if wrong is not None:
        raise InvalidRequest("json_schema", wrong)
    if isinstance(schema, bool):
        return {} if schema else {"anyOf": []}
    if not isinstance(plain, dict):
        raise InvalidRequest("json_schema", f"must be an object, true or false, got {schema!r:.100}")
    return plain
