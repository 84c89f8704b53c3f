"""Errors on the wire: exceptions to gRPC statuses with google.rpc details on the server, and back in the client."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from jaxserve.log import current_request_id
from jaxserve.request_errors import (
    DuplicateRequestId,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    RequestError,
    StreamNotFound,
    StreamTaken,
    TenantBusy,
    clipped,
)
from rpc.security.principal import Forbidden, Unauthenticated

logger = logging.getLogger(__name__)

DOMAIN = "jaxserve"
"""`ErrorInfo.domain` of every error."""

TENANT_BUSY = "TENANT_BUSY"
"""`ErrorInfo.reason` where a tenant, not the server, is at its bound."""

STREAM_NOT_FOUND = "STREAM_NOT_FOUND"
"""`ErrorInfo.reason` where it is not the model that is not found."""

DETAILS_KEY = "grpc-status-details-bin"

PROMPT_ONEOFS = ("prompt", "input", "content")
"""The oneof that holds the prompt, in the requests of any protocol."""

_OTHER_PATHS = {
    ("vllm.grpc.engine.GenerateRequest", "token_ids"): "tokenized.input_ids",
    ("vllm.grpc.engine.GenerateRequest", "include_stop"): "sampling_params.include_stop_str_in_output",
    ("jetstream_proto.DecodeRequest", "n"): "num_samples",
}
"""Where a field lies that a protocol calls something else, by its request message and API name."""


class DeadlineExceeded(Exception):
    """The call's deadline passed before the request ended."""


class RequestFailed(Exception):
    """The engine failed this request while it ran."""


class ConnectionLost(EngineUnavailable):
    """The connection failed before the server gave a call its status; whether the request arrived is not known."""


class Unsupported(Exception):
    """A call that this server does not have."""


class RpcFailed(Exception):
    """A call failed in a way that has no class of its own.

    Attributes:
        code: the gRPC status.
        details: the server's message.
    """

    def __init__(self, code: grpc.StatusCode, details: str):
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


@dataclass(frozen=True)
class Failure:
    """A status with its details, ready to be sent."""

    code: grpc.StatusCode
    message: str
    reason: str
    """`ErrorInfo.reason`: stable, in upper case."""
    metadata: tuple[tuple[str, str], ...] = ()
    details: tuple[Message, ...] = ()

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The details, as grpcio-status sends them beside the status."""
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=dict(self.metadata))
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in (info, *self.details):
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        return tuple(rpc_status.to_status(status).trailing_metadata)

    async def end(self, context: grpc.aio.ServicerContext) -> NoReturn:
        """Ends a call with it."""
        await context.abort(self.code, self.message, self.trailing_metadata())


def field_path(field: str, request: Message) -> str:
    """Where a field with this API name lies in the request message, as BadRequest wants it."""
    descriptor = request.DESCRIPTOR
    if field == "prompt":
        oneofs = [name for name in PROMPT_ONEOFS if name in descriptor.oneofs_by_name]
        return (request.WhichOneof(oneofs[0]) if oneofs else None) or "prompt"
    if field in descriptor.fields_by_name:
        return field
    if (descriptor.full_name, field) in _OTHER_PATHS:
        return _OTHER_PATHS[descriptor.full_name, field]
    for part in descriptor.fields:
        if part.message_type is not None and field in part.message_type.fields_by_name:
            return f"{part.name}.{field}"
    return field


def api_name(path: str) -> str:
    """The API name of a field path: the inverse of `field_path`."""
    name = path.rpartition(".")[2]
    return "prompt" if name == "text" else name


def failure_of(error: Exception, request: Message) -> Failure | None:
    """The status of an exception; None for one that nobody expected."""
    code = grpc.StatusCode
    message = clipped(str(error))
    match error:
        case InvalidRequest():
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=field_path(error.field, request), description=clipped(error.reason)
            )
            message = f"{violation.field}: {violation.description}"
            details = (error_details_pb2.BadRequest(field_violations=[violation]),)
            return Failure(code.INVALID_ARGUMENT, message, "INVALID_REQUEST", details=details)
        case QueueFull():
            delay = Duration()
            delay.FromNanoseconds(int(error.retry_after * 1e9))
            return Failure(
                code.RESOURCE_EXHAUSTED,
                message,
                TENANT_BUSY if isinstance(error, TenantBusy) else "QUEUE_FULL",
                metadata=(("limit", str(error.limit)),),
                details=(error_details_pb2.RetryInfo(retry_delay=delay),),
            )
        case ModelNotFound():
            return Failure(code.NOT_FOUND, message, "MODEL_NOT_FOUND")
        case StreamNotFound():
            return Failure(code.NOT_FOUND, message, STREAM_NOT_FOUND)
        case StreamTaken():
            return Failure(code.ABORTED, message, "STREAM_TAKEN")
        case DuplicateRequestId():
            return Failure(code.ALREADY_EXISTS, message, "DUPLICATE_REQUEST_ID")
        case Unauthenticated():
            return Failure(code.UNAUTHENTICATED, message, "UNAUTHENTICATED")
        case Forbidden():
            return Failure(code.PERMISSION_DENIED, message, "FORBIDDEN")
        case EngineUnavailable():
            return Failure(code.UNAVAILABLE, message, "ENGINE_UNAVAILABLE")
        case DeadlineExceeded():
            return Failure(code.DEADLINE_EXCEEDED, message, "DEADLINE_EXCEEDED")
        case Unsupported():
            return Failure(code.UNIMPLEMENTED, message, "UNSUPPORTED")
        case RequestFailed():
            return Failure(code.INTERNAL, message, "REQUEST_FAILED")
    return None


async def abort(context: grpc.aio.ServicerContext, error: Exception, request: Message) -> NoReturn:
    """Ends a call with the status of an exception. One that nobody expected is logged, and INTERNAL."""
    failure = failure_of(error, request)
    if failure is None:
        name = current_request_id() or f"({type(request).__name__})"  # calls that do not generate have no id
        logger.error("request %s failed: %r", name, error, exc_info=error)
        failure = Failure(grpc.StatusCode.INTERNAL, clipped(f"internal error in request {name}"), "INTERNAL")
    await failure.end(context)


def _details[M: Message](trailing_metadata: Iterable[tuple[str, str | bytes]], kind: type[M]) -> list[M]:
    """The details of one kind in a call's trailing metadata; none where a server sends none, or garbage."""
    found: list[M] = []
    for key, value in trailing_metadata:
        if key != DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
            for packed in status.details:
                detail = kind()
                if packed.Unpack(detail):
                    found.append(detail)
        except DecodeError:
            logger.warning("unreadable error details from the server")
    return found


_BY_CODE: dict[grpc.StatusCode, type[RequestError] | type[TimeoutError]] = {
    grpc.StatusCode.ALREADY_EXISTS: DuplicateRequestId,
    grpc.StatusCode.ABORTED: StreamTaken,
    grpc.StatusCode.UNAVAILABLE: EngineUnavailable,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimeoutError,
}


def error_of(
    code: grpc.StatusCode, message: str, trailing_metadata: Iterable[tuple[str, str | bytes]] = ()
) -> Exception:
    """The exception for a failed call: the same classes that an engine raises in its own process, TimeoutError for
    a deadline, RpcFailed for what has no class of its own."""
    metadata = tuple(trailing_metadata)
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        for bad_request in _details(metadata, error_details_pb2.BadRequest):
            for violation in bad_request.field_violations:
                return InvalidRequest(api_name(violation.field), violation.description)
        return InvalidRequest("request", message)
    if code == grpc.StatusCode.NOT_FOUND:
        infos = _details(metadata, error_details_pb2.ErrorInfo)
        return (StreamNotFound if any(info.reason == STREAM_NOT_FOUND for info in infos) else ModelNotFound)(message)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        for retry in _details(metadata, error_details_pb2.RetryInfo):
            info = next(iter(_details(metadata, error_details_pb2.ErrorInfo)), error_details_pb2.ErrorInfo())
            full = TenantBusy if info.reason == TENANT_BUSY else QueueFull
            return full(int(info.metadata.get("limit", 0)), retry.retry_delay.ToNanoseconds() / 1e9)
        if "message larger than max" in message:  # gRPC's own refusal, which carries no details
            return InvalidRequest("request", f"is larger than the server takes: {message}")
    if code == grpc.StatusCode.UNAVAILABLE and not _details(metadata, error_details_pb2.ErrorInfo):
        return ConnectionLost(message)  # gRPC's own word: what a server says carries details
    return _BY_CODE[code](message) if code in _BY_CODE else RpcFailed(code, message)
