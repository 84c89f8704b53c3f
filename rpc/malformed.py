"""Requests whose bytes do not parse, answered as bad requests."""

from collections.abc import Awaitable, Callable
from typing import NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from rpc.errors import Failure


class _Malformed:
    """Stands for a request whose bytes are no message, until its handler can answer."""

    def __init__(self, error: DecodeError):
        self.error = error


class MalformedRequests(grpc.aio.ServerInterceptor):
    """Answers bytes that do not parse with INVALID_ARGUMENT; grpc.aio alone answers UNKNOWN and logs a traceback."""

    def __init__(self, prefix: str):
        """`prefix`: of the full names of the methods to guard, as "/jaxserve.v1."."""
        self._prefix = prefix
        self._guarded: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self._prefix):
            return handler
        if method not in self._guarded:
            self._guarded[method] = _guard(handler)
        return self._guarded[method]


def _guard(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    parse = handler.request_deserializer

    def deserialize(data: bytes) -> Message | _Malformed:
        try:
            return parse(data)
        except DecodeError as error:
            return _Malformed(error)

    async def answer(malformed: _Malformed, context: grpc.aio.ServicerContext) -> NoReturn:
        failure = Failure(
            grpc.StatusCode.INVALID_ARGUMENT, f"the request is malformed: {malformed.error}", "MALFORMED_REQUEST"
        )
        await context.abort(failure.code, failure.message, failure.trailing_metadata())

    inner = handler.unary_stream if handler.response_streaming else handler.unary_unary

    async def respond(request: Message | _Malformed, context: grpc.aio.ServicerContext) -> Message | None:
        if isinstance(request, _Malformed):
            await answer(request, context)
        return await inner(request, context)

    build = (
        grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    )
    return build(respond, request_deserializer=deserialize, response_serializer=handler.response_serializer)
