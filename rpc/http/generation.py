"""One HTTP request that generates, from admission to its last byte."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace

from starlette.types import Receive, Send

from jaxserve.events import Delta, Finished
from rpc.call_runner import CallRunner, worse
from rpc.errors import RequestFailed
from rpc.http.answers import Answer
from rpc.http.errors import error_of
from rpc.http.schema import Asked
from rpc.open_calls import OpenCall, OpenCalls
from rpc.served_engine import EventStream

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Generation:
    """The calls that answer one HTTP request: one for each prompt. `admit`, then `stream` or `whole`, then `close`."""

    def __init__(self, runner: CallRunner, calls: OpenCalls, request_id: str, disconnect: Callable[[], object]):
        """`disconnect`: ends the connection of a client that reads nothing."""
        self._runner = runner
        self._open_calls = calls
        self._disconnect = disconnect
        self._calls: list[OpenCall] = []
        self._watching: asyncio.Task[None] | None = None
        self.request_id = request_id

    async def admit(self, asked: Asked, receive: Receive) -> None:
        """Queues every prompt, or none. `receive`: has nothing more to give but the client's leaving.

        Raises what `error_of` knows.
        """
        self._watching = asyncio.create_task(_until_gone(receive))
        for number, request in enumerate(asked.requests):
            name = self.request_id if len(asked.requests) == 1 else f"{self.request_id}-{number}"
            call = self._open_calls.open(name, self._disconnect)
            self._calls.append(call)
            await self._runner.admit(replace(request, request_id=name), call)
        # Only now, when there is something to cancel: it runs at once where the client has gone already.
        self._watching.add_done_callback(lambda _: self._cancel())

    def _cancel(self) -> None:
        for call in self._calls:
            if call.stream is not None:
                call.stream.cancel()

    def close(self) -> None:
        """Ends what has not ended. Idempotent."""
        if self._watching is not None:
            self._watching.cancel()
        self._cancel()
        for call in self._calls:
            self._open_calls.close(call)

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
            self._runner.raise_for(last, call)

        await self._each(collect)
        return answer.whole()

    async def stream(self, answer: Answer, headers: list[tuple[bytes, bytes]], send: Send) -> None:
        """Sends server-sent events until every sequence has ended."""

        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def follow(number: int, call: OpenCall, stream: EventStream) -> None:
            last: Finished | None = None
            first = number * answer.asked.n
            async for event in stream:
                if isinstance(event, Delta):
                    data = answer.delta_chunk(first + event.index, event)
                elif isinstance(event, Finished):
                    last = worse(last, event)
                    data = answer.finished_chunk(first + event.index, event)
                else:
                    continue
                if data:
                    call.write_began = time.monotonic()
                    await write(data)
                    call.write_began = None
            self._runner.raise_for(last, call)

        await send({"type": "http.response.start", "status": 200, "headers": [*_EVENT_STREAM, *headers]})
        try:
            await self._each(follow)
            end = answer.last_chunks()
        except Exception as error:
            end = b"data: " + error_of(error, self.request_id).envelope() + b"\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": False})

    async def _each(self, follow: Callable[[int, OpenCall, EventStream], Coroutine[None, None, None]]) -> None:
        """Follows every stream at once; where one fails, the others end too."""
        followed = [(number, call, call.stream) for number, call in enumerate(self._calls)]
        streams = [(number, call, stream) for number, call, stream in followed if stream is not None]
        if len(streams) != len(followed):
            raise RequestFailed("a prompt was not admitted")
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
