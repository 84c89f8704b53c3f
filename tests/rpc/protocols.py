"""One request, asked for over each protocol, and what came of it in the same words: the harness of `test_reliability_*`.

The engine is the real one on a simulated device, whose tokens depend on their position alone, so every stream is checked
to its last token wherever it is.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from http_serving import http_serving
from serving import back_to_the_start
from simulated import simulated_ids
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from rpc.served_engine import ServedEngine
from rpc.server import Server
from rpc.server_config import ServerConfig
from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc

STATUSES = {
    "OK": 200,
    "INVALID_ARGUMENT": 400,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""What HTTP says for a status of gRPC; outcomes carry the latter's name."""
_NAMES = {status: name for name, status in STATUSES.items()}
_CODES = {
    "invalid_value": "INVALID_ARGUMENT",
    "invalid_json": "INVALID_ARGUMENT",
    "engine_unavailable": "UNAVAILABLE",
    "request_failed": "INTERNAL",
}
"""The same for the code of an error inside a stream."""


@dataclass
class Ask:
    """A request that all protocols can carry."""

    prompt_tokens: int = 3
    max_tokens: int = 5
    request_id: str = ""
    text: str | bytes | None = None
    """The prompt, in place of `prompt_tokens` ids."""
    token_ids: list[int] | None = None
    fields: dict[str, object] = field(default_factory=dict)
    """Sampling and stopping fields by their API names."""
    timeout: float | None = None
    """Seconds of the call's deadline; of HTTP, of the client's patience."""
    on_token: Callable[[int], None] = lambda count: None
    """Told how many tokens there are so far."""

    @property
    def ids(self) -> list[int]:
        return self.token_ids if self.token_ids is not None else list(range(300, 300 + self.prompt_tokens))


@dataclass
class Outcome:
    """What came of it."""

    code: str = "OK"
    message: str = ""
    named: str = ""
    """The field that the refusal names."""
    retry_after: float | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    reasons: list[str] = field(default_factory=list)
    """Of each terminal event; a request of one sequence has one, or an error alone."""
    started: bool = False
    usage: int | None = None
    """Completion tokens that were counted."""

    def is_exact(self, ask: Ask) -> bool:
        """Whether it ended once, at its length, with the tokens of a solo run."""
        expected = simulated_ids(len(ask.ids), ask.max_tokens)
        return (self.code, self.reasons, self.token_ids) == ("OK", ["length"], expected)


class Speaker(Protocol):
    """A client of one protocol."""

    async def run(self, ask: Ask) -> Outcome: ...
    async def is_serving(self) -> bool:
        """What its health check says."""
        ...


def _take_error(outcome: Outcome, error: grpc.aio.AioRpcError) -> None:
    outcome.code, outcome.message = error.code().name, error.details() or ""
    status = rpc_status.from_call(error)
    for packed in status.details if status is not None else ():
        retry, bad = error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
        if packed.Unpack(retry):
            outcome.retry_after = retry.retry_delay.ToNanoseconds() / 1e9
        if packed.Unpack(bad):
            (violation,) = bad.field_violations
            outcome.named = violation.field


class Native:
    """`jaxserve.v1`."""

    def __init__(self, channel: grpc.aio.Channel):
        self.inference = jaxserve_pb2_grpc.InferenceStub(channel)
        self.control = jaxserve_pb2_grpc.ControlStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    async def run(self, ask: Ask) -> Outcome:
        request = pb.GenerateRequest(request_id=ask.request_id)
        request.stopping.max_tokens, request.stopping.ignore_eos = ask.max_tokens, True
        if isinstance(ask.text, str):
            request.text = ask.text
        else:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(ask.ids)
        parts = (request.sampling, request.stopping)
        for name, value in ask.fields.items():
            part = next(part for part in parts if name in part.DESCRIPTOR.fields_by_name)
            setattr(part, name, value)
        outcome = Outcome()
        try:
            async for response in self.inference.Generate(request, timeout=ask.timeout):
                outcome.started |= response.HasField("started")
                outcome.token_ids += response.delta.token_ids
                outcome.text += response.delta.text
                if response.HasField("finished"):
                    finished = response.finished
                    outcome.reasons.append(finished.finish_reason)
                    outcome.usage = finished.usage.completion_tokens
                ask.on_token(len(outcome.token_ids))
        except grpc.aio.AioRpcError as error:
            _take_error(outcome, error)
        return outcome

    async def abort(self, request_id: str) -> None:
        await self.control.Abort(pb.AbortRequest(request_id=request_id))

    async def is_serving(self) -> bool:
        answer = await self.health.Check(health_pb2.HealthCheckRequest())
        return answer.status == health_pb2.HealthCheckResponse.SERVING


class Vllm:
    """`vllm.grpc.engine.VllmEngine`."""

    def __init__(self, channel: grpc.aio.Channel):
        self.stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)

    async def run(self, ask: Ask) -> Outcome:
        params = vllm_pb.SamplingParams(max_tokens=ask.max_tokens, ignore_eos=True)
        for name, value in ask.fields.items():
            setattr(params, name, value)
        request = vllm_pb.GenerateRequest(request_id=ask.request_id, stream=True, sampling_params=params)
        if isinstance(ask.text, str):
            request.text = ask.text
        else:
            request.tokenized.SetInParent()
            request.tokenized.input_ids.extend(ask.ids)
        outcome = Outcome()
        try:
            async for response in self.stub.Generate(request, timeout=ask.timeout):
                outcome.started = True
                outcome.token_ids += response.chunk.token_ids
                if response.HasField("complete"):
                    outcome.reasons.append(response.complete.finish_reason)
                    outcome.usage = response.complete.completion_tokens
                ask.on_token(len(outcome.token_ids))
        except grpc.aio.AioRpcError as error:
            _take_error(outcome, error)
        return outcome

    async def abort(self, request_id: str) -> None:
        await self.stub.Abort(vllm_pb.AbortRequest(request_ids=[request_id, request_id]))

    async def is_serving(self) -> bool:
        return (await self.stub.HealthCheck(vllm_pb.HealthCheckRequest())).healthy


class Http:
    """`/v1/completions`, streamed."""

    def __init__(self, client: aiohttp.ClientSession, model: str):
        self.client = client
        self.model = model

    async def run(self, ask: Ask) -> Outcome:
        prompt = ask.text if isinstance(ask.text, str) else ask.ids
        body = {
            **{"model": self.model, "prompt": prompt, "max_tokens": ask.max_tokens, "ignore_eos": True, "stream": True},
            **{"return_token_ids": True, "stream_options": {"include_usage": True}, **ask.fields},
        }
        outcome, data = Outcome(), json.dumps(body)
        headers = {"content-type": "application/json"}
        if ask.request_id:
            headers["x-request-id"] = ask.request_id
        try:
            async with (
                asyncio.timeout(ask.timeout),
                self.client.post("/v1/completions", data=data, headers=headers) as answer,
            ):
                outcome.code = _NAMES[answer.status]
                if answer.status != 200:
                    self._take_error(outcome, (await answer.json())["error"], answer.headers)
                else:
                    await self._read(ask, answer, outcome)
        except TimeoutError:
            outcome.code = "DEADLINE_EXCEEDED"  # the client's own
        return outcome

    async def _read(self, ask: Ask, answer: aiohttp.ClientResponse, outcome: Outcome) -> None:
        done = 0
        async for raw in answer.content:
            line = raw.decode().strip()
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done += 1
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                outcome.code = _CODES[event["error"]["code"]]
                self._take_error(outcome, event["error"], {})
                continue
            if event["usage"]:
                outcome.usage = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                outcome.started = True
                outcome.token_ids += choice.get("token_ids", ())
                outcome.text += choice["text"]
                if choice["finish_reason"]:
                    outcome.reasons.append(choice["finish_reason"])
            ask.on_token(len(outcome.token_ids))
        assert done == (outcome.code == "OK"), "the end of a stream is told once, and only of one that has not failed"

    @staticmethod
    def _take_error(outcome: Outcome, error: dict[str, str], headers: Mapping[str, str]) -> None:
        outcome.message, outcome.named = error["message"], error["param"] or ""
        if "retry-after" in headers:
            outcome.retry_after = float(headers["retry-after"])

    async def is_serving(self) -> bool:
        async with self.client.get("/health") as answer:
            return answer.status == 200


@dataclass
class Front:
    """A server that speaks all of them on this event loop."""

    server: Server
    engine: ServedEngine
    native: Native
    vllm: Vllm
    http: Http

    @property
    def speakers(self) -> dict[str, Speaker]:
        return {"native": self.native, "vllm": self.vllm, "http": self.http}

    async def as_before(self) -> None:
        """Free and evictable pages are at the initial count, no call is open, and a canary of each protocol is exact."""
        await back_to_the_start(self.engine, self.server)
        canary = Ask(prompt_tokens=7, max_tokens=20)
        for speaker in self.speakers.values():
            outcome = await speaker.run(canary)
            assert outcome.is_exact(canary), outcome
            assert outcome.usage == 20
        await back_to_the_start(self.engine, self.server)


@asynccontextmanager
async def speakers(address: str, http_address: str, model: str) -> AsyncIterator[tuple[Native, Vllm, Http]]:
    """Clients of a server that is there."""
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        grpc.aio.insecure_channel(address) as channel,
        aiohttp.ClientSession(f"http://{http_address}", connector=connector, read_bufsize=1 << 20) as client,
    ):
        yield Native(channel), Vllm(channel), Http(client, model)


@asynccontextmanager
async def fronting(engine: ServedEngine, config: ServerConfig | None = None) -> AsyncIterator[Front]:
    """Serves an engine by every protocol."""
    # A pause of the whole machine, however long, is no client that has gone, or that takes its time.
    patient = ServerConfig(keepalive_timeout=3600.0, message_timeout=3600.0, stall_limit=3600.0)
    async with (
        http_serving(engine, config or patient) as (server, http_address),
        speakers(f"127.0.0.1:{server.port}", http_address, engine.model_name) as (native, vllm, http),
    ):
        yield Front(server, engine, native, vllm, http)


def raw_text(message: Message, text: bytes) -> bytes:
    """A request message whose prompt, the text "~~~~", is replaced by bytes that may be no text."""
    data = message.SerializeToString()
    assert data.count(b"~~~~") == 1 and len(text) == 4
    return data.replace(b"~~~~", text)
