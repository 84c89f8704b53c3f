"""`jaxserve.v1.Control`: everything around generating."""

import asyncio
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import grpc.aio

from jaxserve import request as limits
from jaxserve.request_errors import InvalidRequest
from rpc.call_runner import CallRunner
from rpc.convert import messages_from_proto
from rpc.served_engine import ServedEngine
from rpc.thread_pool import started_pool
from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc


class ControlServicer(jaxserve_pb2_grpc.ControlServicer):
    """Questions that start no work on the device, and Abort. They are answered while draining, too."""

    def __init__(self, runner: CallRunner, max_request_bytes: int):
        self._runner = runner
        self._lifecycle = runner.lifecycle
        self._max_request_bytes = max_request_bytes
        self._profiling = started_pool(2, "jaxserve-profile")
        self._began = time.monotonic()

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        return pb.AbortResponse(aborted=self._runner.abort(request.request_id))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        return _model_info(self._lifecycle.loaded_engine())

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        info = pb.GetServerInfoResponse(
            version=installed_version("jaxserve"),
            state=self._lifecycle.state,
            uptime=time.monotonic() - self._began,
        )
        engine = self._lifecycle.engine
        if engine is not None:
            info.device.platform = engine.device.platform
            info.device.kind = engine.device.device_kind
            info.device.attention = engine.device.attention
            info.device.jax_version = installed_version("jax")
            info.limits.CopyFrom(_limits(engine, self._max_request_bytes))
        return info

    async def GetLoads(self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext) -> pb.GetLoadsResponse:
        loads = self._lifecycle.loaded_engine().loads()
        counts = asdict(loads)
        del counts["restarting"]  # health tells
        free_pages = loads.available_pages - loads.cached_pages
        return pb.GetLoadsResponse(**counts, free_pages=free_pages, open_calls=len(self._runner.calls))

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        engine = self._lifecycle.loaded_engine()
        return pb.TokenizeResponse(token_ids=await self._runner.in_thread(partial(_tokenize, engine, request)))

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        engine = self._lifecycle.loaded_engine()
        return pb.DetokenizeResponse(text=await self._runner.in_thread(partial(_detokenize, engine, request)))

    async def Profile(self, request: pb.ProfileRequest, context: grpc.aio.ServicerContext) -> pb.ProfileResponse:
        engine = self._lifecycle.loaded_engine()
        # A thread of its own: it waits as long as the trace, and prompts must not wait for those of the pool.
        folder = await asyncio.get_running_loop().run_in_executor(self._profiling, engine.profile, request.seconds)
        return pb.ProfileResponse(folder=folder)


def installed_version(package: str) -> str:
    """The version of an installed package; "unknown" in a checkout that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _model_info(engine: ServedEngine) -> pb.GetModelInfoResponse:
    model = engine.model_config
    return pb.GetModelInfoResponse(
        model=engine.model_name,
        family=model.family,
        vocab_size=model.vocab_size,
        max_context=engine.max_context,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        eos_ids=model.eos_ids,
        bos_id=model.bos_id,
        dtype=engine.config.dtype,
        quantization=engine.config.quantization,
    )


def _limits(engine: ServedEngine, max_request_bytes: int) -> pb.Limits:
    return pb.Limits(
        max_context=engine.max_context,
        slots=engine.config.total_slots,
        max_waiting=engine.config.max_waiting,
        max_request_bytes=max_request_bytes,
        stream_buffer_tokens=engine.config.stream_buffer_tokens,
        max_logprobs=limits.MAX_LOGPROBS,
        max_logit_bias=limits.MAX_LOGIT_BIAS,
        max_stop_strings=limits.MAX_STOP_STRINGS,
        max_stop_string_length=limits.MAX_STOP_STRING_LENGTH,
        max_stop_token_ids=limits.MAX_STOP_TOKEN_IDS,
        max_request_id_length=limits.MAX_REQUEST_ID_LENGTH,
        max_n=min(engine.config.max_n, engine.config.total_slots + engine.config.max_waiting),
        max_resumable_streams=engine.config.resumable_streams,
        max_resumable_bytes=engine.config.resumable_bytes,
        resumable_seconds=engine.config.resumable_seconds,
    )


def _tokenize(engine: ServedEngine, request: pb.TokenizeRequest) -> list[int]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt", "one of text and messages must be set")
    try:
        if kind == "text":
            return engine.tokenizer.encode(request.text)
        return engine.tokenizer.encode_chat(messages_from_proto(request.messages))
    except ValueError as error:
        raise InvalidRequest(kind, str(error)) from error


def _detokenize(engine: ServedEngine, request: pb.DetokenizeRequest) -> str:
    vocab_size = engine.model_config.vocab_size
    for token in request.token_ids:
        if not 0 <= token < vocab_size:
            raise InvalidRequest("token_ids", f"must be in [0, {vocab_size - 1}], got {token}")
    return engine.tokenizer.decode(list(request.token_ids))
