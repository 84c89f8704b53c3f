"""The events of one request, from the engine's delivery thread to whoever iterates, sync or async."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.events import Delta, Event, Finished, Started, TokenLogprob
from jaxserve.front.event_reader import EventReader


@dataclass(slots=True)
class _Unread:
    """What a sequence was given since its last Delta."""

    token_ids: list[int]
    text: list[str]
    logprobs: list[TokenLogprob] | None

    def add(self, token_ids: list[int], text: str, logprobs: list[TokenLogprob] | None) -> None:
        """Adds what came before it was read."""
        self.token_ids += token_ids
        self.text.append(text)
        if self.logprobs is None:
            self.logprobs = logprobs
        elif logprobs is not None:
            self.logprobs += logprobs


class RequestStream(EventReader):
    """What is not kept: a reader that goes ends the request.

    What is not read at once is joined into one Delta a sequence, so that a slow reader costs one buffer of at most
    `max_tokens` for each. A request that ends before its prompt is computed gives `Finished` alone.
    """

    def __init__(self, request_id: str, cancel: Callable[[], None], sequences: int = 1):
        super().__init__(request_id, cancel, threading.Lock())
        self._sequences = sequences
        """Whose `Finished` was not read yet."""
        self._started: Started | None = None
        self._unread: dict[int, _Unread] = {}
        """By index of the sequence, the longest unread first."""
        self._unread_tokens = 0
        self._finished: deque[Finished] = deque()

    # The delivery thread's side.

    def start(self, started: Started) -> None:
        """Gives `Started`."""
        with self._lock:
            self._started = started
            self.notify()

    def push(self, index: int, token_ids: list[int], text: str, logprobs: list[TokenLogprob] | None) -> int:
        """Adds to the delta of a sequence that is read next, keeping the lists; returns how many tokens count as
        unread."""
        with self._lock:
            unread = self._unread.get(index)
            if unread is None:
                self._unread[index] = _Unread(token_ids, [text], logprobs)
            else:
                unread.add(token_ids, text, logprobs)
            self._unread_tokens += len(token_ids)
            self.notify()
            return 0 if self._is_read_at_end else self._unread_tokens

    def finish(self, finished: Finished) -> None:
        """Gives a sequence's terminal event; nothing of it may follow."""
        with self._lock:
            self._finished.append(finished)
            assert len(self._finished) <= self._sequences, "a sequence ends once"
            self.notify()

    # The reader's side.

    def _take(self) -> Event | None:
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

    def _is_over(self) -> bool:
        return not self._sequences
