"""The generate calls that are open on a server: what a drain waits for, and which of them have stalled."""

import asyncio
import logging
import time

from rpc.served_engine import EventStream

logger = logging.getLogger(__name__)


class OpenCall:
    """One call that generates, whatever its protocol."""

    __slots__ = ("aborted", "request_id", "stream", "write_began")

    def __init__(self, request_id: str):
        self.request_id = request_id
        self.aborted = False
        """Before the engine had the request."""
        self.stream: EventStream | None = None
        self.write_began: float | None = None
        """`time.monotonic()` seconds when the write in progress began; None between writes, and for a call over HTTP,
        whose connection is watched instead."""

    def take(self, stream: EventStream) -> None:
        """The engine has the request; one that was aborted before ends."""
        self.stream = stream
        if self.aborted:
            stream.cancel()


class OpenCalls:
    """Every open generate call, from its handler's start until its status is on the wire."""

    def __init__(self, stall_limit: float):
        """`stall_limit`: seconds one write may wait for its reader before the request is aborted."""
        self._stall_limit = stall_limit
        self._calls: set[OpenCall] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._calls)

    def open(self, request_id: str) -> OpenCall:
        """Takes up a call until it is closed."""
        call = OpenCall(request_id)
        self._calls.add(call)
        self._idle.clear()
        return call

    def close(self, call: OpenCall) -> None:
        """Its status is on the wire, or nobody waits for it any more. Idempotent."""
        self._calls.discard(call)
        if not self._calls:
            self._idle.set()

    async def wait_until_none(self, timeout: float | None = None) -> bool:
        """Waits until no call is open; False if some still are after `timeout` seconds, where that is given."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def abort_stalled(self) -> None:
        """Aborts requests whose reader has not taken a message within the stall limit, and stops waiting for them.

        The pages are free at once. A call of gRPC stays with its transport: a reader that wakes up gets what is left
        and `finish_reason` abort; one that never does costs one message and ends with its connection.
        """
        now = time.monotonic()
        for call in list(self._calls):
            began, stream = call.write_began, call.stream
            if began is not None and stream is not None and now - began > self._stall_limit:
                logger.warning(
                    "request %s aborted: its client read nothing for %g s",
                    call.request_id,
                    self._stall_limit,
                    extra={"request_id": call.request_id},
                )
                stream.cancel()
                self.close(call)
