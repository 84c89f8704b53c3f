"""The client for plain code."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, cast

import grpc
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
from rpc.errors import RpcFailed
from rpc.v1 import jaxserve_pb2 as pb


class Generation(ReceivedStream[grpc.Call, object]):
    """The deltas of one request. Iterate once, or call `text()`; leaving the loop cancels the request."""

    def events(self) -> Generator[Event]:
        """Everything the server sends: Started, Deltas, Finished."""
        try:
            for event in self._received():
                self.note(event)
                yield event
        except (GeneratorExit, KeyboardInterrupt):
            self._end()
            raise
        except RpcFailed as error:
            if not (self._cancelled.is_set() and error.code is grpc.StatusCode.CANCELLED):
                raise
            self._end()
        finally:
            self._call.cancel()  # no-op once the call has ended

    def _end(self) -> None:
        """Ends the request, where cancelling its call does not."""
        if self._abort is not None:
            # Where it cannot be reached, or the client is closed (gRPC's ValueError): nobody reads it, and the server
            # ends it in its time.
            with suppress(EngineUnavailable, TimeoutError, ValueError):
                self._abort()

    def _received(self) -> Generator[Event]:
        """Each event once, over as many connections as it takes."""
        while True:
            try:
                with mapped_errors():
                    for response in cast(Iterator[pb.GenerateResponse], self._call):
                        event = event_from_proto(response)
                        if event is not None and (self._recovery is None or self.is_new(event)):
                            yield event
                return
            except RequestError as error:
                if self._recovery is None:
                    raise
                delay, call = self._recovery.after(error, self)
                self._cancelled.wait(delay)
                self._call = call()
                if self._cancelled.is_set():
                    self._call.cancel()

    def __iter__(self) -> Iterator[Delta]:
        return (event for event in self.events() if isinstance(event, Delta))

    def text(self) -> str:
        """Waits for the end and returns all text."""
        return "".join(delta.text for delta in self)


class Client(StreamingClient[grpc.Call, Generation]):
    """A client for plain code. Use it as a context manager; its methods may be called from any thread."""

    def __init__(self, address: str = DEFAULT_ADDRESS, credentials: Credentials = NOTHING_SHOWN):
        """`credentials`: API key and TLS; plain text without a key by default."""
        super().__init__(address, credentials, grpc, Generation)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels open calls and disconnects."""
        self._channel.close()

    def wait_until_ready(self, timeout: float = 120.0) -> None:
        """Waits until the server has loaded its model. Raises TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self._is_ready(min(READY_SECONDS, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server at {self.address} was not ready after {timeout:g} s")
            time.sleep(READY_INTERVAL)

    def is_ready(self) -> bool:
        """Whether there is a server and it takes requests now."""
        return self._is_ready(READY_SECONDS)

    def _is_ready(self, timeout: float) -> bool:
        try:
            with mapped_errors():
                answer = self._check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except (EngineUnavailable, TimeoutError):
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def generate_once(self, prompt: Prompt, *, timeout: float | None = None, **fields: object) -> Completion:
        """As `generate`, with all of its sequences whole in one answer."""
        message, deadline = prepare(prompt, fields, timeout)
        with mapped_errors():
            response = self._inference.GenerateOnce(message, timeout=seconds_until(deadline), metadata=self._metadata)
        return completion_from_proto(response, message.output)

    def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """Ends a request with finish reason abort; False where none with this id is active."""
        with mapped_errors():
            message, limit = message_of(pb.AbortRequest, request_id=request_id), seconds_until(deadline_after(timeout))
            return self._control.Abort(message, timeout=limit, metadata=self._metadata).aborted

    def tokenize(self, prompt: str | Sequence[ChatMessage]) -> list[int]:
        """Token ids of text, or of a conversation in the model's template."""
        with mapped_errors():
            return list(self._control.Tokenize(tokenize_request(prompt), metadata=self._metadata).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        with mapped_errors():
            message = message_of(pb.DetokenizeRequest, token_ids=token_ids)
            return self._control.Detokenize(message, metadata=self._metadata).text

    def profile(self, seconds: float) -> str:
        """Takes a trace of the server's device; the folder there. Needs an admin's key where there are keys."""
        with mapped_errors():
            message = message_of(pb.ProfileRequest, seconds=seconds)
            return self._control.Profile(message, metadata=self._metadata).folder

    def model_info(self) -> pb.GetModelInfoResponse:
        """The model and its limits."""
        with mapped_errors():
            return self._control.GetModelInfo(pb.GetModelInfoRequest(), metadata=self._metadata)

    def server_info(self) -> pb.GetServerInfoResponse:
        """Version, device, limits and state of the server."""
        with mapped_errors():
            return self._control.GetServerInfo(pb.GetServerInfoRequest(), metadata=self._metadata)

    def loads(self) -> pb.GetLoadsResponse:
        """What the server is doing now."""
        with mapped_errors():
            return self._control.GetLoads(pb.GetLoadsRequest(), metadata=self._metadata)
