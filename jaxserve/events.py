"""What a client is told: the events of a stream, and the whole that they add up to."""

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended. The values are the wire names of every interface."""

    STOP = "stop"
    """An end-of-sequence id, a stop id or a stop string."""
    LENGTH = "length"
    """`max_tokens` or the end of the context."""
    ABORT = "abort"
    """The client cancelled, or read too slowly."""
    DEADLINE = "deadline"
    """The request's deadline passed."""
    ERROR = "error"
    """The engine failed this request; `Finished.error` says how."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a chosen token under the model's own distribution (before temperature, penalties, bias)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest `(token_id, logprob)`, best first."""


@dataclass(frozen=True)
class Usage:
    """Token counts: in an event those of its sequence, in a Completion those of all, the prompt counted once."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values came from the prefix cache."""
    completion_tokens: int
    """Tokens generated, an end-of-sequence token included, tokens overrun past a stop string not."""


@dataclass(frozen=True)
class Timings:
    """Phases of a sequence's life in seconds, on the engine's clock. One that it never reached is 0."""

    queue: float
    """Accepted to first scheduled: until it ended, if it never was. A sequence after the first of its request also
    waits for their prompt here."""
    prefill: float
    """First scheduled to first token: to the end, if there was none."""
    decode: float
    """First token to the end, time preempted included."""
    total: float
    """Accepted to finished: `queue`, `prefill` and `decode` together."""
    first_token: float = 0.0
    """Accepted to first token: `queue` and `prefill` together. 0 if there was none."""


@dataclass(frozen=True)
class Started:
    """First event of a stream, once for all of its sequences: the prompt is computed."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    seed: int
    """Of the request; `output_seed` gives that of each sequence."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Of each prompt token but the first, where they were asked for."""


@dataclass(slots=True)
class Delta:
    """New tokens of a sequence. Text never splits a UTF-8 character and never shows part of a stop string.

    Not frozen, which would take three times as long to make: there is one for each token.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Finished:
    """The one terminal event of a sequence."""

    request_id: str
    index: int
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    matched_stop: str | int | None = None
    """The stop string, or the stop or end-of-sequence id."""
    error: str | None = None
    """What failed, where `finish_reason` is `error`."""


@dataclass(frozen=True)
class Output:
    """One whole sequence."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    matched_stop: str | int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """All sequences of a request, as the synchronous calls return them. What one sequence has is that of the first."""

    request_id: str
    outputs: tuple[Output, ...]
    """By index."""
    usage: Usage
    timings: Timings
    """Of the sequence that ended last."""
    seed: int | None = None
    """That was drawn from; None if no token was."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Of each prompt token but the first, where they were asked for."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first sequence."""
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        """Of the first sequence."""
        return self.outputs[0].text

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Of the first sequence."""
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        """Of the first sequence."""
        return self.outputs[0].finish_reason

    @property
    def matched_stop(self) -> str | int | None:
        """Of the first sequence."""
        return self.outputs[0].matched_stop

    @property
    def error(self) -> str | None:
        """What failed, of the first sequence."""
        return self.outputs[0].error


Event = Started | Delta | Finished
"""What a stream tells: started once, deltas, and finished once for each index."""
