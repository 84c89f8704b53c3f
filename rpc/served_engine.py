"""What the servers need of an engine. `jaxserve.engine.Engine` is one; tests also serve a scripted one.

Stated as protocols so that importing a server or a client loads neither JAX nor a model.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from jaxserve.config import EngineConfig
from jaxserve.core.messages import StepRecord
from jaxserve.events import Event
from jaxserve.front.statistics import Statistics
from jaxserve.request import Request


class EventStream(Protocol):
    """The events of one request: Started, Deltas, one Finished; then it ends."""

    request_id: str

    @property
    def origin(self) -> object:
        """The same for every reader of one request."""
        ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self) -> None:
        """Ends the request if it is still active. Never blocks."""
        ...

    def leave(self) -> None:
        """Its reader goes: ends the request as well, unless its stream is kept to be taken up again."""
        ...


class TextTokenizer(Protocol):
    """Text to token ids and back."""

    def start(self) -> None:
        """Makes ready what the first chat would wait for. Blocks."""
        ...

    def encode(self, text: str) -> list[int]:
        """As a raw prompt is tokenized, the model's own special tokens included. Raises ValueError."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Source of the model's chat template; None where it has none."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """A conversation in the model's template. Raises ValueError where it cannot be rendered."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        ...

    def to_files(self) -> Mapping[str, str]:
        """Files of a Hugging Face folder, content by name, that make the same tokenizer."""
        ...

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for."""
        ...

    @property
    def text_bytes(self) -> Sequence[bytes]:
        """By id, the bytes that a token adds to a text; a special one adds none."""
        ...


class Device(Protocol):
    """Where the engine runs."""

    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...
    @property
    def attention(self) -> str: ...


class ModelShape(Protocol):
    """What a client may learn of a model: the fields of `jaxserve.models.config.ModelConfig` that are sent."""

    @property
    def family(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_q_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def eos_ids(self) -> Sequence[int]: ...
    @property
    def bos_id(self) -> int | None: ...


class Loads(Protocol):
    """How busy an engine is; counts, as in `GetLoadsResponse`."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def available_pages(self) -> int: ...
    @property
    def cached_pages(self) -> int: ...
    @property
    def total_pages(self) -> int: ...
    @property
    def saved_pages(self) -> int: ...
    @property
    def restored_pages(self) -> int: ...
    @property
    def resumable_streams(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prefix_queries(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def overrun_tokens(self) -> int: ...
    @property
    def compiles_after_warmup(self) -> int: ...


class ServedEngine(Protocol):
    """An engine that is ready. Every method may be called from any thread."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def model_name(self) -> str: ...
    @property
    def model_config(self) -> ModelShape: ...
    @property
    def max_context(self) -> int:
        """Tokens of prompt and output together."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer: ...
    @property
    def device(self) -> Device: ...
    @property
    def is_healthy(self) -> bool: ...

    @property
    def statistics(self) -> Statistics:
        """What has been done since the engine started."""
        ...

    @property
    def step_records(self) -> Sequence[StepRecord]:
        """The latest steps, oldest first."""
        ...

    def submit_all(self, requests: Sequence[Request]) -> Sequence[EventStream]:
        """Validates, tokenizes and queues all of the requests. Raises a RequestError, having allocated nothing."""
        ...

    def attach(self, request_id: str, from_token: int, tenant: str = "") -> EventStream:
        """Takes up a kept stream. Raises StreamNotFound or InvalidRequest."""
        ...

    def abort(self, request_id: str, tenant: str | None = None) -> bool:
        """Ends an active request; False where there is none with this id, or none of this tenant's."""
        ...

    def loads(self) -> Loads: ...

    def profile(self, seconds: float) -> str:
        """Takes a trace of the device and returns its folder. Blocks. Raises InvalidRequest and EngineUnavailable."""
        ...

    def drain(self) -> None:
        """Takes no more requests; those accepted go on."""
        ...

    def shutdown(self, grace: float = 0.0) -> bool:
        """Waits up to `grace` seconds for accepted requests, aborts the rest, and stops. Blocks.

        Returns whether all of them finished by themselves.
        """
        ...
