"""What a client asks for: requests and their parameters.

Everything here is plain data, checked before anything is allocated. This module imports neither jax nor grpc.
"""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from jaxserve.request_errors import InvalidRequest

MAX_LOGPROBS = 20
"""Most alternatives a token that a request may ask for."""
LEAST_REPETITION_PENALTY = 0.009999999776482582
"""0.01 in 32 bits, as a message of gRPC carries it."""
MAX_LOGIT_BIAS = 256
"""Most entries of `logit_bias` in one request."""
MAX_STOP_STRINGS = 16
"""Most stop strings in one request."""
MAX_STOP_STRING_LENGTH = 256
"""Longest stop string, in characters."""
MAX_STOP_TOKEN_IDS = 8
"""Most stop ids in one request, the model's end-of-sequence ids included."""
MAX_CHOICES = 1024
"""Most alternatives of `choice` in one request."""
MAX_REQUEST_ID_LENGTH = 128
"""Longest request id, in characters."""
MAX_DEADLINE = 1e12
"""Farthest deadline, in `time.monotonic()` seconds; beyond what the longest timeout of gRPC makes, 10^8 hours."""


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(name, f"must be a number, got {value!r}")
    if not low <= value <= high or (open_low and value == low):
        left = "(" if open_low else "["
        raise InvalidRequest(name, f"must be in {left}{low:g}, {high:g}], got {value!r:.100}")


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(name, f"must be an integer, got {value!r}")
    if not low <= value <= high:
        raise InvalidRequest(name, f"must be in [{low}, {high}], got {value!r:.100}")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(name, f"must be true or false, got {value!r}")


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(name, f"must be text that is not empty, got {value!r:.100}")
    _unicode(name, value)


def _unicode(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(name, f"is not valid Unicode text at character {error.start}") from None


def _only_one(field: str, values: Mapping[str, Any]) -> str:
    """Name of the value that is not None. Raises InvalidRequest, for `field`, unless there is exactly one."""
    given = [name for name, value in values.items() if value is not None]
    if len(given) != 1:
        *names, last = values
        what = "none is set" if not given else f"{' and '.join(given)} are set"
        raise InvalidRequest(field, f"exactly one of {', '.join(names)} and {last} must be set; {what}")
    return given[0]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen from the logits, in this order: logit bias, penalties, temperature,
    top-k, top-p, min-p, then a draw with a key folded from `seed` and the token's position."""

    temperature: float = 1.0
    """0 is greedy, and so is what is nearly 0 (below 1e-30)."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to this; 1 keeps all."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the likeliest."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time the token was generated."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the output."""
    seed: int | None = None
    """32-bit seed of the draw; None takes a random one, reported in `Started`."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    n: int = 1
    """Sequences for one prompt, which is computed once. Each draws from a stream of its own: see `output_seed`."""

    def validate(self, vocab_size: int, max_n: int) -> None:
        """Raises InvalidRequest naming the first field out of range."""
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, LEAST_REPETITION_PENALTY, 100.0)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**32 - 1)
        _integer("n", self.n, 1, max_n)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest("logit_bias", f"has {len(self.logit_bias)} entries (limit {MAX_LOGIT_BIAS})")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, vocab_size - 1)
            _number("logit_bias", bias, -100.0, 100.0)


def output_seed(seed: int, index: int) -> int:
    """The seed from which sequence `index` of a request draws, in [0, 2^32): the request's own for sequence 0, else the
    first four bytes of BLAKE2b of "seed/index". It does not depend on `n`, and asked for alone it gives the same."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest(), "big")


@dataclass(frozen=True)
class StoppingParams:
    """When a sequence ends."""

    max_tokens: int | None = None
    """Most tokens to generate; None goes to the end of the context."""
    min_tokens: int = 0
    """No end-of-sequence id, stop id or stop string ends the sequence before this many tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end the sequence; not part of the text unless `include_stop`."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the sequence, besides the model's own end-of-sequence ids."""
    include_stop: bool = False
    """Keep the matched stop string in the text."""
    ignore_eos: bool = False
    """The model's end-of-sequence ids do not end the sequence."""

    def validate(self, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """Raises InvalidRequest naming the first field out of range."""
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens or 2**31 - 1)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest("stop", f"has {len(self.stop)} strings (limit {MAX_STOP_STRINGS})")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_STRING_LENGTH:
                raise InvalidRequest(
                    "stop", f"must be strings of 1 to {MAX_STOP_STRING_LENGTH} characters, got {text!r:.100}"
                )
            _unicode("stop", text)
        room = MAX_STOP_TOKEN_IDS - (0 if self.ignore_eos else len(eos_ids))
        if len(self.stop_token_ids) > room:
            raise InvalidRequest("stop_token_ids", f"has {len(self.stop_token_ids)} ids (limit {room})")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, vocab_size - 1)
        _boolean("include_stop", self.include_stop)
        _boolean("ignore_eos", self.ignore_eos)


@dataclass(frozen=True)
class OutputParams:
    """What is sent back."""

    logprobs: int | None = None
    """Log-probabilities of the chosen token and of this many of the likeliest; None sends none."""
    prompt_logprobs: int | None = None
    """As `logprobs`, of each prompt token but the first, which nothing precedes; in `Started`. Such a request computes
    its whole prompt: it looks for none of it in the prefix cache."""
    resumable: bool = False
    """A broken connection does not end the request: the stream is kept, and may be taken up again. Needs
    `return_token_ids`: tokens are what its reader counts."""
    return_text: bool = True
    """Send detokenized text."""
    return_token_ids: bool = True
    """Send token ids."""

    def validate(self) -> None:
        """Raises InvalidRequest naming the first field out of range."""
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _boolean("resumable", self.resumable)
        _boolean("return_text", self.return_text)
        _boolean("return_token_ids", self.return_token_ids)
        if self.resumable and not self.return_token_ids:
            raise InvalidRequest("resumable", "needs return_token_ids, which are counted to take the stream up again")


@dataclass(frozen=True)
class Constraint:
    """What the text of the output must match, from its first character to its last. Exactly one field is set.

    The output ends, with FinishReason.STOP, where nothing more may follow, `min_tokens` notwithstanding; where it may
    end or go on, the model chooses. `max_tokens`, stop strings and stop ids may end it before it is complete.
    """

    json_schema: str | Mapping[str, Any] | bool | None = None
    """A JSON Schema (draft 2020-12), as text or parsed: the output is JSON that it accepts. Keywords that are not
    supported are refused by name."""
    regex: str | None = None
    """A regular expression in the syntax of Rust's `regex`, without look-around and backreferences."""
    grammar: str | None = None
    """A context-free grammar in llguidance's variant of Lark; its start rule is `start`."""
    choice: tuple[str, ...] | None = None
    """The output is one of these."""
    json_object: bool = False
    """The output is a JSON object."""

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        # False asks for no object; the schema `false` is one, which nothing matches.
        json_object = None if self.json_object is False else self.json_object
        return _only_one("constraint", vars(self) | {"json_object": json_object})

    def validate(self) -> None:
        """Checks the form. Raises InvalidRequest."""
        kind = self.kind
        value = getattr(self, kind)
        match kind:
            case "json_object":
                _boolean(kind, value)
            case "json_schema":
                if not isinstance(value, str | bool | Mapping):
                    raise InvalidRequest(kind, f"must be a JSON Schema, got {value!r:.100}")
            case "choice":
                if not 1 <= len(value) <= MAX_CHOICES:
                    raise InvalidRequest(kind, f"must have 1 to {MAX_CHOICES} strings, got {len(value)}")
                for text in value:
                    _text(kind, text)
            case _:
                _text(kind, value)


def check_messages(messages: Sequence[Any]) -> None:
    """Raises InvalidRequest for what is no message of a chat."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest("messages", f"message {index} must be an object with a string `role`")
        if not isinstance(message.get("content"), str):
            raise InvalidRequest("messages", f"message {index} must have a string `content`")


@dataclass(frozen=True)
class Request:
    """One request. Exactly one of `prompt`, `token_ids` and `messages` is set."""

    prompt: str | None = None
    """Raw text; the tokenizer's own special tokens are added where its model wants them."""
    token_ids: tuple[int, ...] | None = None
    """A prompt already tokenized, taken as it is."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """Chat messages (`role`, `content`), rendered by the model's chat template."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the model may call, as its chat template takes them; only beside `messages`."""
    sampling: SamplingParams = SamplingParams()
    stopping: StoppingParams = StoppingParams()
    output: OutputParams = OutputParams()
    constraint: Constraint | None = None
    """What the output must match; None for anything."""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Unique among active requests."""
    model: str | None = None
    """The served model's name; None takes the one that is served."""
    priority: int = 0
    """Higher goes first: each level counts as 4,096 arrivals earlier, so that no level waits for ever."""
    cache_salt: str = ""
    """Requests share cached prefixes only within one salt, and one tenant."""
    tenant: str = ""
    """Who asks, as the server that authenticated the call says; never a field of the API. "" where nobody is asked."""
    deadline: float | None = None
    """`time.monotonic()` seconds after which the request ends with FinishReason.DEADLINE."""

    @property
    def prefix_salt(self) -> str:
        """What the request's chain of pages begins with: the tenant, which holds no zero character, and the salt."""
        return f"{self.tenant}\0{self.cache_salt}" if self.tenant else self.cache_salt

    def validate(self) -> None:
        """Checks what needs no model: that there is one prompt, and its form. Raises InvalidRequest."""
        prompts = {"prompt": self.prompt, "token_ids": self.token_ids, "messages": self.messages}
        _only_one("prompt", prompts)
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise InvalidRequest("prompt", f"must be a string, got {type(self.prompt).__name__}")
        check_messages(self.messages or ())
        if self.messages is not None and not self.messages:
            raise InvalidRequest("messages", "must have at least one message")
        if self.tools and self.messages is None:
            raise InvalidRequest("tools", "may only be set beside messages")
        for index, tool in enumerate(self.tools):
            if not isinstance(tool, Mapping):
                raise InvalidRequest("tools", f"tool {index} must be an object, got {tool!r:.100}")
        if not isinstance(self.request_id, str) or not 1 <= len(self.request_id) <= MAX_REQUEST_ID_LENGTH:
            raise InvalidRequest("request_id", f"must be a string of 1 to {MAX_REQUEST_ID_LENGTH} characters")
        _integer("priority", self.priority, -(2**31), 2**31 - 1)
        if not isinstance(self.cache_salt, str):
            raise InvalidRequest("cache_salt", f"must be a string, got {self.cache_salt!r:.100}")
        _unicode("cache_salt", self.cache_salt)
        if self.deadline is not None:
            _number("deadline", self.deadline, -MAX_DEADLINE, MAX_DEADLINE)
        if self.constraint is not None:
            self.constraint.validate()

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Request":
        """Builds a request from flat API names, as in a JSON line: `id` (or `request_id`), one prompt field, and any
        sampling, stopping, output or constraint field. An unknown field is refused by name, never dropped. Raises
        InvalidRequest.
        """
        if not isinstance(data, Mapping):
            raise InvalidRequest("request", f"must be a JSON object, got {type(data).__name__}")
        parts: dict[str, dict[str, Any]] = {
            "sampling": {},
            "stopping": {},
            "output": {},
            "constraint": {},
            "request": {},
        }
        for name, value in data.items():
            part = _FIELD_PART.get(name)
            if part is None:
                raise InvalidRequest(str(name), "is not a field of a request")
            # `json_object: false` asks for nothing.
            if value is not None and (name != "json_object" or value is not False):
                parts[part][name] = _from_json_value(name, value)
        request = parts["request"]
        if "id" in request:
            request["request_id"] = request.pop("id")
        return Request(
            sampling=SamplingParams(**parts["sampling"]),
            stopping=StoppingParams(**parts["stopping"]),
            output=OutputParams(**parts["output"]),
            constraint=Constraint(**parts["constraint"]) if parts["constraint"] else None,
            **request,
        )


_FIELD_PART = {
    **{f.name: "sampling" for f in fields(SamplingParams)},
    **{f.name: "stopping" for f in fields(StoppingParams)},
    **{f.name: "output" for f in fields(OutputParams)},
    **{f.name: "constraint" for f in fields(Constraint)},
    **dict.fromkeys(
        ("id", "request_id", "prompt", "token_ids", "messages", "tools", "model", "priority", "cache_salt"), "request"
    ),
}


def _from_json_value(name: str, value: Any) -> Any:
    if name == "logit_bias":
        if not isinstance(value, Mapping):
            raise InvalidRequest(name, f"must be an object of token id to bias, got {value!r}")
        try:
            return {int(token) if isinstance(token, str) else token: bias for token, bias in value.items()}
        except ValueError:
            raise InvalidRequest(name, f"keys must be token ids, got {list(value)!r:.100}") from None
    if name == "stop" and isinstance(value, str):
        return (value,)
    if name in ("token_ids", "messages", "tools", "stop", "stop_token_ids", "choice"):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise InvalidRequest(name, f"must be a list, got {value!r:.100}")
        return tuple(value)
    return value
