"""A call that has ended leaves nothing that lives on until the garbage is collected, which is seldom in a server."""

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import Iterator

import grpc.aio
import openai
import pytest
from http_serving import openai_serving
from serving import back_to_the_start, lent, serving
from smg_grpc_proto.generated import vllm_engine_pb2_grpc
from test_vllm_engine import asking

from jaxserve.engine import Engine
from jaxserve.request_errors import InvalidRequest

pytestmark = pytest.mark.asyncio

CALLS = 10
"""Of each kind."""
OURS = ("OpenCall", "RequestStream", "Request", "Finished", "Failure", "InvalidRequest", "Generation")
"""Types of ours that a call on the server has."""
GRPCS = ("RPCState", "_ServicerContext", "AbortError")
"""Of gRPC's: with the first goes the call itself, tens of kilobytes outside Python."""


@contextlib.contextmanager
def collected() -> Iterator[Counter[str]]:
    """What only the collector could free of all that was made in the block, by the name of its type; once it is left."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.update(type(one).__name__ for one in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def test_grpc_calls_that_end_fail_or_are_left_free_what_they_had(simulated: Engine) -> None:
    async with serving(lent(simulated)) as (server, client):
        await client.generate_once("hello", max_tokens=2)
        with collected() as found:
            for _ in range(CALLS):
                await client.generate_once("hello", max_tokens=2)
                await client.generate("hello", max_tokens=2).text()
                with pytest.raises(InvalidRequest):
                    await client.generate_once("hello", temperature=-1.0)
                async for _ in client.generate("hello"):
                    break
                with pytest.raises(TimeoutError):
                    await client.generate_once("hello", timeout=0.02)
            await back_to_the_start(lent(simulated), server)
            await asyncio.sleep(0.1)
        # The client's own request and refusal are among them, in this process.
        assert not {name: found[name] for name in (*GRPCS, "OpenCall", "RequestStream", "Failure") if found[name]}


async def test_calls_of_the_gateways_protocol_free_what_they_had(simulated: Engine) -> None:
    async with (
        serving(lent(simulated)) as (server, client),
        grpc.aio.insecure_channel(client.address) as channel,
    ):
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        with collected() as found:
            for _ in range(CALLS):
                async for _ in stub.Generate(asking(max_tokens=3)):
                    pass
                call = stub.Generate(asking(max_tokens=100))
                await call.read()
                call.cancel()
            await back_to_the_start(lent(simulated), server)
            await asyncio.sleep(0.1)
        assert not {name: found[name] for name in (*GRPCS, "OpenCall", "RequestStream") if found[name]}


async def test_http_requests_free_what_they_had(simulated: Engine) -> None:
    async with openai_serving(lent(simulated)) as (server, client):
        (model,) = [one.id async for one in client.models.list()]
        with collected() as found:
            for _ in range(CALLS):
                await client.completions.create(model=model, prompt="hello", max_tokens=2)
                stream = await client.completions.create(model=model, prompt="hello", max_tokens=2, stream=True)
                async for _ in stream:
                    pass
                with pytest.raises(openai.BadRequestError):
                    await client.completions.create(model=model, prompt="hello", temperature=-1.0)
            await back_to_the_start(lent(simulated), server)
        assert not {name: found[name] for name in OURS if found[name]}
