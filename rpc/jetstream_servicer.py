"""`jetstream_proto.Orchestrator`, which load testers for TPU servers speak."""

import uuid
from collections.abc import Awaitable

import grpc.aio

from jaxserve.events import Delta, Event, Finished
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams
from jaxserve.request_errors import InvalidRequest
from rpc.call_runner import CallRunner
from rpc.jetstream import orchestrator_pb2 as pb
from rpc.jetstream import orchestrator_pb2_grpc
from rpc.lifecycle import State
from rpc.unknown_fields import refuse_unknown

SERVICE = pb.DESCRIPTOR.services_by_name["Orchestrator"].full_name
"""Full name of the service."""


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServicer):
    """Decode and HealthCheck."""

    def __init__(self, runner: CallRunner):
        self._runner = runner

    async def Decode(self, request: pb.DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        request_id = uuid.uuid4().hex

        def write(event: Event) -> Awaitable[None] | None:
            match event:
                case Delta():
                    return context.write(_response(event.index, event.text, event.token_ids))
                case Finished(matched_stop=int(token)):
                    # As JetStream does: a client counts on one response at least, and takes it for the first token.
                    return context.write(_response(event.index, "", (token,)))
            return None

        await self._runner.run(
            request_id, lambda deadline: request_from_jetstream(request, request_id, deadline), context, write
        )

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        return pb.HealthCheckResponse(is_live=self._runner.lifecycle.state is State.READY)


def request_from_jetstream(message: pb.DecodeRequest, request_id: str, deadline: float | None) -> Request:
    """Builds the engine's request. Raises InvalidRequest for a field that is not supported."""
    refuse_unknown(message)
    kind = message.WhichOneof("content")
    if message.lora_adapter_id:
        raise InvalidRequest("lora_adapter_id", "is not supported")
    if message.has_bos and kind == "text_content":
        raise InvalidRequest("has_bos", "is not supported with text_content: the server adds what the model wants")
    return Request(
        prompt=message.text_content.text if kind == "text_content" else None,
        token_ids=tuple(message.token_content.token_ids) if kind == "token_content" else None,
        sampling=SamplingParams(temperature=0.0, n=message.num_samples or 1),
        stopping=StoppingParams(max_tokens=message.max_tokens),
        output=OutputParams(return_text=kind == "text_content"),
        request_id=request_id,
        deadline=deadline,
    )


def _response(index: int, text: str, token_ids: tuple[int, ...]) -> pb.DecodeResponse:
    response = pb.DecodeResponse()
    for _ in range(index):
        response.stream_content.samples.add()
    response.stream_content.samples.add(text=text, token_ids=token_ids)
    return response
