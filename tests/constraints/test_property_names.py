"""A property that a schema names is not written by another spelling of its name."""

import json
import random
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from jaxserve.constraints.grammar import grammar_of
from jaxserve.request import Constraint
from jaxserve.request_errors import InvalidRequest

BYTES = LLTokenizer("byte")
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
REQUIRED = {**PERSON, "required": ["name", "age"]}
COUNTED = {**PERSON, "additionalProperties": {"type": "integer"}}


def accepts(schema: Any, text: str) -> bool:
    """Whether an output held to a schema may be this."""
    matcher = LLMatcher(BYTES, grammar_of(Constraint(json_schema=schema), 1 << 20))
    assert not matcher.is_error(), matcher.get_error()
    tokens = BYTES.tokenize_bytes(text.encode())
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (REQUIRED, r'{"name": "x", "age": 3, "\u0061ge": "y"}', False),
        (REQUIRED, r'{"name": "x", "age": 3, "age": "y"}', False),
        (REQUIRED, r'{"name": "x", "age": 3, "agf": "y", "": [], "\"\n": {"age": "y"}, "é": 1}', True),
        ({"properties": PERSON["properties"]}, r'{"\u0061ge": "y"}', False),
        ({"properties": PERSON["properties"]}, r'["age", {"\n": 1}]', True),
        (COUNTED, r'{"name": "x", "\u006eame": 1}', False),
        (COUNTED, r'{"name": "x", "nam": 1, "names": 2, "n": 3, "": 4, "é^]": 5}', True),
        (COUNTED, r'{"name": "x", "nam": "y"}', False),
        ({"items": [{"anyOf": [PERSON]}]}, r'[{"\u0061ge": "y"}]', False),
        (
            {"allOf": [REQUIRED, {"properties": {"z": {"type": "integer"}}}]},
            r'{"name": "", "age": 1, "\u007a": ""}',
            False,
        ),
        ({"allOf": [REQUIRED, {"properties": {"z": {"type": "integer"}}}]}, r'{"name": "", "age": 1, "k": ""}', True),
        ({"$defs": {"P": PERSON}, "$ref": "#/$defs/P"}, r'{"\u0061ge": "y"}', False),
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["b"]}, '{"a": 1, "b": "x"}', True),
        ({"const": {"properties": {"a": 1}}}, '{"properties": {"a": 1}}', True),
    ],
)
def test_a_name_has_one_spelling(schema: Any, text: str, expected: bool):
    assert accepts(schema, text) == expected
    if expected:
        jsonschema.validate(json.loads(text), schema)


def test_further_names_are_all_but_those_that_are_named():
    draw = random.Random(1)
    for _ in range(40):
        named = {"".join(draw.choices("ab-]^é\\", k=draw.randrange(4))) for _ in range(4)}
        schema = {"type": "object", "properties": dict.fromkeys(named, True), "additionalProperties": {"type": "null"}}
        for name in {"".join(draw.choices("ab-]^é\\", k=draw.randrange(4))) for _ in range(8)}:
            assert accepts(schema, json.dumps({name: 1}, ensure_ascii=False)) == (name in named), (named, name)
            assert accepts(schema, json.dumps({name: None}, ensure_ascii=False)), (named, name)


def test_a_schema_of_any_depth_is_taken_or_refused_by_name():
    schema: dict[str, Any] = {}
    depths = list[int]()
    for depth in range(1, 1000):
        schema = {"items": schema}
        if depth % 20 == 0:
            try:
                grammar_of(Constraint(json_schema=schema), 1 << 20)
            except InvalidRequest as error:
                assert error.reason == "is nested too deeply"
                depths.append(depth)
    assert depths and depths[0] > 100 and depths[-1] == 980


def test_patterns_beside_further_properties_are_refused_by_name():
    schema = {"items": {"patternProperties": {"^a": {"type": "integer"}}}}
    with pytest.raises(InvalidRequest, match=r"'patternProperties' at \$\.items is supported beside"):
        grammar_of(Constraint(json_schema=schema), 1 << 20)
