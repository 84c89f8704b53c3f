"""Tools: what a request offers to the model, and the calls in what it says.

A model is told of its tools by its chat template, and calls them in the form that it was trained on, which only the
template shows. Three forms are common:

    hermes   <tool_call>{"name": "f", "arguments": {...}}</tool_call>, after any text     Qwen, Hermes and many others
    mistral  [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]
    llama    {"name": "f", "parameters": {...}}, and nothing else                        Llama 3.1 and later
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from jaxserve.request_errors import InvalidRequest
from jaxserve.tokenizing.chat_template import has_tools
from rpc.http.schema import Fields

MAX_TOOLS = 128
"""Most tools in one request."""

_OTHER_FORMS = ("<function=", "<arg_key>", "[ARGS]")
"""In templates whose calls begin like those above and go on otherwise: Qwen3-Coder's, GLM-4.5's, Devstral's."""

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_CALL_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call. `arguments` is a JSON object in a string, as the API has it."""

    name: str
    arguments: str


class ToolSyntax(Enum):
    """The form of a model's calls. The values are what a text with calls contains, or begins with."""

    HERMES = "<tool_call>"
    MISTRAL = "[TOOL_CALLS]"
    LLAMA = "{"
    FORCED = ""
    """A call is all that may be said: as JSON, whatever the model's own form."""


def syntax_of(chat_template: str | None) -> ToolSyntax | None:
    """The form of the calls that a template teaches; None where it has no tools, or a form that is not known."""
    if chat_template is None or not has_tools(chat_template) or any(mark in chat_template for mark in _OTHER_FORMS):
        return None
    if "<tool_call>" in chat_template:
        return ToolSyntax.HERMES
    if "[TOOL_CALLS]" in chat_template:
        return ToolSyntax.MISTRAL
    return ToolSyntax.LLAMA if '"parameters"' in chat_template else None


@dataclass(frozen=True)
class Offered:
    """What a request offers to the model.

    Attributes:
        tools: for the chat template.
        syntax: the form of the calls; None where nothing is offered.
        forced: the JSON Schema that the whole output must follow, where a call is forced.
        one_call: of several calls the first alone is told.
    """

    tools: tuple[Mapping[str, object], ...] = ()
    syntax: ToolSyntax | None = None
    forced: Mapping[str, object] | None = None
    one_call: bool = False


def parse_tools(fields: Fields, chat_template: str | None) -> Offered:
    """Takes `tools`, `tool_choice` and `parallel_tool_calls`. Raises InvalidRequest."""
    tools, choice, parallel = (fields.take(name) for name in ("tools", "tool_choice", "parallel_tool_calls"))
    if parallel not in (None, True, False):
        raise InvalidRequest("parallel_tool_calls", f"must be true or false, got {parallel!r:.100}")
    if not tools:
        if tools not in (None, []):
            raise InvalidRequest("tools", f"must be a list of tools, got {tools!r:.100}")
        if choice not in (None, "none"):
            raise InvalidRequest("tool_choice", "needs tools")
        return Offered()
    checked = _checked(tools)
    if choice == "none":
        return Offered()
    if not has_tools(chat_template):
        raise InvalidRequest("tools", "the chat template of this model has no tools")
    if choice in (None, "auto"):
        syntax = syntax_of(chat_template)
        if syntax is None:
            raise InvalidRequest("tools", "this model's calls are of a form not known here; tool_choice may force one")
        return Offered(checked, syntax, one_call=parallel is False)
    calls = [_call_schema(function, number) for number, function in enumerate(_chosen(checked, choice))]
    return Offered(checked, ToolSyntax.FORCED, calls[0] if len(calls) == 1 else {"anyOf": calls})


def _chosen(tools: tuple[Mapping[str, object], ...], choice: object) -> list[Mapping[str, object]]:
    """The functions of which one must be called."""
    functions = [function for tool in tools if isinstance(function := tool["function"], Mapping)]
    if choice == "required":
        return functions
    named = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = named.get("name") if isinstance(named, Mapping) else None
    found = [function for function in functions if function["name"] == name]
    if not found:
        raise InvalidRequest(
            "tool_choice", f"must be auto, none, required, or the function of one of the tools, got {choice!r:.100}"
        )
    return found[:1]


def _call_schema(function: Mapping[str, object], number: int) -> Mapping[str, object]:
    parameters = function.get("parameters")
    assert parameters is None or isinstance(parameters, Mapping)
    # A schema of its own, in which references as `#/$defs/X` are to its own definitions.
    arguments = {"$id": f"urn:jaxserve:tool:{number}", **(parameters or {}), "type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _checked(tools: object) -> tuple[Mapping[str, object], ...]:
    if not isinstance(tools, list):
        raise InvalidRequest("tools", f"must be a list of tools, got {tools!r:.100}")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest("tools", f"has {len(tools)} tools (limit {MAX_TOOLS})")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise InvalidRequest("tools", f"tool {index} must be an object of type function")
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequest(
                "tools", f"tool {index} must have a function with a name of 1 to 64 letters, digits, _.-"
            )
        parameters, description = function.get("parameters"), function.get("description")
        if parameters is not None and not (isinstance(parameters, Mapping) and _may_be_object(parameters)):
            raise InvalidRequest("tools", f"tool {index}: parameters must be the JSON schema of an object")
        if description is not None and not isinstance(description, str):
            raise InvalidRequest("tools", f"tool {index}: description must be a string")
    return tuple(tools)


def _may_be_object(schema: Mapping[str, object]) -> bool:
    kinds = schema.get("type", "object")
    return "object" in (kinds if isinstance(kinds, list) else [kinds])


class ToolCallReader:
    """Splits what a model says, as it comes, into text for the client and calls, which are known at its end."""

    def __init__(self, syntax: ToolSyntax, one_call: bool = False):
        self._syntax = syntax
        self._one_call = one_call
        self._held = ""
        """Not shown yet: it is, or may become, a call."""
        self._begun = False
        """Something but white space was said."""

    def push(self, text: str) -> str:
        """Adds text; returns what of it is certainly no call."""
        self._held += text
        shown = len(self._held) - self._undecided()
        visible, self._held = self._held[:shown], self._held[shown:]
        self._begun = self._begun or bool(visible.strip())
        return visible

    def _undecided(self) -> int:
        """How many characters at the end may be part of a call."""
        held, marker = self._held, self._syntax.value
        if self._syntax is ToolSyntax.FORCED:
            return len(held)
        if self._syntax is ToolSyntax.HERMES:
            begin = held.find(marker)
            if begin >= 0:
                return len(held) - begin
            return next((size for size in range(len(marker) - 1, 0, -1) if held.endswith(marker[:size])), 0)
        # Calls are all that is said. A marker that is a special token has no text, so that a list begins.
        start = held.lstrip()
        may_be = not self._begun and (not start or start[0] == marker[0])
        return len(held) if may_be else 0

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The calls, and the text that turned out to be none, when nothing more comes."""
        held, self._held = self._held, ""
        calls = _calls(self._syntax, held)
        return ("", calls[:1] if self._one_call else calls) if calls else (held, ())


def _calls(syntax: ToolSyntax, text: str) -> tuple[ToolCall, ...]:
    """The calls in a text; none where any of them cannot be read."""
    try:
        match syntax:
            case ToolSyntax.HERMES:
                values = [json.loads(block) for block in _CALL_BLOCK.findall(text)]
            case ToolSyntax.MISTRAL:
                values = json.loads(text.strip().removeprefix(syntax.value))
            case ToolSyntax.LLAMA:
                values = [json.loads(part) for part in text.split(";\n")] if text.strip() else []
            case ToolSyntax.FORCED:
                values = [json.loads(text)]
        return tuple(_call(value) for value in values)
    except (ValueError, TypeError, KeyError, RecursionError):
        return ()


def _call(value: Mapping[str, object]) -> ToolCall:
    """Raises TypeError or KeyError for what is no call."""
    arguments = value["arguments"] if "arguments" in value else value["parameters"]
    name = value["name"]
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise TypeError("a call has a name and an object of arguments")
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
