"""Closing a connection so that the last answer on it arrives (RFC 9112, 9.6), and knowing whether any answer does.

A socket that is closed with bytes unread resets its connection, and the reset takes what the peer has not read yet with
it: who is refused in the middle of a large body would see a broken pipe instead of the refusal.
"""

import asyncio
from collections.abc import Callable

LINGER_TIME = 5.0
"""Seconds that a peer may go on sending after its request was refused."""
LINGER_BYTES = 64 << 20
"""That are read and dropped meanwhile; past them the connection is reset."""


class LingeringTransport(asyncio.Transport):
    """A transport whose `close` first lets the peer finish, where it is in the middle of a message.

    Args:
        transport: the connection.
        in_message: whether the peer has begun a message and not ended it.
    """

    def __init__(self, transport: asyncio.Transport, in_message: Callable[[], bool]):
        super().__init__()
        self._transport = transport
        self._in_message = in_message
        self._timer: asyncio.TimerHandle | None = None
        self._room = LINGER_BYTES
        self._written = 0
        self._taken: int | None = None
        """Bytes that the system had taken when it was last asked."""
        self._moved = 0.0

    @property
    def is_lingering(self) -> bool:
        """Nothing more is said; what comes is for `drop`."""
        return self._timer is not None

    def close(self) -> None:
        """Says no more, and closes once the peer has ended, or after `LINGER_TIME`."""
        if self.is_closing():
            return
        if not self._in_message():
            self._transport.close()
            return
        self._timer = asyncio.get_running_loop().call_later(LINGER_TIME, self._transport.close)
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()

    def drop(self, data: bytes) -> None:
        """Takes what came while lingering."""
        self._room -= len(data)
        if self._room < 0:
            self._transport.close()

    def stop(self) -> None:
        """The connection is gone."""
        if self._timer is not None:
            self._timer.cancel()

    def is_closing(self) -> bool:
        """Whether `close` or `abort` was called, or the peer has gone."""
        return self.is_lingering or self._transport.is_closing()

    def abort(self) -> None:
        """Closes at once; what is not sent is lost."""
        self._transport.abort()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends, unless closing."""
        if self.is_lingering:
            return
        self._written += len(data)
        self._transport.write(data)

    def get_write_buffer_size(self) -> int:
        """Bytes that the system has not taken yet; under TLS not all of them are seen."""
        return self._transport.get_write_buffer_size()

    def stalled(self, now: float) -> float:
        """Seconds for which the peer has been seen to take nothing of what it is sent. `now`: any clock's."""
        left = self.get_write_buffer_size()
        taken = self._written - left
        if not left or taken != self._taken:
            self._taken, self._moved = taken, now
        return now - self._moved

    def pause_reading(self) -> None:
        """Reads no more for now."""
        if not self.is_lingering:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Reads on."""
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: object = None) -> object:
        """What is known of the connection."""
        return self._transport.get_extra_info(name, default)
