"""What passes between the front of an engine and its core, which may be another process.

Plain data, sent as msgpack arrays: never pickled. One message a step goes out, whatever the number of requests in it.
"""

from dataclasses import dataclass, field, fields
from typing import Any, get_args

import msgpack


@dataclass(frozen=True, slots=True)
class Submit:
    """A validated, tokenized request. `handle` is the front's number for it."""

    handle: int
    token_ids: list[int]
    max_length: int
    """Tokens of prompt and output together, at most."""
    min_length: int
    """No stop id ends the sequence before this length."""
    stop_ids: list[int]
    """At most MAX_STOP_TOKEN_IDS."""
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    logit_bias: dict[int, float]
    logprobs: int
    """Alternatives a token; -1 for no log-probabilities at all."""
    priority: int
    cache_salt: str
    arrival: float
    """`time.monotonic()` seconds."""
    deadline: float | None
    """`time.monotonic()` seconds."""
    grammar: str | None = None
    """What the output must match, in llguidance's variant of Lark."""
    prompt_logprobs: int = -1
    """Alternatives a prompt token; -1 for no log-probabilities of the prompt at all."""
    fork_seeds: list[int] = field(default_factory=list)
    """Seeds of the further sequences for this prompt; their handles follow `handle`."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What tokens are, to who holds outputs to grammars. Sent once, before the first request that has one."""

    tokens: list[bytes]
    """The bytes of each, by id, special tokens included; empty for an id that no token has."""
    special_ids: list[int]
    """Those that are no text."""
    eos_ids: list[int]
    """Those that end a sequence; at least one."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends `count` sequences from `handle` on; one that is not active is a no-op."""

    handle: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Aborts what is active and ends the core."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Takes a trace of the device for so many seconds and writes it to a folder."""

    folder: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Profiled:
    """The trace is written, or what kept it from being."""

    error: str | None


@dataclass(frozen=True, slots=True)
class Progress:
    """What the core is doing before it is ready; `fraction` is in 0..1, or None where unknown."""

    what: str
    fraction: float | None


@dataclass(frozen=True, slots=True)
class Ready:
    """The core has loaded, compiled and warmed up."""

    platform: str
    device_kind: str
    max_context: int
    """Tokens; the configured limit, or all that the pages hold if that is less."""
    num_pages: int
    """Pages that requests can hold."""
    attention: str
    """Name of the attention implementation."""
    matmul: str
    """How weights are multiplied: `xla` or `native`."""


TokenLogprobs = tuple[int, float, list[tuple[int, float]]]
"""(token_id, logprob, likeliest [(token_id, logprob)])"""


@dataclass(slots=True)
class SequenceOutput:
    """What one step gave one sequence, where that is more than its next token."""

    handle: int
    token_ids: list[int]
    """New tokens; a stop id that ended the sequence is not among them."""
    logprobs: list[TokenLogprobs] | None
    """Of each new token."""
    started: int | None = None
    """Cached prompt tokens, in the first output of a sequence."""
    finish_reason: str | None = None
    matched_stop: int | None = None
    completion_tokens: int = 0
    """Tokens generated so far, a stop id included."""
    times: tuple[float, float, float] | None = None
    """Monotonic seconds of first scheduling, first token and now, in the first and last output; 0 if it never was."""
    error: str | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the next prompt tokens."""


@dataclass(frozen=True, slots=True)
class Gauges:
    """The core's state after a step."""

    steps: int = 0
    running: int = 0
    """Requests that hold a slot."""
    waiting: int = 0
    """Requests accepted and not yet running."""
    available_pages: int = 0
    """Pages free or evictable: all of them when nothing runs."""
    cached_pages: int = 0
    """Pages held by no request whose content may be hit."""
    saved_pages: int = 0
    """Pages of preempted sequences in host memory."""
    restored_pages: int = 0
    """Pages copied back from there so far."""
    preemptions: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    """Prompt tokens found there."""
    overrun_tokens: int = 0
    """Row-steps spent on sequences that had already ended."""
    compiles_after_warmup: int = 0
    """More than 0 is a defect."""
    restarting: int = 0
    """Cores that are rebuilding the state of their device after a failed step."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step was, and when. Times are monotonic seconds."""

    step: int
    sequences: int
    """Sequences that took part."""
    chunk_tokens: int
    """Prompt tokens that rode along."""
    dispatched: float
    """Given to the device."""
    retired: float
    """Its tokens were on the host."""
    host_seconds: float
    """The loop's own work since the last step: receive, plan, pack, dispatch, retire, publish; waits excluded."""
    wait_seconds: float
    """Waiting for the device."""
    given_slots: list[int]
    """Slots that changed hands since the last step."""
    taken_slots: list[int]
    """Slots whose owner takes part for the first time."""
    freed_slots: list[int]
    """Slots whose owner got its last token from it."""
    slots: list[int] = field(default_factory=list)
    """Slots that took part."""
    prompt_slots: list[int] = field(default_factory=list)
    """Of these, the ones whose owner had tokens of its prompt computed."""
    constrained: int = 0
    """Sequences that chose a token under a constraint."""
    mask_seconds: float = 0.0
    """Computing what they might choose, part of `host_seconds`; the device computes the forward meanwhile."""
    replica: int = 0
    """Whose step it was; each counts its own."""
    waiting: int = 0
    """Requests that waited in this replica when it told of the step."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """All that one step gave, or, where there is no record, a change of the queue."""

    handles: list[int]
    """The sequences that got their next token and nothing else: most of them, and so without an object for each."""
    tokens: list[int]
    """Those tokens."""
    outputs: list[SequenceOutput]
    """Of the other sequences."""
    gauges: Gauges
    record: StepRecord | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The core cannot go on; everything in flight is lost."""

    error: str


Message = Submit | Abort | Shutdown | Vocabulary | Progress | Ready | StepOutput | Failed | Profile | Profiled
_TYPES: tuple[type, ...] = get_args(Message)
_NUMBER = {kind: number for number, kind in enumerate(_TYPES)}


def _row(message: Any) -> list[Any]:
    return [getattr(message, field.name) for field in fields(message)]


def encode(message: Message) -> bytes:
    """One msgpack array: the type's number, then its fields in order."""
    if isinstance(message, StepOutput):
        outputs = [_row(output) for output in message.outputs]
        body = [message.handles, message.tokens, outputs, _row(message.gauges), message.record and _row(message.record)]
    else:
        body = _row(message)
    data = msgpack.packb([_NUMBER[type(message)], *body])
    assert data is not None
    return data


def decode(data: bytes) -> Message:
    """Inverse of `encode`. Raises ValueError for bytes that are no message."""
    number, *body = msgpack.unpackb(data, strict_map_key=False)
    if number == _NUMBER[StepOutput]:
        handles, tokens, outputs, gauges, record = body
        outputs = [SequenceOutput(*output) for output in outputs]
        return StepOutput(handles, tokens, outputs, Gauges(*gauges), record and StepRecord(*record))
    return _TYPES[number](*body)
