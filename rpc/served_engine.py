"""What the servers need of an engine. `jaxserve.engine.Engine` is one; tests also serve a scripted one.

Stated as protocols so that importing a server or a client loads neither JAX nor a model.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from jaxserve.config import EngineConfig
from jaxserve.core.messages import Ready, StepRecord
from jaxserve.events import Event
from jaxserve.front.loads import EngineLoads
from jaxserve.front.statistics import Statistics
from jaxserve.models.config import ModelConfig
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


class ServedEngine(Protocol):
    """An engine that is ready. Every method may be called from any thread."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def model_name(self) -> str: ...
    @property
    def model_config(self) -> ModelConfig: ...
    @property
    def max_context(self) -> int:
        """Tokens of prompt and output together."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer: ...
    @property
    def device(self) -> Ready: ...
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

    def loads(self) -> EngineLoads: ...

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
