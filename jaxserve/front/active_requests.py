"""The requests that an engine has accepted and not ended: who may come in, and how each is found again."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.core.messages import Submit
from jaxserve.events import TokenLogprob
from jaxserve.front.request_stream import RequestStream
from jaxserve.front.resumable_stream import ResumableStream
from jaxserve.request import Request
from jaxserve.request_errors import DuplicateRequestId, EngineUnavailable, QueueFull, TenantBusy
from jaxserve.tokenizing.text_stream import TextStream


@dataclass
class ActiveRequest:
    """An accepted request of which a sequence has not ended."""

    request: Request
    submit: Submit
    stream: RequestStream | ResumableStream
    sequences: int
    """Not ended."""
    cached_tokens: int | None = None
    """Of the prompt; None before it is computed."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """So far."""
    has_slow_reader: bool = False
    """It was aborted for that."""


@dataclass
class ActiveSequence:
    """A sequence that has not ended."""

    of: ActiveRequest
    index: int
    text: TextStream | None
    tokens: int = 0
    """Tokens delivered."""
    delivered: float = 0.0
    """Monotonic seconds of the latest delivery of tokens; 0 before the first."""
    times: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Monotonic seconds of first scheduling, first token and last token; 0 for what has not been."""

    @property
    def handle(self) -> int:
        """The core's name for it."""
        return self.of.submit.handle + self.index


class ActiveRequests:
    """Registry of the sequences in flight, and the door to it. Thread-safe.

    Args:
        capacity: sequences that may be in flight.
        tenant_limit: of these, those of one tenant; None bounds only all together.
    """

    def __init__(self, capacity: int, tenant_limit: int | None = None):
        self.capacity = capacity
        self._changed = threading.Condition()
        self._by_handle: dict[int, ActiveSequence] = {}
        self._by_id: dict[tuple[str, str], ActiveRequest] = {}
        """By tenant and request id: no tenant learns of the ids of another."""
        self._tenant_limit = tenant_limit
        self._tenants: Counter[str] = Counter()
        """Sequences in flight of each tenant."""
        self._accepting = True
        self._failure: str | None = None

    def __len__(self) -> int:
        return len(self._by_handle)

    @property
    def is_open(self) -> bool:
        """Whether requests are accepted, if there is room."""
        return self._accepting and self._failure is None

    def check_room(self, requests: Sequence[Request]) -> None:
        """Raises EngineUnavailable, DuplicateRequestId, QueueFull or TenantBusy if they cannot all come in now."""
        if self._failure is not None:
            raise EngineUnavailable(f"the engine has failed: {self._failure}")
        if not self._accepting:
            raise EngineUnavailable("the engine is draining and takes no requests")
        ids: set[tuple[str, str]] = set()
        added: Counter[str] = Counter()
        for request in requests:
            key = (request.tenant, request.request_id)
            if key in self._by_id or key in ids:
                raise DuplicateRequestId(f"request_id: {request.request_id!r} is active")
            ids.add(key)
            added[request.tenant] += request.sampling.n
        if len(self._by_handle) + added.total() > self.capacity:
            raise QueueFull(self.capacity)
        limit = self._tenant_limit
        if limit is not None and any(tenant and self._tenants[tenant] + n > limit for tenant, n in added.items()):
            raise TenantBusy(limit)

    def add(self, requests: Sequence[tuple[ActiveRequest, Sequence[TextStream | None]]]) -> None:
        """Takes all of the requests in, each with a text for each of its sequences, or raises what `check_room` does
        and takes none."""
        with self._changed:
            self.check_room([active.request for active, _ in requests])
            for active, texts in requests:
                self._by_id[active.request.tenant, active.request.request_id] = active
                self._tenants[active.request.tenant] += active.sequences
                for index, text in enumerate(texts):
                    self._by_handle[active.submit.handle + index] = ActiveSequence(active, index, text)

    def take_back(self, requests: Sequence[ActiveRequest]) -> None:
        """Lets go of requests that were added and could not be given to the core."""
        for active in requests:
            for index in range(active.request.sampling.n):
                self.remove(self._by_handle[active.submit.handle + index])

    def get(self, handle: int) -> ActiveSequence | None:
        """The sequence with this handle, if it is active."""
        return self._by_handle.get(handle)

    def find(self, request_id: str, tenant: str | None) -> list[ActiveRequest]:
        """The active requests with this id: a tenant's one, or for None those of every tenant."""
        if tenant is not None:
            active = self._by_id.get((tenant, request_id))
            return [] if active is None else [active]
        with self._changed:
            return [active for (_, name), active in self._by_id.items() if name == request_id]

    def all(self) -> list[ActiveSequence]:
        """Those in flight now."""
        return list(self._by_handle.values())

    def remove(self, sequence: ActiveSequence) -> None:
        """Lets go of a sequence that has ended, and with the last one of its request."""
        active = sequence.of
        with self._changed:
            del self._by_handle[sequence.handle]
            active.sequences -= 1
            tenant = active.request.tenant
            if not active.sequences:
                del self._by_id[tenant, active.request.request_id]
            self._tenants[tenant] -= 1
            if not self._tenants[tenant]:
                del self._tenants[tenant]  # tenants come and go
            self._changed.notify_all()

    def wait_until_none(self, timeout: float) -> bool:
        """Whether none is left after at most `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._by_handle, timeout=min(timeout, threading.TIMEOUT_MAX))

    def close(self) -> None:
        """Accepts no more; those in flight go on."""
        self._accepting = False

    def fail(self, error: str) -> None:
        """Accepts no more: the core is gone. The first error is the one that is told. What was being taken in is in."""
        with self._changed:
            self._failure = self._failure or error
