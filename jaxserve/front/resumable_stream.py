"""Streams that outlive their reader: every event is kept, so that another reader goes on where the last one was."""

import threading
import time
from collections.abc import Callable, Sequence

from jaxserve.events import Delta, Event, Finished, Started, TokenLogprob
from jaxserve.front.event_reader import EventReader, Waiter, wake_readers
from jaxserve.request_errors import DuplicateRequestId, InvalidRequest, QueueFull, StreamNotFound, StreamTaken

EVENT_BYTES = 200
"""About what one event takes, beside its text and log-probabilities."""
LOGPROB_BYTES = 100
"""About what one log-probability takes."""


class ResumableStream:
    """The events of one request in the order in which they were given: one Delta a token, and one without a token for
    text that was held back to a sequence's end. Has the interface of `RequestStream` for the thread that delivers.

    Args:
        request_id: of the request.
        owner: its tenant.
        cancel: ends the request.
        sequences: of the request.
    """

    def __init__(self, request_id: str, owner: str, cancel: Callable[[], None], sequences: int):
        self.request_id = request_id
        self.owner = owner
        self.cancel = cancel
        self.is_accepted = False
        """Whether the core has the request; nobody takes the stream up before."""
        self.bytes = 0
        """About what the events take."""
        self.ended: float | None = None
        """Monotonic seconds of its end; None while sequences run."""
        self.idle_since: float | None = None
        """Monotonic seconds since when nobody reads; None while somebody does. Once the request has ended that is since
        the latest event was read: a reader may have them all, or go without a word."""
        self.lock = threading.Lock()
        self.events: list[Event] = []
        self.tokens = 0
        """Of these, over all sequences."""
        self._left = sequences
        self._reader: StreamReader | None = None

    def attach(self, from_token: int) -> "StreamReader":
        """A reader that begins after as many tokens; the one before it ends with StreamTaken. Raises InvalidRequest."""
        with self.lock:
            if not 0 <= from_token <= self.tokens:
                raise InvalidRequest("from_token", f"must be in [0, {self.tokens}], got {from_token}")
            before = self._reader
            self._reader = StreamReader(self, from_token)
            self.idle_since = None if self.ended is None else time.monotonic()
            if before is not None:
                before.notify()
        if before is not None:
            wake_readers([before.take_waiter()])
        return self._reader

    def leave(self, reader: "StreamReader") -> None:
        """The reader has gone; the request goes on."""
        with self.lock:
            if self._reader is reader:
                self._reader = None
                self.idle_since = time.monotonic()
                reader.notify()
        wake_readers([reader.take_waiter()])

    def is_read_by(self, reader: "StreamReader") -> bool:
        """Whether no other reader has come since."""
        return self._reader is reader

    def note_reading(self) -> None:
        """An event was read. Called under the lock."""
        if self.ended is not None:
            self.idle_since = time.monotonic()

    # The delivery thread's side.

    def start(self, started: Started) -> None:
        """Gives `Started`."""
        with self.lock:
            self._add(started, 0, _size(started.prompt_logprobs))

    def push(self, index: int, token_ids: list[int], text: str, logprobs: list[TokenLogprob] | None) -> int:
        """Gives a Delta; returns the number of tokens that count as unread."""
        delta = Delta(self.request_id, index, tuple(token_ids), text, None if logprobs is None else tuple(logprobs))
        with self.lock:
            self._add(delta, len(token_ids), 4 * len(text) + _size(logprobs))
            return 0 if self._reader is None else self._reader.unread_tokens

    def finish(self, finished: Finished) -> None:
        """Gives a sequence's terminal event."""
        with self.lock:
            self._left -= 1
            if not self._left:
                self.ended = self.idle_since = time.monotonic()
            self._add(finished, 0, 0)

    def _add(self, event: Event, tokens: int, size: int) -> None:
        self.events.append(event)
        self.tokens += tokens
        self.bytes += EVENT_BYTES + size
        if self._reader is not None:
            self._reader.notify()

    def take_waiter(self) -> Waiter | None:
        """See `EventReader.take_waiter`."""
        reader = self._reader
        return None if reader is None else reader.take_waiter()


class StreamReader(EventReader):
    """Yields `Started`, the Deltas after a number of tokens, and every `Finished`; what is there at once is joined as
    far as it is of one sequence and has tokens. Once another reader has come it raises StreamTaken."""

    def __init__(self, stream: ResumableStream, from_token: int):
        super().__init__(stream.request_id, stream.cancel, stream.lock)
        self._stream = stream
        self._from_token = from_token
        self._next = 0
        self._tokens = 0
        """Of the events before that one."""

    @property
    def origin(self) -> ResumableStream:
        """See `EventReader.origin`."""
        return self._stream

    def leave(self) -> None:
        """Stops reading; the request goes on, to be taken up by another reader."""
        self._stream.leave(self)

    @property
    def unread_tokens(self) -> int:
        """Those that count as unread."""
        return 0 if self._is_read_at_end else self._stream.tokens - max(self._tokens, self._from_token)

    def _take(self) -> Event | None:
        stream = self._stream
        if not stream.is_read_by(self):
            raise StreamTaken(f"request {self.request_id!r}: another reader has taken the stream")
        while self._next < len(stream.events):
            event, begin = stream.events[self._next], self._tokens
            self._next += 1
            if isinstance(event, Delta):
                self._tokens += len(event.token_ids)
                if begin < self._from_token:
                    continue
                event = self._joined(event)
            stream.note_reading()
            return event
        return None

    def _joined(self, delta: Delta) -> Delta:
        """The delta with those behind it of the same sequence. Text without a token stays apart: see `Attach`."""
        parts, stream = [delta], self._stream
        while delta.token_ids and self._next < len(stream.events):
            event = stream.events[self._next]
            if not isinstance(event, Delta) or event.index != delta.index or not event.token_ids:
                break
            parts.append(event)
            self._next += 1
            self._tokens += len(event.token_ids)
        if len(parts) == 1:
            return delta
        logprobs = [entry for part in parts for entry in part.logprobs or ()]
        token_ids = tuple(token for part in parts for token in part.token_ids)
        text = "".join(part.text for part in parts)
        return Delta(self.request_id, delta.index, token_ids, text, tuple(logprobs) if delta.logprobs else None)

    def _is_over(self) -> bool:
        return self._stream.ended is not None and self._next == len(self._stream.events)


class ResumableStreams:
    """The streams that may be taken up again, in bounded number, size and time. Thread-safe.

    Args:
        limit: streams kept, those of requests in flight included.
        limit_bytes: about what their events may take. Past it those that ended first are forgotten, and then the
            request whose events take most is aborted.
        seconds: how long a stream is kept after it has ended, and a request runs on without a reader.
    """

    def __init__(self, limit: int, limit_bytes: int, seconds: float):
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._seconds = seconds
        self._lock = threading.Lock()
        self._swept = 0.0
        self._streams: dict[tuple[str, str], ResumableStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: ResumableStream) -> None:
        """Keeps the stream of a new request; that of an ended one with its id is forgotten. Raises QueueFull, and
        DuplicateRequestId where the one with its id has not ended."""
        with self._lock:
            before = self._streams.get((stream.owner, stream.request_id))
            if before is not None:
                if before.ended is None:
                    raise DuplicateRequestId(f"request_id: {stream.request_id!r} is active")
                self._forget(before)
            if len(self._streams) >= self._limit:
                ended = self._in_order_of_end()
                if not ended:
                    raise QueueFull(self._limit)
                self._forget(ended[0])
            self._streams[stream.owner, stream.request_id] = stream

    def discard(self, stream: ResumableStream) -> None:
        """Forgets a stream whose request was not accepted."""
        with self._lock:
            self._forget(stream)

    def attach(self, request_id: str, owner: str, from_token: int) -> StreamReader:
        """A reader of a kept stream. Raises StreamNotFound, also for another tenant's, and InvalidRequest."""
        self.sweep()
        with self._lock:
            stream = self._streams.get((owner, request_id))
        if stream is None or not stream.is_accepted:
            raise StreamNotFound(
                f"request_id: no stream of {request_id!r} is kept: the request was not resumable, ended or was left "
                f"more than {self._seconds:g} s ago, made way for others, or was sent to a server that has ended"
            )
        return stream.attach(from_token)

    def sweep(self, interval: float = 0.0) -> None:
        """Forgets and aborts what is past its bounds, if that was not done in the last `interval` seconds."""
        now = time.monotonic()
        if not self._streams or now - self._swept < interval:
            return
        self._swept = now
        with self._lock:
            for stream in list(self._streams.values()):
                if stream.idle_since is not None and now - stream.idle_since > self._seconds:
                    if stream.ended is None:
                        stream.cancel()
                    else:
                        self._forget(stream)
            self._shrink()

    def _forget(self, stream: ResumableStream) -> None:
        self._streams.pop((stream.owner, stream.request_id), None)

    def _in_order_of_end(self) -> list[ResumableStream]:
        ended = [stream for stream in self._streams.values() if stream.ended is not None]
        return sorted(ended, key=lambda stream: stream.ended or 0.0)

    def _shrink(self) -> None:
        total = sum(stream.bytes for stream in self._streams.values())
        for stream in self._in_order_of_end():
            if total > self._limit_bytes:
                total -= stream.bytes
                self._forget(stream)
        if total > self._limit_bytes:
            max(self._streams.values(), key=lambda stream: stream.bytes).cancel()


def _size(logprobs: Sequence[TokenLogprob] | None) -> int:
    return LOGPROB_BYTES * sum(1 + len(entry.top) for entry in logprobs or ())
