"""The requests that an engine has accepted and not ended: who may come in, and how each is found again."""

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from jaxserve.core_messages import Submit
from jaxserve.request import DuplicateRequestId, EngineUnavailable, QueueFull, Request, TenantBusy
from jaxserve.request_stream import RequestStream
from jaxserve.text_stream import TextStream

RETRY_AFTER = 1.0
"""Seconds after which a refused client is told to try again."""


@dataclass
class ActiveRequest:
    """An accepted request that has not ended."""

    request: Request
    submit: Submit
    stream: RequestStream
    text: TextStream | None
    tokens: int = 0
    """Tokens delivered."""
    cached_tokens: int = 0
    times: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Monotonic seconds of first scheduling, first token and last token; 0 for what has not been."""


class ActiveRequests:
    """Registry of the requests in flight, and the door to it. Thread-safe.

    Args:
        capacity: requests that may be in flight.
        tenant_limit: of these, those of one tenant; None bounds only all together.
    """

    def __init__(self, capacity: int, tenant_limit: int | None = None):
        self.capacity = capacity
        self._changed = threading.Condition()
        self._by_handle: dict[int, ActiveRequest] = {}
        self._handles: dict[tuple[str, str], int] = {}
        """By tenant and request id: no tenant learns of the ids of another."""
        self._tenant_limit = tenant_limit
        self._tenants: Counter[str] = Counter()
        """Requests in flight of each tenant."""
        self._accepting = True
        self._failure: str | None = None

    def __len__(self) -> int:
        return len(self._by_handle)

    @property
    def is_open(self) -> bool:
        """Whether requests are accepted, if there is room."""
        return self._accepting and self._failure is None

    def check_room(self, request: Request) -> None:
        """Raises EngineUnavailable, DuplicateRequestId, QueueFull or TenantBusy if the request cannot come in now."""
        if self._failure is not None:
            raise EngineUnavailable(f"the engine has failed: {self._failure}")
        if not self._accepting:
            raise EngineUnavailable("the engine is draining and takes no requests")
        if (request.tenant, request.request_id) in self._handles:
            raise DuplicateRequestId(f"request_id: {request.request_id!r} is active")
        if len(self._by_handle) >= self.capacity:
            raise QueueFull(self.capacity, RETRY_AFTER)
        limit = self._tenant_limit
        if request.tenant and limit is not None and self._tenants[request.tenant] >= limit:
            raise TenantBusy(limit, RETRY_AFTER)

    def add(self, active: ActiveRequest) -> None:
        """Takes a request in, or raises what `check_room` does."""
        with self._changed:
            self.check_room(active.request)
            self._by_handle[active.submit.handle] = active
            self._handles[active.request.tenant, active.request.request_id] = active.submit.handle
            self._tenants[active.request.tenant] += 1

    def get(self, handle: int) -> ActiveRequest | None:
        """The request with this handle, if it is active."""
        return self._by_handle.get(handle)

    def handles_of(self, request_id: str, tenant: str | None) -> list[int]:
        """The handles of the active requests with this id: a tenant's one, or for None those of every tenant."""
        if tenant is not None:
            handle = self._handles.get((tenant, request_id))
            return [] if handle is None else [handle]
        with self._changed:
            return [handle for (_, name), handle in self._handles.items() if name == request_id]

    def all(self) -> Iterable[ActiveRequest]:
        """Those in flight now."""
        return list(self._by_handle.values())

    def remove(self, active: ActiveRequest) -> None:
        """Lets go of a request that has ended."""
        with self._changed:
            del self._by_handle[active.submit.handle]
            tenant = active.request.tenant
            del self._handles[tenant, active.request.request_id]
            self._tenants[tenant] -= 1
            if not self._tenants[tenant]:
                del self._tenants[tenant]  # tenants come and go
            self._changed.notify_all()

    def wait_until_none(self, timeout: float) -> bool:
        """Whether none is left after at most `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._by_handle, timeout=timeout)

    def close(self) -> None:
        """Accepts no more; those in flight go on."""
        self._accepting = False

    def fail(self, error: str) -> None:
        """Accepts no more: the core is gone. The first error is the one that is told."""
        self._failure = self._failure or error
