"""`jaxserve.v1.Inference`: from a request message to the engine, and from its events to the stream."""

import uuid
from functools import partial

import grpc.aio

from jaxserve.front.completion import CompletionBuilder
from rpc.call_runner import CallRunner
from rpc.convert import completion_to_proto, event_to_proto, request_from_proto
from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc


class InferenceServicer(jaxserve_pb2_grpc.InferenceServicer):
    """Generate, Attach and GenerateOnce."""

    def __init__(self, runner: CallRunner):
        self._runner = runner

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        _name(request)
        build = partial(request_from_proto, request)
        await self._runner.run(request.request_id, build, context, lambda event: context.write(event_to_proto(event)))

    async def Attach(self, request: pb.AttachRequest, context: grpc.aio.ServicerContext) -> None:
        await self._runner.attach(
            request.request_id, request.from_token, lambda event: context.write(event_to_proto(event))
        )

    async def GenerateOnce(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateOnceResponse:
        _name(request)
        builder = CompletionBuilder(request.request_id)
        await self._runner.run(request.request_id, partial(request_from_proto, request), context, builder.add)
        return completion_to_proto(builder.build())


def _name(request: pb.GenerateRequest) -> None:
    """Gives a request an id where the client gave none."""
    if not request.request_id:
        request.request_id = uuid.uuid4().hex
