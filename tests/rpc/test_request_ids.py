"""Whatever is logged of a request says which, in every protocol."""

import io
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import grpc.aio
import openai
import pytest
from http_serving import openai_client
from scripted_engine import ScriptedEngine
from smg_grpc_proto.generated import vllm_engine_pb2, vllm_engine_pb2_grpc

from jaxserve.log import configure_logging
from rpc.jetstream import orchestrator_pb2, orchestrator_pb2_grpc
from rpc.server import Server
from rpc.server_config import ServerConfig
from rpc.v1 import jaxserve_pb2, jaxserve_pb2_grpc

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("logging_unchanged")]

ID = "the-request"
Send = Callable[[grpc.aio.Channel, openai.AsyncOpenAI, str], Awaitable[object]]
"""Sends a prompt and reads the answer to its end."""


async def native(channel: grpc.aio.Channel, _: openai.AsyncOpenAI, text: str) -> None:
    stub = jaxserve_pb2_grpc.InferenceStub(channel)
    async for _ in stub.Generate(jaxserve_pb2.GenerateRequest(request_id=ID, text=text)):
        pass


async def native_once(channel: grpc.aio.Channel, _: openai.AsyncOpenAI, text: str) -> None:
    await jaxserve_pb2_grpc.InferenceStub(channel).GenerateOnce(jaxserve_pb2.GenerateRequest(request_id=ID, text=text))


async def smg(channel: grpc.aio.Channel, _: openai.AsyncOpenAI, text: str) -> None:
    request = vllm_engine_pb2.GenerateRequest(request_id=ID, text=text)
    async for _ in vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(request):
        pass


async def jetstream(channel: grpc.aio.Channel, _: openai.AsyncOpenAI, text: str) -> None:
    content = orchestrator_pb2.DecodeRequest.TextContent(text=text)
    request = orchestrator_pb2.DecodeRequest(text_content=content, max_tokens=9)
    async for _ in orchestrator_pb2_grpc.OrchestratorStub(channel).Decode(request):
        pass


async def completions(_: grpc.aio.Channel, client: openai.AsyncOpenAI, text: str) -> None:
    await client.completions.create(model="scripted", prompt=text, extra_headers={"x-request-id": ID})


async def streamed_completions(_: grpc.aio.Channel, client: openai.AsyncOpenAI, text: str) -> None:
    headers = {"x-request-id": ID}
    stream = await client.completions.create(model="scripted", prompt=text, stream=True, extra_headers=headers)
    async for _ in stream:
        pass


@pytest.mark.parametrize("send", [native, native_once, smg, jetstream, completions, streamed_completions])
async def test_every_line_about_a_request_has_its_id(send: Send) -> None:
    log = io.StringIO()
    server = Server(replace(ServerConfig(), grpc_port=0, http_port=0), report=lambda _: None)
    await server.start()
    await server.attach(ScriptedEngine())
    configure_logging("debug", log)
    assert server.http is not None
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        openai_client(f"127.0.0.1:{server.http.port}") as client,
    ):
        for prompt in ("raise", "break", "raise"):  # a defect as it is accepted, and one as it runs
            with pytest.raises((grpc.aio.AioRpcError, openai.APIError)):
                await send(channel, client, prompt)
    await server.stop(grace=0.0)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    own = [line for line in lines if line["logger"].startswith(("rpc", "jaxserve"))]
    assert [line["level"] for line in own] == ["error"] * 3
    for line in own:
        assert f"request {line['request_id']}" in line["message"]
        assert line["request_id"] == ID or (send is jetstream and len(line["request_id"]) == 32)
    assert ("exception" in own[0], "exception" in own[1]) == (True, False)
