"""How the stream of a resumable request goes on when its connection breaks, for both clients."""

import threading
from collections.abc import Callable
from typing import Protocol

from jaxserve.events import Delta, Event, Finished, Started
from jaxserve.request_errors import DuplicateRequestId, StreamNotFound
from rpc.errors import ConnectionLost

ATTEMPTS = 8
"""Times that a stream is taken up again without a token between them."""
DELAY = 0.1
"""Seconds before the first of them; each waits so much longer."""

ABORT_SECONDS = 2.0
"""That a request which is left may take to be aborted; who leaves does not wait for a server that says nothing."""


class Position:
    """How far a stream has come, over all of its connections, and what it tells besides its deltas.

    Args:
        request_id: of the request.
        tokens: that came before, in another stream.
    """

    def __init__(self, request_id: str, tokens: int = 0):
        self.request_id = request_id
        self.started: Started | None = None
        """Prompt tokens, cached tokens and the seed; None before the first event."""
        self.finished: Finished | None = None
        """Finish reason, usage and timings; None until the stream has ended."""
        self.tokens = tokens
        """Of all sequences, those that came before this stream included: where to attach next."""
        self._ended: set[int] = set()
        self._with_last_text: set[int] = set()

    @property
    def has_begun(self) -> bool:
        """Whether anything has come."""
        return self.started is not None or bool(self._ended)

    def note(self, event: Event) -> None:
        """Keeps what is no delta."""
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, Finished):
            self.finished = event

    def is_new(self, event: Event) -> bool:
        """Counts an event; False for what has come before the stream was taken up again."""
        if isinstance(event, Started):
            return self.started is None
        if isinstance(event, Delta) and event.token_ids:
            self.tokens += len(event.token_ids)
            return True
        seen = self._ended if isinstance(event, Finished) else self._with_last_text
        is_new = event.index not in seen
        seen.add(event.index)
        return is_new


class Recovery[Call]:
    """Decides what follows a call that failed.

    Args:
        attach: takes the stream up after a number of tokens.
        send: sends the request; None where another client sent it.
    """

    def __init__(self, attach: Callable[[int], Call], send: Callable[[], Call] | None):
        self._attach = attach
        self._send = send
        self._was_sent_again = False
        self._failures = 0
        self._tokens = 0
        """When it failed last."""

    def after(self, error: Exception, position: Position) -> tuple[float, Callable[[], Call]]:
        """Seconds to wait, and what then makes the call to go on with. Raises the error where none does."""
        if position.tokens > self._tokens:
            self._tokens, self._failures = position.tokens, 0
        self._failures += 1
        delay = DELAY * self._failures
        if self._failures > ATTEMPTS:
            raise error
        if isinstance(error, ConnectionLost):
            return delay, lambda: self._attach(position.tokens)
        if isinstance(error, StreamNotFound) and self._send is not None and not position.has_begun:
            self._was_sent_again = True  # it never arrived
            return delay, self._send
        if isinstance(error, DuplicateRequestId) and self._was_sent_again:
            return delay, lambda: self._attach(position.tokens)  # it did, in the meantime
        raise error


class Cancellable(Protocol):
    """A call, of grpc or grpc.aio."""

    def cancel(self) -> object:
        """Ends it; no-op once it has ended."""
        ...


class ReceivedStream[Call: Cancellable, Aborting](Position):
    """What both clients know of the stream of one request.

    A request that asked to be `resumable` is taken up again after a broken connection, without a lost or repeated
    token; when it is left or cancelled it is aborted. One that `attach` took up is not: it goes on for other readers.
    """

    def __init__(
        self,
        call: Call,
        request_id: str,
        recovery: Recovery[Call] | None = None,
        abort: Callable[[], Aborting] | None = None,
        from_token: int = 0,
    ):
        """`recovery`: of a stream that is kept. `abort`: ends its request when it is left."""
        super().__init__(request_id, from_token)
        self._call = call
        self._recovery = recovery
        self._abort = abort
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ends the request on the server, and the iteration without an error. Of plain code from any thread."""
        self._cancelled.set()
        self._call.cancel()
