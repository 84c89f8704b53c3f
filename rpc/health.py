"""`grpc.health.v1.Health`: what is told of the server and of each of its services.

grpcio's own holds what a change of status waits for while it writes to a watcher: one that reads nothing would hold up
every change, and with it a drain. It has no List either.
"""

import asyncio
from collections.abc import Iterable

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

Status = pb.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Check, List and Watch. Lives on the event loop's thread."""

    def __init__(self, services: Iterable[str]):
        """`services`: full names; "" is the whole server. None of them serves yet."""
        self._statuses = dict.fromkeys(services, Status.NOT_SERVING)
        self._changed = asyncio.Event()
        """Of the status that is told now; the next one has another."""

    def set(self, is_serving: bool) -> None:
        """Says so of all services. Waits for nobody who watches."""
        self._statuses = dict.fromkeys(self._statuses, Status.SERVING if is_serving else Status.NOT_SERVING)
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext) -> pb.HealthCheckResponse:
        """One status. NOT_FOUND for a service that is not here."""
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return Status(status=self._statuses[request.service])

    async def List(self, request: Message, context: grpc.aio.ServicerContext) -> Message:
        """All of them."""
        statuses = {name: Status(status=status) for name, status in self._statuses.items()}
        return pb.HealthListResponse(statuses=statuses)  # pyright: ignore[reportAttributeAccessIssue]

    async def Watch(self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        """The status that is, and each that follows. Some are left out where the watcher is slow."""
        told = None
        while True:
            changed, status = self._changed, self._statuses.get(request.service, Status.SERVICE_UNKNOWN)
            if status != told:
                await context.write(Status(status=status))
                told = status
            await changed.wait()
