"""`vllm.grpc.engine.VllmEngine`, which the gateway smg speaks: OpenAI HTTP, routing and retries over many servers.

The messages are those of the package smg-grpc-proto. A client of smg that disconnects makes it send Abort and leave the
stream open, so an aborted stream ends like any other: with its last message and status OK.
"""

import asyncio
import hashlib
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import grpc.aio
from google.protobuf.message import Message
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.events import Event
from rpc.call_runner import CallRunner
from rpc.control import installed_version
from rpc.errors import Unsupported
from rpc.lifecycle import State
from rpc.vllm_convert import ResponseBuilder, request_from_vllm, zipped

SERVICE = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name
"""Full name of the service."""

CHUNK_BYTES = 1 << 20
"""Of the tokenizer's archive in one message; clients take 4 MiB unless told otherwise."""


def _unsupported(why: str) -> Callable[..., Awaitable[None]]:
    """A method that this server does not have."""

    async def refuse(servicer: object, request: Message, context: grpc.aio.ServicerContext) -> None:
        raise Unsupported(why)

    return refuse


class VllmEngineServicer(vllm_engine_pb2_grpc.VllmEngineServicer):
    """Generating, and what a gateway asks of a worker."""

    def __init__(self, runner: CallRunner):
        self._runner = runner
        self._lifecycle = runner.lifecycle
        self._tokenizer_archive: asyncio.Future[bytes] | None = None
        self._began = time.monotonic()

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        request_id = request.request_id or uuid.uuid4().hex
        responses = ResponseBuilder(request)

        def write(event: Event) -> Awaitable[None] | None:
            match responses.messages(event):
                case []:
                    return None
                case [message]:  # nearly all: a coroutine around its write would cost each token another
                    return context.write(message)
                case messages:
                    return _write(context, messages)

        await self._runner.run(
            request_id, lambda deadline: request_from_vllm(request, request_id, deadline), context, write
        )

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        for request_id in request.request_ids:
            self._runner.abort(request_id)
        return pb.AbortResponse()

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        state = self._lifecycle.state
        return pb.HealthCheckResponse(healthy=state is State.READY, message=state)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        engine = self._lifecycle.loaded_engine()
        model = engine.model_config
        # No path of this machine: a gateway takes the tokenizer from GetTokenizer.
        return pb.GetModelInfoResponse(
            model_path=engine.model_name,
            served_model_name=engine.model_name,
            is_generation=True,
            max_context_length=engine.max_context,
            max_req_input_len=engine.max_context - 1,
            vocab_size=model.vocab_size,
            model_type=model.family,
            eos_token_ids=model.eos_ids,
            bos_token_id=model.bos_id or 0,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        engine = self._lifecycle.loaded_engine()
        return pb.GetServerInfoResponse(
            active_requests=len(self._runner.calls),
            uptime_seconds=time.monotonic() - self._began,
            server_type="jaxserve",
            data_parallel_size=1,
            kv_cache_dtype=engine.config.kv_dtype or engine.config.dtype,
            model_dtype=engine.config.dtype,
            block_size=engine.config.page_size,
            attention_backend=engine.device.attention,
            max_num_seqs=engine.config.total_slots,
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext) -> pb.GetLoadsResponse:
        engine = self._lifecycle.loaded_engine()
        loads = engine.loads()
        used = loads.total_pages - loads.available_pages
        load = pb.SchedulerLoad(
            num_running_reqs=loads.running,
            num_waiting_reqs=loads.waiting,
            num_total_reqs=loads.running + loads.waiting,
            num_used_tokens=used * engine.config.page_size,
            max_total_num_tokens=loads.total_pages * engine.config.page_size,
            token_usage=used / loads.total_pages,
            cache_hit_rate=loads.prefix_hits / max(loads.prefix_queries, 1),
            utilization=loads.running / loads.slots,
            max_running_requests=loads.slots,
        )
        now = datetime.now(UTC).isoformat()
        return pb.GetLoadsResponse(timestamp=now, version=installed_version("jaxserve"), dp_rank_count=1, loads=[load])

    async def GetTokenizer(self, request: common_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext) -> None:
        tokenizer = self._lifecycle.loaded_engine().tokenizer
        if self._tokenizer_archive is None:
            self._tokenizer_archive = self._runner.in_thread(lambda: zipped(tokenizer.to_files()))
        archive = await asyncio.shield(self._tokenizer_archive)
        for start in range(0, len(archive), CHUNK_BYTES):
            chunk = common_pb2.GetTokenizerChunk(data=archive[start : start + CHUNK_BYTES])
            if start + CHUNK_BYTES >= len(archive):
                chunk.sha256 = hashlib.sha256(archive).hexdigest()
            await context.write(chunk)

    Embed = _unsupported("the model generates text and makes no embeddings")
    FlushCache = _unsupported("the prefix cache gives way by itself and is not flushed")
    StartProfile = StopProfile = _unsupported("profiles are not taken through this service")
    SubscribeKvEvents = _unsupported("events of the KV cache are not published; GetLoads tells the load")


async def _write(context: grpc.aio.ServicerContext, messages: list[pb.GenerateResponse]) -> None:
    for message in messages:
        await context.write(message)
