"""`Access` in front of every gRPC method, known or not."""

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from rpc.errors import Failure, failure_of
from rpc.security.access import Access
from rpc.security.principal import Forbidden, Unauthenticated, set_principal


class Guard(grpc.aio.ServerInterceptor):
    """Refuses calls without a key that is known, before their message is read, and says who makes the others."""

    def __init__(self, access: Access):
        self._access = access

    async def intercept_service(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Interceptors and handler of a call run in one task, so the handler finds the principal in its context."""
        try:
            principal = self._access.decide(handler_call_details.method, _authorization(handler_call_details))
        except (Unauthenticated, Forbidden) as error:
            failure = failure_of(error, Empty())
            assert failure is not None
            return _refusal(failure)
        set_principal(principal)
        return await continuation(handler_call_details)


def _authorization(details: grpc.HandlerCallDetails) -> str | None:
    values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
    # Two keys in one call: which of them counts must not be left to chance.
    return str(values[0]) if len(values) == 1 else None


def _refusal(failure: Failure) -> grpc.RpcMethodHandler:
    """A handler of streams: it answers before a message of the client has come, whatever kind of call it makes."""

    async def refuse(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        await failure.end(context)

    return grpc.stream_stream_rpc_method_handler(refuse)  # pyright: ignore[reportArgumentType]
