"""Reading the events of one request, sync or async: what `RequestStream` and the readers of kept streams share."""

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from jaxserve.events import Event

log = logging.getLogger(__name__)

Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]
"""What an asynchronous reader waits for, and where."""


class EventReader(ABC):
    """Yields `Started`, then for each sequence its `Delta`s and one `Finished`, to one reader.

    Args:
        request_id: of the request.
        cancel: ends it.
        lock: held while events are added. `notify` tells of them then, and `wake_readers` afterwards.
    """

    def __init__(self, request_id: str, cancel: Callable[[], None], lock: threading.Lock):
        self.request_id = request_id
        self._cancel = cancel
        # A bare lock costs a fifth of a condition, which only a reader that blocks needs.
        self._lock = lock
        self._changed = threading.Condition(lock)
        self._is_blocked = False
        self._is_read_at_end = False
        self._waiter: Waiter | None = None

    @property
    def origin(self) -> object:
        """Where the events come from: the same for each reader of a request."""
        return self

    def cancel(self) -> None:
        """Aborts the request; the stream then ends with FinishReason.ABORT. No-op once it has ended."""
        self._cancel()

    def leave(self) -> None:
        """The reader goes, and with it the request."""
        self._cancel()

    def read_at_end(self) -> None:
        """Its reader waits for the whole: what it has not read meanwhile is not counted."""
        self._is_read_at_end = True

    def take_waiter(self) -> Waiter | None:
        """What the reader waits for, to be woken by the caller."""
        with self._lock:
            waiter, self._waiter = self._waiter, None
            return waiter

    def notify(self) -> None:
        """Wakes a reader that blocks. Called under the lock."""
        if self._is_blocked:
            self._is_blocked = False
            self._changed.notify()

    @abstractmethod
    def _take(self) -> Event | None:
        """The next event, if there is one. Called under the lock."""

    @abstractmethod
    def _is_over(self) -> bool:
        """Whether none will follow, now that there is none. Called under the lock."""

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        with self._lock:
            while (event := self._take()) is None:
                if self._is_over():
                    raise StopIteration
                self._is_blocked = True
                self._changed.wait()
            return event

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while True:
            with self._lock:
                event = self._take()
                if event is not None:
                    return event
                if self._is_over():
                    raise StopAsyncIteration
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiter = (loop, future)
            await future


def wake_readers(waiters: Iterable[Waiter | None]) -> None:
    """Wakes those who wait, with one call for each event loop."""
    futures_of: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        if waiter is not None:
            futures_of.setdefault(waiter[0], []).append(waiter[1])
    for loop, futures in futures_of.items():
        try:
            loop.call_soon_threadsafe(_wake, futures)
        except RuntimeError:
            log.debug("an event loop closed while its streams were open")


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
