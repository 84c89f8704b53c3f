"""The events of one request, from the engine's delivery thread to whoever iterates, sync or async."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from jaxserve.events import Delta, Event, Finished, Started, TokenLogprob


class _Unread:
    """What a sequence was given since its last Delta."""

    __slots__ = ("logprobs", "text", "token_ids")

    def __init__(self, token_ids: list[int], text: str, logprobs: list[TokenLogprob] | None):
        self.token_ids = token_ids
        self.text = [text]
        self.logprobs = logprobs

    def add(self, token_ids: list[int], text: str, logprobs: list[TokenLogprob] | None) -> None:
        """Adds what came before it was read."""
        self.token_ids += token_ids
        self.text.append(text)
        if self.logprobs is None:
            self.logprobs = logprobs
        elif logprobs is not None:
            self.logprobs += logprobs


class RequestStream:
    """Yields `Started`, then for each sequence its `Delta`s and one `Finished`, in that order, to one reader.

    What is not read at once is joined into one Delta a sequence, so that a slow reader costs one buffer of at most
    `max_tokens` for each. A request that ends before its prompt is computed gives `Finished` alone.
    """

    def __init__(self, request_id: str, cancel: Callable[[], None], sequences: int = 1):
        self.request_id = request_id
        self._sequences = sequences
        """Whose `Finished` was not read yet."""
        self._cancel = cancel
        # A bare lock costs a fifth of a condition, which only a reader that blocks needs.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._is_blocked = False
        self._started: Started | None = None
        self._unread: dict[int, _Unread] = {}
        """By index of the sequence, the longest unread first."""
        self._unread_tokens = 0
        self._is_read_at_end = False
        self._finished: deque[Finished] = deque()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def origin(self) -> "RequestStream":
        """Where the events come from, to be told apart from other requests'."""
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

    # The delivery thread's side.

    def start(self, started: Started) -> None:
        """Gives `Started`."""
        with self._lock:
            self._started = started
            self._notify()

    def push(self, index: int, token_ids: list[int], text: str, logprobs: list[TokenLogprob] | None) -> int:
        """Adds to the delta of a sequence that is read next, keeping the lists; returns how many tokens count as
        unread."""
        with self._lock:
            unread = self._unread.get(index)
            if unread is None:
                self._unread[index] = _Unread(token_ids, text, logprobs)
            else:
                unread.add(token_ids, text, logprobs)
            self._unread_tokens += len(token_ids)
            self._notify()
            return 0 if self._is_read_at_end else self._unread_tokens

    def finish(self, finished: Finished) -> None:
        """Gives a sequence's terminal event; nothing of it may follow."""
        with self._lock:
            self._finished.append(finished)
            assert len(self._finished) <= self._sequences, "a sequence ends once"
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
        if self._unread:
            index = next(iter(self._unread))
            unread = self._unread.pop(index)
            self._unread_tokens -= len(unread.token_ids)
            logprobs = None if unread.logprobs is None else tuple(unread.logprobs)
            return Delta(self.request_id, index, tuple(unread.token_ids), "".join(unread.text), logprobs)
        if self._finished:
            self._sequences -= 1
            return self._finished.popleft()
        return None

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        with self._lock:
            while (event := self._next_event()) is None:
                if not self._sequences:
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
                if not self._sequences:
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
