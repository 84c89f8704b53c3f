"""Requests whose bytes do not parse, answered as bad requests."""

from collections.abc import Awaitable, Callable
from typing import cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from rpc.errors import Failure

_Method = Callable[[Message, grpc.aio.ServicerContext], Awaitable[Message | None]]


class _Malformed:
    """Stands for a request whose bytes are no message, until its handler can answer."""

    def __init__(self, error: DecodeError):
        self.error = error


class MalformedRequests(grpc.aio.ServerInterceptor):
    """Answers bytes that do not parse with INVALID_ARGUMENT; grpc.aio alone answers UNKNOWN and logs a traceback."""

    def __init__(self, *prefixes: str):
        """`prefixes`: of the full names of the methods to guard, as "/jaxserve.v1.Inference/"."""
        self._prefixes = prefixes
        self._guarded: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Gives methods under the prefixes a handler that sees what does not parse."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self._prefixes):
            return handler
        if method not in self._guarded:
            self._guarded[method] = _guard(handler)
        return self._guarded[method]


def _guard(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """The same method, for a handler without a stream of requests, that is also told of bytes that do not parse."""
    parse = cast(Callable[[bytes], Message], handler.request_deserializer)
    inner = cast(_Method, handler.unary_stream if handler.response_streaming else handler.unary_unary)

    def deserialize(data: bytes) -> Message | _Malformed:
        try:
            return parse(data)
        except DecodeError as error:
            return _Malformed(error)

    async def respond(request: Message | _Malformed, context: grpc.aio.ServicerContext) -> Message | None:
        if isinstance(request, _Malformed):
            message = f"the request is malformed: {request.error}"
            failure = Failure(grpc.StatusCode.INVALID_ARGUMENT, message, "MALFORMED_REQUEST")
            await context.abort(failure.code, failure.message, failure.trailing_metadata())
        return await inner(request, context)

    build = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    return build(respond, request_deserializer=deserialize, response_serializer=handler.response_serializer)  # pyright: ignore[reportArgumentType]
