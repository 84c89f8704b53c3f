"""What the bodies of `/v1/completions` and `/v1/chat/completions` ask for, as requests of the engine.

Names and forms are checked here, values by the engine. A parameter that is not known, or whose value would have an
effect that is not had here, is refused by name; null is the same as leaving a parameter out.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from jaxserve.request import Constraint, OutputParams, Request
from jaxserve.request_errors import InvalidRequest
from rpc.served_engine import ServedEngine

if TYPE_CHECKING:
    from rpc.http.tools import ToolSyntax

MAX_PROMPTS = 128
"""Most prompts in one request."""

MAX_TIMEOUT = 86_400.0
"""Longest `timeout`, in seconds."""

CONSTRAINTS = tuple(field.name for field in dataclasses.fields(Constraint))
"""Parameters that say what the output must match."""

PASSED = (
    *("model", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "n", "logit_bias", "max_tokens", "min_tokens", "stop", "stop_token_ids", "include_stop", "ignore_eos"),
    *("priority", "cache_salt", *CONSTRAINTS),
)
"""Parameters that the engine knows by the same name."""

Check = Callable[[object], bool]

WITHOUT_EFFECT: Mapping[str, tuple[Check, str]] = {
    "user": (lambda value: isinstance(value, str), "a string"),
    "metadata": (lambda value: isinstance(value, dict), "an object"),
    "store": (lambda value: value is False, "false: nothing is stored"),
    "service_tier": (lambda value: value in ("auto", "default"), "auto or default"),
}
"""Parameters of either endpoint that change nothing, and the values that they may then have."""

COMPLETIONS_WITHOUT_EFFECT: Mapping[str, tuple[Check, str]] = {
    **WITHOUT_EFFECT,
    "echo": (lambda value: value is False, "false: the prompt is not echoed"),
    "suffix": (lambda value: value == "", "empty: text is not inserted before a suffix"),
}
CHAT_WITHOUT_EFFECT: Mapping[str, tuple[Check, str]] = {
    **WITHOUT_EFFECT,
    "modalities": (lambda value: value == ["text"], '["text"]'),
}


@dataclass(frozen=True)
class Asked:
    """What one HTTP request asks for.

    Attributes:
        requests: one for each prompt, without ids yet.
        stream: events rather than one answer.
        include_usage: the stream ends with token counts.
        return_token_ids: choices have `token_ids`.
        timeout: seconds from its arrival until it ends at the latest; None for no end.
        tool_syntax: how the model calls the tools that it is offered; None where it is offered none.
        one_call: of several calls of tools the first alone is told.
        names: of the engine's fields that were made of parameters of other names, these names.
    """

    requests: tuple[Request, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    timeout: float | None = None
    tool_syntax: "ToolSyntax | None" = None
    one_call: bool = False
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Choices for one prompt."""
        return self.requests[0].sampling.n

    @property
    def logprobs(self) -> bool:
        """Whether choices have log-probabilities."""
        return self.requests[0].output.logprobs is not None


class Fields:
    """The parameters of a body, each of which must be taken."""

    def __init__(self, body: Mapping[str, object]):
        self._fields = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str) -> object:
        """A value; None where there is none."""
        return self._fields.pop(name, None)

    def take_bool(self, name: str) -> bool:
        """A boolean, false where there is none."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise InvalidRequest(name, f"must be true or false, got {value!r:.100}")
        return bool(value)

    def take_timeout(self) -> float | None:
        """The seconds that a request may take; None for any."""
        value = self.take("timeout")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_TIMEOUT:
            raise InvalidRequest("timeout", f"must be seconds in (0, {MAX_TIMEOUT:g}], got {value!r:.100}")
        return float(value)

    def take_without_effect(self, known: Mapping[str, tuple[Check, str]]) -> None:
        """Takes parameters that change nothing, and refuses values that would."""
        for name, (holds, what) in known.items():
            value = self.take(name)
            if value is not None and not holds(value):
                raise InvalidRequest(name, f"must be {what}; got {value!r:.100}")

    def take_engine_fields(self, constraint: Mapping[str, object], source: str) -> dict[str, object]:
        """The parameters that the engine checks, and the constraint that the parameter `source` has made, beside which
        there may be no other."""
        flat = {name: self._fields.pop(name) for name in PASSED if name in self._fields}
        for name in CONSTRAINTS:
            if constraint and name in flat:
                raise InvalidRequest(source, f"excludes another constraint on the output, but {name} is set as well")
        return {**flat, **constraint}

    def refuse_rest(self, endpoint: str) -> None:
        """Refuses what nobody took, by name."""
        for name in self._fields:
            raise InvalidRequest(name.encode("ascii", "backslashreplace").decode(), f"is not a parameter of {endpoint}")


def parse_completion(body: Mapping[str, object], engine: ServedEngine) -> Asked:
    """The body of `/v1/completions`. Raises InvalidRequest."""
    fields = Fields(body)
    prompts = _prompts(fields.take("prompt"))
    logprobs = fields.take("logprobs")
    stream, include_usage = take_stream(fields)
    return_token_ids = fields.take_bool("return_token_ids")
    timeout = fields.take_timeout()
    fields.take_without_effect(COMPLETIONS_WITHOUT_EFFECT)
    best_of = fields.take("best_of")
    constraint = take_response_format(fields)
    flat = fields.take_engine_fields(constraint, "response_format")
    if best_of is not None and best_of != flat.get("n", 1):
        raise InvalidRequest("best_of", f"must equal n, for all sequences are returned; got {best_of!r:.100}")
    fields.refuse_rest("/v1/completions")
    common = Request.from_json({**flat, "prompt": ""})
    common = replace(common, prompt=None, output=output_params(logprobs))
    requests = tuple(replace(common, **prompt) for prompt in prompts)  # pyright: ignore[reportArgumentType]
    names = {"token_ids": "prompt", **dict.fromkeys(constraint, "response_format")}
    return Asked(requests, stream, include_usage, return_token_ids, timeout, names=names)


def output_params(logprobs: object) -> OutputParams:
    """Both endpoints' output. Raises nothing: the engine checks it."""
    # Ids are always wanted: what a client leaves unread is counted in them.
    return OutputParams(logprobs=logprobs, return_text=True, return_token_ids=True)  # pyright: ignore[reportArgumentType]


def take_response_format(fields: Fields) -> dict[str, object]:
    """Takes `response_format`: the fields of a request that hold the output to it."""
    form = fields.take("response_format")
    if form is None:
        return {}
    kind = form.get("type") if isinstance(form, Mapping) else form
    match kind:
        case "text":
            return {}
        case "json_object":
            return {"json_object": True}
        case "json_schema":
            described = form.get("json_schema") if isinstance(form, Mapping) else None
            schema = described.get("schema") if isinstance(described, Mapping) else None
            if not isinstance(schema, Mapping | bool):
                raise InvalidRequest("response_format", "json_schema must be an object with a JSON Schema in `schema`")
            return {"json_schema": schema}
    raise InvalidRequest("response_format", f"type must be text, json_object or json_schema, got {kind!r:.100}")


def take_stream(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether the stream ends with the usage."""
    stream = fields.take_bool("stream")
    options = fields.take("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise InvalidRequest("stream_options", "may only be set where stream is true")
    if not isinstance(options, Mapping):
        raise InvalidRequest("stream_options", f"must be an object, got {options!r:.100}")
    inner = Fields(options)
    try:
        include_usage = inner.take_bool("include_usage")
        inner.refuse_rest("stream_options")
    except InvalidRequest as error:
        raise InvalidRequest(f"stream_options.{error.field}", error.reason) from None
    return stream, include_usage


def _prompts(value: object) -> list[dict[str, object]]:
    """The prompts, each as the field of a request: text, token ids, or a list of either."""
    if isinstance(value, str):
        return [{"prompt": value}]
    if value is None or not isinstance(value, Sequence):
        raise InvalidRequest("prompt", f"must be a string, a list of token ids, or a list of these, got {value!r:.100}")
    if not value:
        raise InvalidRequest("prompt", "has no tokens; at least 1 is needed")
    if all(isinstance(token, int) and not isinstance(token, bool) for token in value):
        return [{"token_ids": tuple(value)}]
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest("prompt", f"has {len(value)} prompts (limit {MAX_PROMPTS})")
    if all(isinstance(one, str) for one in value):
        return [{"prompt": one} for one in value]
    if all(isinstance(one, list) for one in value):
        return [{"token_ids": tuple(one)} for one in value]
    raise InvalidRequest("prompt", "a list must be of token ids, of strings, or of lists of token ids, and of one kind")
