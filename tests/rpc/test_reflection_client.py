"""A client that nobody here wrote and that knows no stub: grpc-requests, by reflection alone."""

import asyncio

import pytest
from grpc_requests.aio import AsyncClient as ReflectionClient
from scripted_engine import ScriptedEngine, expected_ids
from serving import back_to_the_start, serving

pytestmark = pytest.mark.asyncio


async def test_it_finds_every_service_and_streams_from_each() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as (server, direct):
        client = ReflectionClient(direct.address)
        try:
            services = set(await client.service_names())
            native, vllm, jetstream = (
                "jaxserve.v1.Inference",
                "vllm.grpc.engine.VllmEngine",
                "jetstream_proto.Orchestrator",
            )
            assert {native, vllm, jetstream, "jaxserve.v1.Control", "grpc.health.v1.Health"} <= services

            async def stream(service: str, method: str, request: dict[str, object]) -> list[dict[str, dict]]:
                return [message async for message in await client.request(service, method, request)]

            started, *deltas, finished = await stream(native, "Generate", {"text": "hi", "stopping": {"max_tokens": 5}})
            assert started["started"]["prompt_tokens"] == 2
            assert [token for one in deltas for token in one["delta"]["token_ids"]] == expected_ids(5)
            assert finished["finished"]["finish_reason"] == "length"
            asked = {"text": "hi", "stream": True, "sampling_params": {"max_tokens": 6}}
            *chunks, last = await stream(vllm, "Generate", asked)
            assert [token for one in chunks for token in one["chunk"]["token_ids"]] == expected_ids(6)
            assert last["complete"]["output_ids"] == expected_ids(6)
            asked = {"token_content": {"token_ids": [104, 105]}, "max_tokens": 7}
            responses = await stream(jetstream, "Decode", asked)
            samples = [response["stream_content"]["samples"] for response in responses]
            assert [token for (sample,) in samples for token in sample["token_ids"]] == expected_ids(7)
            assert await client.request("grpc.health.v1.Health", "Check", {"service": vllm}) == {"status": "SERVING"}
        finally:
            await client.channel.close()
        await asyncio.sleep(0)
        await back_to_the_start(engine, server)
