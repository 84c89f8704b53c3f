"""What both clients share: the channel, from arguments to a request message, from a failed call to an exception."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from types import ModuleType
from typing import cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from jaxserve.front.generating import Prompt, request_of
from jaxserve.request_errors import InvalidRequest
from rpc.client.recovery import ABORT_SECONDS, Recovery
from rpc.convert import message_of, messages_to_proto, request_to_proto
from rpc.errors import error_of
from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"

ChatMessage = Mapping[str, str]
"""`role` and `content`."""

READY_INTERVAL = 0.1
"""Seconds between looks whether a server is ready."""
READY_SECONDS = 5.0
"""That one look may take."""

LONGEST_CALL = 1e9
"""Seconds, thirty years: what is ten times as long gRPC takes for a time that has passed."""

CHANNEL_OPTIONS = [
    # An answer's size follows from the request; the server limits that.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that vanishes is noticed while a call is open.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # One that is still starting is found soon after it listens.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Despite its name what one attempt to connect may take; as long as the server waits for the handshake.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    # No environment variable sends a request elsewhere.
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True)
class Credentials:
    """What a client shows a server, and how it knows that one.

    Attributes:
        api_key: sent with each call; None sends none.
        tls: whether the connection is TLS, to a server whose certificate an authority of the system signed. Implied
            by the files below.
        root_certificates: PEM file of the authorities to trust instead of the system's.
        client_cert: PEM file of the client's own certificate chain, for mutual TLS.
        client_key: PEM file of its private key.
        server_name: name that the server's certificate must have, where it is not the address's.
    """

    api_key: str | None = field(default=None, repr=False)
    tls: bool = False
    root_certificates: str | Path | None = None
    client_cert: str | Path | None = None
    client_key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the field. For one half of a certificate alone gRPC would end the process."""
        key = self.api_key
        if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable()):
            # It is not quoted: who logs errors does not want keys among them.
            raise ValueError("api_key: must be printable ASCII, without the line end of the file that it is from")
        if (self.client_cert is None) != (self.client_key is None):
            raise ValueError("client_cert and client_key: both or neither must be given")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Sent with each call. In it, and not in gRPC's call credentials: those refuse plain text to loopback."""
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """Of the connection; None for plain text. Raises OSError where a file cannot be read."""
        files = (self.root_certificates, self.client_key, self.client_cert)
        if not self.tls and files == (None, None, None):
            return None
        return grpc.ssl_channel_credentials(*(None if file is None else Path(file).read_bytes() for file in files))

    def channel_options(self) -> list[tuple[str, str | int]]:
        """Those of every channel, and the server's name."""
        named = [] if self.server_name is None else [("grpc.ssl_target_name_override", self.server_name)]
        return [*CHANNEL_OPTIONS, *named]


NOTHING_SHOWN = Credentials()
"""Plain text and no key."""


def prepare(
    prompt: Prompt, fields: Mapping[str, object], timeout: float | None
) -> tuple[pb.GenerateRequest, float | None]:
    """The message, and when its calls must end, in `time.monotonic()` seconds: by the timeout and the request's
    deadline. Raises InvalidRequest."""
    request = request_of(prompt, fields)
    request.validate()
    deadlines = [end for end in (request.deadline, deadline_after(timeout)) if end is not None]
    return request_to_proto(replace(request, deadline=None)), min(deadlines, default=None)


def deadline_after(timeout: float | None) -> float | None:
    """When a call must end that has so many seconds, in `time.monotonic()` seconds. Raises InvalidRequest."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not -inf <= timeout <= inf:
        raise InvalidRequest("timeout", f"must be a number of seconds, got {timeout!r:.100}")
    return time.monotonic() + max(min(timeout, LONGEST_CALL), 0.0)


def seconds_until(deadline: float | None) -> float | None:
    """The time that a call has which must end by then, as gRPC takes it."""
    return None if deadline is None else min(deadline - time.monotonic(), LONGEST_CALL)


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Raises the exception that a failed call stands for."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        metadata = [(key, value) for key, value in error.trailing_metadata()]
        raise error_of(error.code(), error.details() or "", metadata) from error
    except grpc.RpcError as error:
        call = cast(grpc.Call, error)  # what a synchronous call raises is the call itself
        metadata = [(key, value) for key, value in call.trailing_metadata() or ()]
        raise error_of(call.code(), call.details() or "", metadata) from error


def tokenize_request(prompt: str | Sequence[ChatMessage]) -> pb.TokenizeRequest:
    """The message that tokenizes text or a conversation. Raises InvalidRequest."""
    if isinstance(prompt, str):
        return message_of(pb.TokenizeRequest, text=prompt)
    return pb.TokenizeRequest(messages=messages_to_proto(prompt))


class StreamingClient[Call, Stream]:
    """Connects to a server and starts the requests whose answer is a stream."""

    def __init__(self, address: str, credentials: Credentials, transport: ModuleType, stream: Callable[..., Stream]):
        """`transport`: grpc or grpc.aio. `stream`: makes what is returned of a call and what `ReceivedStream` takes."""
        self.address = address
        self._stream = stream
        self._metadata = credentials.metadata
        options, channel = credentials.channel_options(), credentials.channel_credentials()
        if channel is None:
            self._channel = transport.insecure_channel(address, options=options)
        else:
            self._channel = transport.secure_channel(address, channel, options=options)
        self._inference = jaxserve_pb2_grpc.InferenceStub(self._channel)
        self._control = jaxserve_pb2_grpc.ControlStub(self._channel)
        self._check = health_pb2_grpc.HealthStub(self._channel).Check  # pyright: ignore[reportAttributeAccessIssue]

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **fields: object) -> Stream:
        """Starts a request; iterate over what is returned. With asyncio nothing is sent before the event loop runs.

        Args:
            prompt: text, a Request, or a mapping of API names (`token_ids`, `messages`, ...).
            timeout: seconds until the server stops the work and TimeoutError is raised.
            fields: sampling, stopping and output fields by their API names: `max_tokens`, `temperature`, `stop`, ...
        """
        message, deadline = prepare(prompt, fields, timeout)

        def send() -> Call:
            return self._inference.Generate(message, timeout=seconds_until(deadline), metadata=self._metadata)

        name = message.request_id
        if not message.output.resumable:
            return self._stream(send(), name)
        attach = partial(self._attach, name, deadline=deadline)
        return self._stream(send(), name, Recovery(attach, send), partial(self.abort, name, timeout=ABORT_SECONDS))

    def chat(self, messages: Sequence[ChatMessage], *, timeout: float | None = None, **fields: object) -> Stream:
        """As `generate`, for a conversation in the model's chat template."""
        return self.generate({"messages": messages}, timeout=timeout, **fields)

    def attach(self, request_id: str, from_token: int = 0) -> Stream:
        """Takes up the stream of a resumable request after so many tokens, over all of its sequences in the order in
        which they came; the reader that it had ends with StreamTaken. Leaving the loop leaves the request to run.

        Iterating raises StreamNotFound where no stream is kept, InvalidRequest where it has not come so far.
        """
        recovery = Recovery(partial(self._attach, request_id), None)
        return self._stream(self._attach(request_id, from_token), request_id, recovery, from_token=from_token)

    def _attach(self, request_id: str, from_token: int, deadline: float | None = None) -> Call:
        message = message_of(pb.AttachRequest, request_id=request_id, from_token=from_token)
        return self._inference.Attach(message, timeout=seconds_until(deadline), metadata=self._metadata)

    def abort(self, request_id: str, *, timeout: float | None = None) -> object:
        """Ends a request with finish reason abort; False where none with this id is active."""
        raise NotImplementedError
