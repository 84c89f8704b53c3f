"""The events of one request, from the engine's delivery thread to whoever iterates, sync or async."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from jaxserve.request import Delta, Event, Finished, Started, TokenLogprob


class RequestStream:
    """Yields `Started`, `Delta`s and one `Finished`, in that order, to one reader.

    What is not read at once is joined into one Delta, so that a slow reader costs one buffer of at most `max_tokens`.
    A request that ends before it holds a slot gives `Finished` alone.
    """

    def __init__(self, request_id: str, cancel: Callable[[], None]):
        self.request_id = request_id
        self._cancel = cancel
        # A bare lock costs a fifth of a condition, which only a reader that blocks needs.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._is_blocked = False
        self._started: Started | None = None
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._has_delta = False
        self._finished: Finished | None = None
        self._closed = False
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def cancel(self) -> None:
        """Aborts the request; the stream then ends with FinishReason.ABORT. No-op once it has ended."""
        self._cancel()

    # The delivery thread's side.

    def start(self, started: Started) -> None:
        """Gives `Started`."""
        with self._lock:
            self._started = started
            self._notify()

    def push(self, token_ids: list[int], text: str, logprobs: list[TokenLogprob] | None) -> int:
        """Adds to the delta that is read next; returns the number of tokens that are unread."""
        with self._lock:
            self._has_delta = True
            self._token_ids += token_ids
            if text:
                self._text.append(text)
            if logprobs is not None:
                self._logprobs = (self._logprobs or []) + logprobs
            self._notify()
            return len(self._token_ids)

    def finish(self, finished: Finished) -> None:
        """Gives the terminal event; nothing may follow."""
        with self._lock:
            assert self._finished is None, "a request ends once"
            self._finished = finished
            self._notify()

    def _notify(self) -> None:
        if self._is_blocked:
            self._is_blocked = False
            self._changed.notify()

    def take_waiter(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None:
        """The reader's future, to be woken by the caller in its event loop."""
        with self._lock:
            waiter, self._waiter = self._waiter, None
            return waiter

    # The reader's side.

    def _next_event(self) -> Event | None:
        if self._started is not None:
            event, self._started = self._started, None
            return event
        if self._has_delta:
            logprobs = None if self._logprobs is None else tuple(self._logprobs)
            delta = Delta(self.request_id, 0, tuple(self._token_ids), "".join(self._text), logprobs)
            self._has_delta = False
            self._token_ids, self._text, self._logprobs = [], [], None
            return delta
        if self._finished is not None and not self._closed:
            self._closed = True
            return self._finished
        return None

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        with self._lock:
            while (event := self._next_event()) is None:
                if self._closed:
                    raise StopIteration
                self._is_blocked = True
                self._changed.wait()
            return event

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while True:
            with self._lock:
                event = self._next_event()
                if event is not None:
                    return event
                if self._closed:
                    raise StopAsyncIteration
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiter = (loop, future)
            await future


def wake(waiters: list[asyncio.Future[None]]) -> None:
    """Wakes readers; runs in their event loop."""
    for future in waiters:
        if not future.done():
            future.set_result(None)
