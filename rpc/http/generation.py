"""One HTTP request that generates, from admission to its last byte."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace

from starlette.types import Receive, Send

from jaxserve.events import Delta, Finished, FinishReason
from jaxserve.request_errors import InvalidRequest
from rpc.call_runner import CallRunner, worse
from rpc.errors import DeadlineExceeded
from rpc.http.answers import Answer
from rpc.http.errors import error_of
from rpc.http.schema import Asked
from rpc.open_calls import OpenCall
from rpc.served_engine import EventStream

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Generation:
    """The calls that answer one HTTP request: one for each prompt. `admit`, then `stream` or `whole`, then `close`."""

    def __init__(self, runner: CallRunner, request_id: str):
        self._runner = runner
        self._calls: list[OpenCall] = []
        self._streams: Sequence[EventStream] = ()
        self._watching: asyncio.Task[None] | None = None
        self.request_id = request_id

    async def admit(self, asked: Asked, receive: Receive, deadline: float | None) -> None:
        """Queues every prompt, or none. Raises what `error_of` knows.

        Args:
            asked: the prompts.
            receive: has nothing more to give but the client's leaving.
            deadline: `time.monotonic()` seconds by which all must have ended; None where there is none.
        """
        self._watching = asyncio.create_task(_until_gone(receive))
        alone = len(asked.requests) == 1
        names = [self.request_id if alone else f"{self.request_id}-{number}" for number in range(len(asked.requests))]
        requests = [
            replace(request, request_id=name, deadline=deadline)
            for request, name in zip(asked.requests, names, strict=True)
        ]
        self._calls = [self._runner.calls.open(name) for name in names]
        try:
            # The engine keeps the deadline of what it has; a long prompt or a constraint may wait before that.
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                self._streams = await self._runner.admit(requests, self._calls)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the work began") from None
        except InvalidRequest as error:
            raise InvalidRequest(asked.names.get(error.field, error.field), error.reason) from None
        # Only now, when there is something to cancel: it runs at once where the client has gone already.
        self._watching.add_done_callback(lambda _: self._cancel())

    def _cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()

    def close(self) -> None:
        """Ends what has not ended. Idempotent."""
        if self._watching is not None:
            self._watching.cancel()
        self._cancel()
        for call in self._calls:
            self._runner.calls.close(call)

    async def whole(self, answer: Answer) -> bytes:
        """The body of an answer that is not a stream. Raises what `error_of` knows."""

        async def collect(number: int, call: OpenCall, stream: EventStream) -> None:
            last: Finished | None = None
            first = number * answer.asked.n
            async for event in stream:
                if isinstance(event, Delta):
                    answer.add_delta(first + event.index, event)
                elif isinstance(event, Finished):
                    last = worse(last, event)
                    answer.add_finished(first + event.index, event)
            self._raise_for(last, call, answer)

        await self._each(collect)
        return answer.whole()

    async def stream(self, answer: Answer, headers: list[tuple[bytes, bytes]], send: Send) -> None:
        """Sends server-sent events until every sequence has ended. Raises what `error_of` knows before the first."""
        started, starting = False, asyncio.Lock()

        async def write(data: bytes) -> None:
            nonlocal started
            if not started:
                async with starting:
                    if not started:
                        head = [*_EVENT_STREAM, *headers]
                        await send({"type": "http.response.start", "status": 200, "headers": head})
                        started = True
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def follow(number: int, call: OpenCall, stream: EventStream) -> None:
            last: Finished | None = None
            first = number * answer.asked.n
            async for event in stream:
                if isinstance(event, Delta):
                    data = answer.delta_chunk(first + event.index, event)
                elif isinstance(event, Finished):
                    last = worse(last, event)
                    if not started:
                        self._raise_for(event, call, answer)  # a status can still say it
                    data = answer.finished_chunk(first + event.index, event)
                else:
                    continue
                if data:
                    await write(data)
            self._raise_for(last, call, answer)

        try:
            await self._each(follow)
            end = answer.last_chunks()
        except Exception as error:
            if not started:
                raise
            end = b"data: " + error_of(error).envelope() + b"\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _raise_for(self, last: Finished | None, call: OpenCall, answer: Answer) -> None:
        """Raises where an ending is no answer. Past a deadline what has come is one, if anything has."""
        late = last is not None and last.finish_reason is FinishReason.DEADLINE
        if not (late and answer.begun):
            self._runner.raise_for(last, call)

    async def _each(self, follow: Callable[[int, OpenCall, EventStream], Coroutine[None, None, None]]) -> None:
        """Follows every stream at once; where one fails, the others end too."""
        streams = [(number, *one) for number, one in enumerate(zip(self._calls, self._streams, strict=True))]
        if len(streams) == 1:
            await follow(*streams[0])
            return
        try:
            async with asyncio.TaskGroup() as group:
                for one in streams:
                    group.create_task(follow(*one))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
