"""The client for asyncio."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from jaxserve.events import Completion, Delta, Event
from jaxserve.front.generating import Prompt
from jaxserve.request_errors import EngineUnavailable, RequestError
from rpc.client.calls import (
    DEFAULT_ADDRESS,
    NOTHING_SHOWN,
    READY_INTERVAL,
    READY_SECONDS,
    ChatMessage,
    Credentials,
    StreamingClient,
    deadline_after,
    mapped_errors,
    prepare,
    seconds_until,
    tokenize_request,
)
from rpc.client.recovery import ReceivedStream
from rpc.convert import completion_from_proto, event_from_proto, message_of
from rpc.v1 import jaxserve_pb2 as pb

type Call = "grpc.aio.UnaryStreamCall[pb.GenerateRequest | pb.AttachRequest, pb.GenerateResponse]"


def _cancellations() -> int:
    """How often the task that runs was cancelled; one that goes on all the same keeps the count, as while it cleans up,
    or in Python 3.12 behind a TaskGroup that failed."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


class AsyncGeneration(ReceivedStream["Call", Awaitable[object]]):
    """The deltas of one request. Iterate once, or `await text()`; leaving the loop cancels the request."""

    async def events(self) -> AsyncGenerator[Event]:
        """Everything the server sends: Started, Deltas, Finished."""
        before = _cancellations()
        try:
            async with aclosing(self._received()) as received:
                async for event in received:
                    self.note(event)
                    yield event
        except (asyncio.CancelledError, GeneratorExit) as left:
            if self._abort is not None:
                # Where it cannot be reached, or the client is closed: nobody reads it, and the server ends it in time.
                with suppress(EngineUnavailable, TimeoutError, grpc.aio.UsageError):
                    await self._abort()
            # grpc.aio raises the same for a call that is cancelled as asyncio does for the task that reads it.
            is_left = isinstance(left, GeneratorExit) or _cancellations() > before
            if is_left or not self._cancelled.is_set():
                raise
        finally:
            self._call.cancel()  # no-op once the call has ended

    async def _received(self) -> AsyncGenerator[Event]:
        """Each event once, over as many connections as it takes."""
        while True:
            try:
                with mapped_errors():
                    async for response in self._call:
                        event = event_from_proto(response)
                        if event is not None and (self._recovery is None or self.is_new(event)):
                            yield event
                return
            except RequestError as error:
                if self._recovery is None:
                    raise
                delay, call = self._recovery.after(error, self)
                await asyncio.sleep(delay)
                self._call = call()
                if self._cancelled.is_set():
                    self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        # aclosing: a generator inside another is else closed late when the loop over the outer one is left.
        async with aclosing(self.events()) as events:
            async for event in events:
                if isinstance(event, Delta):
                    yield event

    async def text(self) -> str:
        """Waits for the end and returns all text."""
        return "".join([delta.text async for delta in self])


class AsyncClient(StreamingClient["Call", AsyncGeneration]):
    """A client for asyncio. Use it as an async context manager, within one event loop."""

    def __init__(self, address: str = DEFAULT_ADDRESS, credentials: Credentials = NOTHING_SHOWN):
        """`credentials`: API key and TLS; plain text without a key by default."""
        super().__init__(address, credentials, grpc.aio, AsyncGeneration)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels open calls and disconnects."""
        await self._channel.close()

    async def wait_until_ready(self, timeout: float = 120.0) -> None:
        """Waits until the server has loaded its model. Raises TimeoutError after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not await self.is_ready():
                    await asyncio.sleep(READY_INTERVAL)
        except TimeoutError:
            raise TimeoutError(f"the server at {self.address} was not ready after {timeout:g} s") from None

    async def is_ready(self) -> bool:
        """Whether there is a server and it takes requests now."""
        try:
            with mapped_errors():
                answer = await self._check(health_pb2.HealthCheckRequest(), timeout=READY_SECONDS)
        except (EngineUnavailable, TimeoutError):
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def generate_once(self, prompt: Prompt, *, timeout: float | None = None, **fields: object) -> Completion:
        """As `generate`, with all of its sequences whole in one answer."""
        message, deadline = prepare(prompt, fields, timeout)
        with mapped_errors():
            limit = seconds_until(deadline)
            response = await self._inference.GenerateOnce(message, timeout=limit, metadata=self._metadata)
        return completion_from_proto(response, message.output)

    async def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """Ends a request with finish reason abort; False where none with this id is active."""
        with mapped_errors():
            message, limit = message_of(pb.AbortRequest, request_id=request_id), seconds_until(deadline_after(timeout))
            return (await self._control.Abort(message, timeout=limit, metadata=self._metadata)).aborted

    async def tokenize(self, prompt: str | Sequence[ChatMessage]) -> list[int]:
        """Token ids of text, or of a conversation in the model's template."""
        with mapped_errors():
            return list((await self._control.Tokenize(tokenize_request(prompt), metadata=self._metadata)).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        with mapped_errors():
            message = message_of(pb.DetokenizeRequest, token_ids=token_ids)
            return (await self._control.Detokenize(message, metadata=self._metadata)).text

    async def profile(self, seconds: float) -> str:
        """Takes a trace of the server's device; the folder there. Needs an admin's key where there are keys."""
        with mapped_errors():
            message = message_of(pb.ProfileRequest, seconds=seconds)
            return (await self._control.Profile(message, metadata=self._metadata)).folder

    async def model_info(self) -> pb.GetModelInfoResponse:
        """The model and its limits."""
        with mapped_errors():
            return await self._control.GetModelInfo(pb.GetModelInfoRequest(), metadata=self._metadata)

    async def server_info(self) -> pb.GetServerInfoResponse:
        """Version, device, limits and state of the server."""
        with mapped_errors():
            return await self._control.GetServerInfo(pb.GetServerInfoRequest(), metadata=self._metadata)

    async def loads(self) -> pb.GetLoadsResponse:
        """What the server is doing now."""
        with mapped_errors():
            return await self._control.GetLoads(pb.GetLoadsRequest(), metadata=self._metadata)
