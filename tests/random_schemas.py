"""Random JSON Schemas of every supported kind. The values of most are short; those of some may go on for ever."""

import random
from typing import Any

Schema = dict[str, Any]

WORDS = ("name", "kind", "count", "größe", "tags", "a b", 'quo"te', "x", "is_open", "city", "unit", "note")
PATTERNS = (
    "^[a-z]{2,6}$",
    "^[A-Z]{3}-[0-9]{2,4}$",
    "^(red|green|blue)( light)?$",
    "^\\d{1,5}(\\.\\d{2})?$",
    "^[^\\s]{1,8}$",
)
FORMATS = {"date": 10, "time": 16, "date-time": 26, "uuid": 36, "ipv4": 15, "email": 20}
"""Each with the length of a short one."""


class SchemaMaker:
    """Makes one schema from a seed. Definitions that it refers to are collected beside it.

    Args:
        seed: of its kinds and bounds.
        endless: whether texts, numbers, lists and names are also made without a bound, and definitions that refer to
            themselves. Otherwise every value of the schema has an end, whatever the model writes.
    """

    def __init__(self, seed: int, endless: bool = False):
        self._random = random.Random(seed)
        self._endless = endless
        self._definitions: dict[str, Schema | None] = {}

    def make(self) -> Schema:
        """A schema with its `$defs`."""
        schema = self._object(2) if self._random.random() < 0.8 else self._any(2)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _any(self, depth: int) -> Schema:
        simple = (self._string, self._string, self._integer, self._number, self._choice, self._constant, self._types)
        nested = (
            self._object,
            self._array,
            self._tuple,
            self._map,
            self._any_of,
            self._one_of,
            self._all_of,
            self._ref,
        )
        if depth > 0 and self._random.random() < 0.5:
            return self._random.choice(nested)(depth - 1)
        return self._random.choice(simple)()

    def _has_no_end(self, share: float) -> bool:
        return self._endless and self._random.random() < share

    def _string(self) -> Schema:
        if self._has_no_end(0.5):
            return self._random.choice(({"type": "string"}, {"type": "string", "pattern": "^[a-z]+( [a-z]+)*$"}))
        match self._random.randrange(4):
            case 0:
                least = self._random.randrange(4)
                return {"type": "string", "minLength": least, "maxLength": least + self._random.randrange(1, 10)}
            case 1:
                return {"type": "string", "pattern": self._random.choice(PATTERNS)}
            case 2:
                name = self._random.choice(list(FORMATS))
                return {"type": "string", "format": name, "maxLength": FORMATS[name]}
            case _:
                return {"type": "string", "maxLength": self._random.randrange(1, 16), "description": "a short text"}

    def _integer(self) -> Schema:
        if self._has_no_end(0.5):
            return {"type": "integer"}
        low = self._random.randrange(-200, 200)
        schema: Schema = {"type": "integer", "minimum": low, "maximum": low + self._random.randrange(20, 500)}
        if self._random.random() < 0.3:
            schema["multipleOf"] = self._random.choice((2, 3, 5, 7))
        return schema

    def _number(self) -> Schema:
        low = round(self._random.uniform(-100, 100), 2)
        bounds = {"exclusiveMinimum": low} if self._random.random() < 0.5 else {"minimum": low}
        key = "exclusiveMaximum" if self._random.random() < 0.5 else "maximum"
        step = {} if self._has_no_end(0.5) else {"multipleOf": 0.5}
        return {"type": "number", **bounds, key: low + self._random.randrange(1, 50), **step}

    def _choice(self) -> Schema:
        values = ("red", "green", 1, 2.5, None, True, "", "naïve", ["a"], {"k": 1}, "日本")
        return {"enum": self._random.sample(values, self._random.randrange(1, 5))}

    def _constant(self) -> Schema:
        return {"const": self._random.choice(("yes", 42, -1.5, False, None, ["x", 2], {"a": "b"}))}

    def _types(self) -> Schema:
        return self._random.choice(({"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}))

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(WORDS, self._random.randrange(1, 5))
        required = [name for name in names if self._random.random() < 0.6]
        schema: Schema = {"type": "object", "properties": {name: self._any(depth) for name in names}}
        if required:
            schema["required"] = required
        return {**schema, "additionalProperties": False}

    def _array(self, depth: int) -> Schema:
        least = self._random.randrange(3)
        most = {} if self._has_no_end(0.5) else {"maxItems": least + 2}
        return {"type": "array", "items": self._any(depth), "minItems": least, **most}

    def _tuple(self, depth: int) -> Schema:
        parts = [self._any(depth) for _ in range(self._random.randrange(1, 4))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}

    def _map(self, depth: int) -> Schema:
        size = {"minProperties": 1, "maxProperties": 2}
        if self._has_no_end(0.5):
            return {"type": "object", "additionalProperties": self._any(depth), **size}
        keys = {"^[a-z]{1,8}$": self._any(depth)}
        return {"type": "object", "patternProperties": keys, "additionalProperties": False, **size}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth) for _ in range(self._random.randrange(2, 4))]}

    def _one_of(self, depth: int) -> Schema:
        return {"oneOf": [self._integer(), {"type": "string", "maxLength": 5}, {"type": "null"}]}

    def _all_of(self, depth: int) -> Schema:
        first, second = self._random.sample(WORDS, 2)
        parts = [
            {"type": "object", "properties": {name: self._any(depth)}, "required": [name]} for name in (first, second)
        ]
        return {"allOf": parts, "maxProperties": 2}

    def _ref(self, depth: int) -> Schema:
        made = [name for name, schema in self._definitions.items() if schema is not None]
        if made and self._random.random() < 0.5:
            name = self._random.choice(made)
        else:
            name = f"d{len(self._definitions)}"
            self._definitions[name] = None  # taken, and not to be referred to before it is made
            self._definitions[name] = self._linked(name) if self._has_no_end(0.5) else self._any(depth)
        return {"$ref": f"#/$defs/{name}"}

    def _linked(self, name: str) -> Schema:
        """A schema that refers to itself."""
        return {
            "type": "object",
            "properties": {
                "value": self._integer(),
                "next": {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
