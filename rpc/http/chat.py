"""`/v1/chat/completions`: its bodies as requests of the engine, and its answers."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxserve.events import TokenLogprob
from jaxserve.request import Request
from jaxserve.request_errors import InvalidRequest
from rpc.http.answers import LEAST_LOGPROB, Answer, Choice
from rpc.http.schema import (
    CHAT_WITHOUT_EFFECT,
    Asked,
    Fields,
    output_params,
    take_response_format,
    take_stream,
)
from rpc.http.tools import ToolCall, parse_tools
from rpc.served_engine import ServedEngine

MAX_MESSAGES = 4096
"""Most messages in one chat."""

_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")


def parse_chat(body: Mapping[str, object], engine: ServedEngine) -> Asked:
    """The body of `/v1/chat/completions`. Raises InvalidRequest."""
    fields = Fields(body)
    messages = _messages(fields.take("messages"))
    offered = parse_tools(fields, engine.tokenizer.chat_template)
    logprobs = fields.take_bool("logprobs")
    top_logprobs = fields.take("top_logprobs")
    if top_logprobs is not None and not logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs to be true")
    stream, include_usage = take_stream(fields)
    return_token_ids = fields.take_bool("return_token_ids")
    timeout = fields.take_timeout()
    fields.take_without_effect(CHAT_WITHOUT_EFFECT)
    constraint, source = take_response_format(fields), "response_format"
    if offered.forced is not None:
        if constraint:
            raise InvalidRequest("tool_choice", "a forced call and response_format exclude each other")
        constraint, source = {"json_schema": offered.forced}, "tools"
    flat = fields.take_engine_fields(constraint, "tool_choice" if source == "tools" else source)
    # What the engine has other names for: top_logprobs is how many it calls logprobs.
    names = {**dict.fromkeys(constraint, source), "logprobs": "top_logprobs", **_take_max_tokens(fields, flat)}
    fields.refuse_rest("/v1/chat/completions")
    wanted = (0 if top_logprobs is None else top_logprobs) if logprobs else None
    request = replace(
        Request.from_json({**flat, "messages": messages}),
        tools=offered.tools,
        output=output_params(wanted),
    )
    return Asked((request,), stream, include_usage, return_token_ids, timeout, offered.syntax, offered.one_call, names)


def _take_max_tokens(fields: Fields, flat: dict[str, object]) -> Mapping[str, str]:
    """`max_completion_tokens` is the later name of `max_tokens`: whether it was given, as `Asked.names`."""
    later = fields.take("max_completion_tokens")
    if later is None:
        return {}
    if flat.get("max_tokens", later) != later:
        earlier = flat["max_tokens"]
        raise InvalidRequest("max_completion_tokens", f"is {later!r:.100}, but max_tokens is {earlier!r:.100}")
    flat["max_tokens"] = later
    return {"max_tokens": "max_completion_tokens"}


def _messages(value: object) -> list[dict[str, object]]:
    """Messages as chat templates take them: contents are text, arguments of calls are objects."""
    if not isinstance(value, list):
        raise InvalidRequest("messages", f"must be a list of messages, got {value!r:.100}")
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest("messages", f"has {len(value)} messages (limit {MAX_MESSAGES})")
    return [_message(index, message) for index, message in enumerate(value)]


def _message(index: int, value: object) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise InvalidRequest("messages", f"message {index} must be an object, got {value!r:.100}")
    # Clients send answers back as they got them, with fields that are null or empty.
    given = {name: part for name, part in value.items() if part is not None and part != []}
    for name in given:
        if name not in _MESSAGE_FIELDS:
            raise InvalidRequest("messages", f"message {index} has a field {name!r:.100}, which is not supported")
    message: dict[str, object] = {"role": given.get("role"), "content": _content(index, given)}
    if message["role"] == "developer":
        message["role"] = "system"  # the later name of the same
    for name in ("name", "tool_call_id"):
        if name in given:
            if not isinstance(given[name], str):
                raise InvalidRequest("messages", f"message {index}: {name} must be a string, got {given[name]!r:.100}")
            message[name] = given[name]
    if "tool_calls" in given:
        message["tool_calls"] = _tool_calls(index, given["tool_calls"])
    return message


def _content(index: int, message: Mapping[str, object]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and "tool_calls" in message:
        return ""
    if not isinstance(content, Sequence):
        raise InvalidRequest("messages", f"message {index} must have a string `content`, or a list of text parts")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest("messages", f"message {index}: only parts of type text are taken, got {part!r:.100}")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(index: int, value: object) -> list[dict[str, object]]:
    """Calls that the model made before. Their arguments, which the API has as JSON, are objects in templates."""
    refusal = InvalidRequest(
        "messages",
        f"message {index}: tool_calls must be a list of {{id, type: function, function: {{name, arguments}}}}, where "
        "arguments is a JSON object in a string",
    )
    calls = []
    for call in value if isinstance(value, list) else [None]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if (
            not isinstance(call, Mapping)
            or not isinstance(function, Mapping)
            or not isinstance(function.get("name"), str)
        ):
            raise refusal
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (TypeError, ValueError, RecursionError):
            raise refusal from None
        if not isinstance(arguments, dict):
            raise refusal
        named = {"name": function["name"], "arguments": arguments}
        calls.append({"id": str(call.get("id", "")), "type": "function", "function": named})
    return calls


class ChatAnswer(Answer):
    """Of `/v1/chat/completions`."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def _opening(self, choice: Choice, index: int) -> bytes:
        if choice.opened:
            return b""
        choice.opened = True
        return self._chunk(index, '"delta":{"role":"assistant","content":""}', "")

    def _text_part(self, text: str | None) -> str:
        return '"delta":{}' if text is None else f'"delta":{{"content":{json.dumps(text)}}}'

    def _calls_part(self, calls: Sequence[ToolCall]) -> str:
        shown = [{"index": index, **_shown_call(call)} for index, call in enumerate(calls)]
        return f'"delta":{{"tool_calls":{json.dumps(shown)}}}'

    def _content(self, choice: Choice) -> dict[str, object]:
        content = "".join(choice.texts)
        message: dict[str, object] = {"role": "assistant", "content": content, "refusal": None}
        if choice.calls:
            message["content"] = content or None
            message["tool_calls"] = [_shown_call(call) for call in choice.calls]
        return {"message": message}

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
        entries = []
        for entry in logprobs:
            top = [self._logprob(token, logprob) for token, logprob in entry.top]
            entries.append({**self._logprob(entry.token_id, entry.logprob), "top_logprobs": top})
        return {"content": entries, "refusal": None}

    def _logprob(self, token_id: int, logprob: float) -> dict[str, object]:
        data = self._tokenizer.token_bytes(token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(data),
        }


def _shown_call(call: ToolCall) -> dict[str, object]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
