"""Which keywords of JSON Schema an output can be held to. Whatever else a schema has is refused, never ignored."""

from collections.abc import Iterator, Mapping
from typing import Any

_CHECKED = {
    *("type", "enum", "const", "$ref"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minItems", "maxItems", "required", "minProperties", "maxProperties"),
}
PARTS = {"items", "additionalItems", "additionalProperties", "anyOf", "oneOf", "allOf", "prefixItems"}
"""Keywords that hold a schema, or a list of schemas."""
PARTS_BY_NAME = {"properties", "patternProperties", "$defs", "definitions"}
"""Keywords that hold schemas by name."""
_ANNOTATIONS = {
    *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "examples"),
    *("deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType"),
}
"""Keywords that a validator does not check either."""
_KNOWN = _CHECKED | PARTS | PARTS_BY_NAME | _ANNOTATIONS


def unsupported_keyword(schema: object, path: str = "$") -> str | None:
    """What is wrong with the first keyword that cannot be held to, with its place; None if there is none."""
    if not isinstance(schema, Mapping):
        return None  # true, false, or what the library refuses
    for keyword in schema:
        if keyword not in _KNOWN:
            return f"the keyword {keyword!r} at {path} is not supported"
    for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(keyword), bool):
            return f"{keyword!r} at {path} must be a number, as from draft 6 on"
    # The names of additional properties may repeat, and a reader of JSON counts a repeated one once.
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > len(required) + 1:
        return f"'minProperties' at {path} is supported up to one more than there are required properties, got {least}"
    if schema.get("patternProperties") and schema.get("additionalProperties", True) is not False:
        return f"'patternProperties' at {path} is supported beside 'additionalProperties': false alone"
    for part, place in _parts(schema, path):
        wrong = unsupported_keyword(part, place)
        if wrong is not None:
            return wrong
    return None


def _parts(schema: Mapping[str, Any], path: str) -> Iterator[tuple[object, str]]:
    """The schemas in a schema, with their places."""
    for keyword, value in schema.items():
        if keyword in PARTS and isinstance(value, list):
            yield from ((part, f"{path}.{keyword}[{number}]") for number, part in enumerate(value))
        elif keyword in PARTS:
            yield value, f"{path}.{keyword}"
        elif keyword in PARTS_BY_NAME and isinstance(value, Mapping):
            yield from ((part, f"{path}.{keyword}.{name}") for name, part in value.items())
