"""What the front sees of a core, and what carries their messages: a bounded outbox, and a socket between processes."""

import contextlib
import queue
import socket
import struct
import threading
import time
from typing import Protocol

from jaxserve.core.messages import Message

_LENGTH = struct.Struct("!I")
_READ_BYTES = 1 << 18


class Core(Protocol):
    """A running core, seen from the front."""

    def send(self, command: Message) -> None:
        """Gives the core a command. Thread-safe."""
        ...

    def receive(self) -> Message | None:
        """The core's next message; None once it has ended."""
        ...

    def join(self) -> None:
        """Waits for the core to end after Shutdown."""
        ...

    def kill(self) -> None:
        """Gives up a core that hangs, with all that it does: `receive` gives None, and `join` does not wait for it. A
        process is ended; a thread cannot be, and is left behind."""
        ...


class Outbox:
    """The core's messages on their way to the front.

    At most `limit` wait in it; then the step loop does. Without a bound, a front that falls behind would show tokens
    ever later and hold ever more of them.
    """

    def __init__(self, limit: int):
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(limit)

    def put(self, message: Message) -> float:
        """Adds a message; returns the seconds that it waited for room."""
        waited = 0.0
        if not self._room.acquire(blocking=False):
            start = time.monotonic()
            self._room.acquire()
            waited = time.monotonic() - start
        self._messages.put(message)
        return waited

    def close(self) -> None:
        """Nothing follows."""
        self._messages.put(None)

    def get(self) -> Message | None:
        """The next message, waiting for it; None once there are no more."""
        message = self._messages.get()
        self._room.release()
        return message


def framed(data: bytes) -> memoryview:
    """A string behind its length, as it goes through a socket."""
    return memoryview(_LENGTH.pack(len(data)) + data)


class MessageSocket:
    """One end of a stream socket that carries byte strings, each after its length. One thread reads, one writes.

    Reading takes all that has arrived: each system call gives up the GIL, which among busy threads takes 5 ms to get
    back, and that must not be paid for each message.
    """

    def __init__(self, end: socket.socket):
        self._socket = end
        self._arrived = bytearray()

    def send_bytes(self, data: bytes) -> None:
        """Sends a string. Raises BrokenPipeError or ConnectionResetError if the other end is gone."""
        self.send_rest(framed(data))

    def send_at_once(self, rest: memoryview) -> memoryview:
        """Sends what is framed as far as it goes without waiting, and returns the bytes that did not, for `send_rest`.
        Raises as `send_bytes` does."""
        with contextlib.suppress(BlockingIOError):
            while rest:
                rest = rest[self._socket.send(rest, socket.MSG_DONTWAIT) :]
        return rest

    def send_rest(self, rest: memoryview) -> None:
        """Sends what is framed, or what `send_at_once` left, waiting for room. Raises as `send_bytes` does."""
        self._socket.sendall(rest)

    def recv_bytes(self) -> bytes:
        """The next string. Raises EOFError or ConnectionResetError if the other end is gone."""
        self._await(_LENGTH.size)
        end = _LENGTH.size + _LENGTH.unpack_from(self._arrived)[0]
        self._await(end)
        data = bytes(self._arrived[_LENGTH.size : end])
        del self._arrived[:end]
        return data

    def close(self) -> None:
        """Closes this end."""
        self._socket.close()

    def _await(self, size: int) -> None:
        while len(self._arrived) < size:
            data = self._socket.recv(_READ_BYTES)
            if not data:
                raise EOFError
            self._arrived += data
