"""The client for plain code."""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.events import Completion, Delta, Event
from jaxserve.front.generating import Prompt
from jaxserve.request_errors import EngineUnavailable, RequestError
from rpc.client.calls import (
    DEFAULT_ADDRESS,
    NOTHING_SHOWN,
    READY_INTERVAL,
    ChatMessage,
    Credentials,
    mapped_errors,
    prepare,
    seconds_until,
    tokenize_request,
)
from rpc.client.recovery import ABORT_SECONDS, Position, Recovery
from rpc.convert import completion_from_proto, event_from_proto, message_of
from rpc.errors import RpcFailed
from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc


class Generation(Position):
    """The deltas of one request. Iterate once, or call `text()`; leaving the loop cancels the request.

    A request that asked to be `resumable` is taken up again after a broken connection, without a lost or repeated
    token; when it is left or cancelled it is aborted. One that `attach` took up is not: it goes on for other readers.
    """

    def __init__(
        self,
        call: grpc.Call,
        request_id: str,
        recovery: Recovery[grpc.Call] | None = None,
        abort: Callable[[], object] | None = None,
        from_token: int = 0,
    ):
        """`recovery`: of a stream that is kept. `abort`: ends its request when it is left."""
        super().__init__(request_id, from_token)
        self._call = call
        self._recovery = recovery
        self._abort = abort
        self._cancelled = threading.Event()

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

    def cancel(self) -> None:
        """Ends the request on the server, and the iteration without an error. May be called from another thread."""
        self._cancelled.set()
        self._call.cancel()


class Client:
    """A client for plain code. Use it as a context manager; its methods may be called from any thread."""

    def __init__(self, address: str = DEFAULT_ADDRESS, credentials: Credentials = NOTHING_SHOWN):
        """`credentials`: API key and TLS; plain text without a key by default."""
        self.address = address
        self._metadata = credentials.metadata
        options, channel = credentials.channel_options(), credentials.channel_credentials()
        if channel is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            self._channel = grpc.secure_channel(address, channel, options=options)
        self._inference = jaxserve_pb2_grpc.InferenceStub(self._channel)
        self._control = jaxserve_pb2_grpc.ControlStub(self._channel)
        self._check = health_pb2_grpc.HealthStub(self._channel).Check  # pyright: ignore[reportAttributeAccessIssue]

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
        while not self.is_ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server at {self.address} was not ready after {timeout:g} s")
            time.sleep(READY_INTERVAL)

    def is_ready(self) -> bool:
        """Whether there is a server and it takes requests now."""
        try:
            with mapped_errors():
                answer = self._check(health_pb2.HealthCheckRequest(), timeout=5.0)
        except (EngineUnavailable, TimeoutError):
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **fields: object) -> Generation:
        """Starts a request; iterate over what is returned.

        Args:
            prompt: text, a Request, or a mapping of API names (`token_ids`, `messages`, ...).
            timeout: seconds until the server stops the work and TimeoutError is raised.
            fields: sampling, stopping and output fields by their API names: `max_tokens`, `temperature`, `stop`, ...
        """
        message, deadline = prepare(prompt, fields, timeout)

        def send() -> grpc.Call:
            return self._inference.Generate(message, timeout=seconds_until(deadline), metadata=self._metadata)

        name = message.request_id
        if not message.output.resumable:
            return Generation(send(), name)
        attach = partial(self._attach, name, deadline=deadline)
        return Generation(send(), name, Recovery(attach, send), partial(self.abort, name, timeout=ABORT_SECONDS))

    def _attach(self, request_id: str, from_token: int, deadline: float | None = None) -> grpc.Call:
        message = message_of(pb.AttachRequest, request_id=request_id, from_token=from_token)
        return self._inference.Attach(message, timeout=seconds_until(deadline), metadata=self._metadata)

    def attach(self, request_id: str, from_token: int = 0) -> Generation:
        """Takes up the stream of a resumable request after so many tokens, over all of its sequences in the order in
        which they came; the reader that it had ends with StreamTaken. Leaving the loop leaves the request to run.

        Iterating raises StreamNotFound where no stream is kept, InvalidRequest where it has not come so far.
        """
        recovery = Recovery(partial(self._attach, request_id), None)
        return Generation(self._attach(request_id, from_token), request_id, recovery, from_token=from_token)

    def chat(self, messages: Sequence[ChatMessage], *, timeout: float | None = None, **fields: object) -> Generation:
        """As `generate`, for a conversation in the model's chat template."""
        return self.generate({"messages": messages}, timeout=timeout, **fields)

    def generate_once(self, prompt: Prompt, *, timeout: float | None = None, **fields: object) -> Completion:
        """As `generate`, with all of its sequences whole in one answer."""
        message, deadline = prepare(prompt, fields, timeout)
        with mapped_errors():
            response = self._inference.GenerateOnce(message, timeout=seconds_until(deadline), metadata=self._metadata)
        return completion_from_proto(response, message.output)

    def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """Ends a request with finish reason abort; False where none with this id is active."""
        with mapped_errors():
            message = message_of(pb.AbortRequest, request_id=request_id)
            return self._control.Abort(message, timeout=timeout, metadata=self._metadata).aborted

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
