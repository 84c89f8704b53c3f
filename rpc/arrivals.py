"""Every call of gRPC from its message, whole and in time, to its status, and none taken back over and over."""

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from rpc.errors import Failure, abort
from rpc.security.connections import close_connection

logger = logging.getLogger(__name__)

_Coroutine = Callable[[object, grpc.aio.ServicerContext], Awaitable[object]]
_Generator = Callable[[object, grpc.aio.ServicerContext], AsyncIterator[object]]

PREMATURE_SECONDS = 1.0
"""A call that its client takes back sooner than this is taken back prematurely."""
PREMATURE_CALLS = 1000
"""So many premature calls on a connection within a window, and half of its calls or more, and it is closed."""
WINDOW_SECONDS = 30.0
"""Seconds after which the counting begins anew."""


class PrematureResets:
    """Closes connections that open calls only to take them back, at once and in masses: HTTP/2's "rapid reset".

    The measure is Envoy's for the same attack. gRPC has none: it bounds what waits, and serves such a client for ever.
    """

    def __init__(self, close: Callable[[str], bool] = close_connection):
        """`close`: ends the connection of a peer as gRPC names it, and says whether there was one."""
        self._close = close
        self._calls: dict[str, list[int]] = {}
        """By peer: calls that ended, and those of them that were premature."""
        self._window_began = time.monotonic()

    def count(self, peer: str, premature: bool) -> None:
        """Takes note of a call that has ended."""
        now = time.monotonic()
        if now - self._window_began > WINDOW_SECONDS:
            self._window_began = now
            self._calls.clear()
        counts = self._calls.setdefault(peer, [0, 0])
        counts[0] += 1
        counts[1] += premature
        calls, taken_back = counts
        if premature and taken_back >= PREMATURE_CALLS and 2 * taken_back >= calls:
            counts[:] = 0, 0
            if self._close(peer):
                logger.warning("the connection of %s is closed: it took back %d of %d calls", peer, taken_back, calls)


class Arrivals(grpc.aio.ServerInterceptor):
    """Waits for the message of a call so long and no longer, refuses one that does not parse, ends the call with the
    status of what its handler raises, and has each call's end counted.

    Goes first of all interceptors, so that it sees calls that are refused, or that are of no method, too.
    """

    def __init__(self, message_timeout: float, resets: PrematureResets):
        """`message_timeout`: seconds from the headers of a call to the end of its message."""
        self._message_timeout = message_timeout
        self._resets = resets

    async def intercept_service(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Every method becomes one of streams: only such a handler runs before its message is there."""
        handler = await continuation(handler_call_details) or _UNKNOWN

        async def respond(requests: object, context: grpc.aio.ServicerContext) -> None:
            began, premature = time.monotonic(), False
            try:
                request = requests if handler.request_streaming else await self._message(context)
                await _answer(handler, request, context)
            except grpc.aio.AbortError as error:
                # gRPC keeps it with the call and raises it again itself; its frames would keep all that the call had.
                error.__traceback__ = error.__context__ = None
            except asyncio.CancelledError:
                premature = _is_premature(time.monotonic() - began, context.time_remaining())
                raise
            finally:
                self._resets.count(context.peer(), premature)

        return grpc.stream_stream_rpc_method_handler(
            respond,  # pyright: ignore[reportArgumentType]
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    async def _message(self, context: grpc.aio.ServicerContext) -> object:
        try:
            async with asyncio.timeout(self._message_timeout):
                message = await context.read()
        except TimeoutError:
            text = f"the message of the call did not arrive within {self._message_timeout:g} s"
            await Failure(grpc.StatusCode.DEADLINE_EXCEEDED, text, "MESSAGE_TIMEOUT").end(context)
        except DecodeError as error:
            await _malformed(error).end(context)
        if message is grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
            # It was taken back, or ended without a message: gRPC tells both alike. Who still waits is told.
            with contextlib.suppress(grpc.aio.AbortError, grpc.aio.InternalError):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a message")
            raise asyncio.CancelledError
        return message


def _malformed(error: DecodeError) -> Failure:
    """Of a message that does not parse, for which grpc.aio alone answers UNKNOWN and logs a traceback."""
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, f"the request is malformed: {error}", "MALFORMED_REQUEST")


def _is_premature(elapsed: float, remaining: float | None) -> bool:
    """Whether a call is taken back prematurely after so many seconds, with so many left to its deadline if it has one.

    Past the half of its time it is not: a client whose deadline has passed takes its call back as well, and often this
    is heard shortly before the server's own clock has come so far.
    """
    return elapsed < PREMATURE_SECONDS and (remaining is None or remaining > elapsed)


async def _answer(handler: grpc.RpcMethodHandler, request: object, context: grpc.aio.ServicerContext) -> None:
    """Runs a handler of any kind; the call ends with the status of what it raises."""
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    behaviour = next(kind for kind in kinds if kind is not None)
    try:
        if inspect.isasyncgenfunction(behaviour):
            async for response in cast(_Generator, behaviour)(request, context):
                await context.write(response)
        else:
            response = await cast(_Coroutine, behaviour)(request, context)
            if not handler.response_streaming:
                await context.write(response)
    except grpc.aio.BaseError:
        raise  # the transport's own: the call is gone or has its status
    except DecodeError as error:  # one of a stream of messages
        await _malformed(error).end(context)
    except Exception as error:
        await abort(context, error, cast(Message, request))


async def _unknown(_: object, context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no such method")


_UNKNOWN = grpc.stream_stream_rpc_method_handler(_unknown)  # pyright: ignore[reportArgumentType]
