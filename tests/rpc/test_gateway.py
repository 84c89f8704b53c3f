"""The gateway smg, which nobody here wrote, between the OpenAI client and this server."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import jsonschema
import openai
import pytest
from scripted_engine import ScriptedEngine, expected_ids
from serving import ROOT, back_to_the_start, eventually, lent, serving

from jaxserve.events import Finished
from rpc.client import AsyncClient
from rpc.served_engine import ServedEngine
from rpc.server import Server

sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks.gateway import Gateway

if TYPE_CHECKING:
    from jaxserve.engine import Engine

pytestmark = pytest.mark.asyncio

MESSAGES = [{"role": "user", "content": "Name three colours."}]


@asynccontextmanager
async def behind_a_gateway(engine: ServedEngine) -> AsyncIterator[tuple[openai.AsyncOpenAI, Server, AsyncClient]]:
    """The OpenAI client through smg, the server, and a client straight to the server."""
    async with serving(engine) as (server, direct):
        gateway = await asyncio.to_thread(Gateway, [direct.address])
        try:
            async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
                yield client, server, direct
        finally:
            await asyncio.to_thread(gateway.close)


async def test_greedy_chats_through_the_gateway_equal_those_of_direct_grpc(engine: "Engine") -> None:
    async with behind_a_gateway(lent(engine)) as (client, server, direct):
        (model,) = (await client.models.list()).data
        assert model.id == engine.model_name
        for content, count in (("Name three colours.", 24), ("Say hello.", 40), ("Grüße, 世界! 🦜", 16)):
            messages = [{"role": "user", "content": content}]
            generation = direct.chat(messages, temperature=0.0, max_tokens=count)
            deltas = [delta async for delta in generation]
            ids = [token for delta in deltas for token in delta.token_ids]
            assert isinstance(generation.finished, Finished)
            stream = await client.chat.completions.create(
                model=model.id,
                messages=messages,  # pyright: ignore[reportArgumentType]
                temperature=0.0,
                max_completion_tokens=count,
                stream=True,
                stream_options={"include_usage": True},
                logprobs=True,
                top_logprobs=1,
            )
            chunks = [chunk async for chunk in stream]
            choices = [choice for chunk in chunks for choice in chunk.choices]
            assert "".join(choice.delta.content or "" for choice in choices) == "".join(one.text for one in deltas)
            tokens = [one for choice in choices if choice.logprobs for one in choice.logprobs.content or ()]
            # A token that splits a character is told by its text, which has no bytes of its own.
            told = [engine.tokenizer.decode([token]) for token in ids]
            assert [one.token for one in tokens] == told
            (finish_reason,) = {choice.finish_reason for choice in choices} - {None}
            assert finish_reason == generation.finished.finish_reason
            (usage,) = [chunk.usage for chunk in chunks if chunk.usage is not None]
            wanted = generation.finished.usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (wanted.prompt_tokens, wanted.completion_tokens)
            whole = await client.chat.completions.create(
                model=model.id,
                messages=messages,  # pyright: ignore[reportArgumentType]
                temperature=0.0,
                max_completion_tokens=count,
            )
            assert whole.choices[0].message.content == "".join(one.text for one in deltas)
            assert whole.usage is not None and whole.usage.completion_tokens == wanted.completion_tokens
        await back_to_the_start(engine, server)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}


async def test_a_json_schema_holds_through_the_gateway(engine: "Engine") -> None:
    async with behind_a_gateway(lent(engine)) as (client, server, _):
        schema = {"name": "person", "strict": True, "schema": SCHEMA}
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model=engine.model_name,
                    messages=[{"role": "user", "content": "Describe a person."}],
                    response_format={"type": "json_schema", "json_schema": schema},
                    max_completion_tokens=200,
                    temperature=1.0,
                    seed=seed,
                )
                for seed in range(4)
            )
        )
        for answer in answers:
            assert answer.choices[0].finish_reason == "stop"
            jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)
        answer = await client.chat.completions.create(
            model=engine.model_name,
            messages=[{"role": "user", "content": "Describe a person."}],
            response_format={"type": "json_object"},
            max_completion_tokens=200,
            temperature=0.0,
        )
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
        else:
            assert (answer.choices[0].message.content or "").lstrip().startswith("{")
        await back_to_the_start(engine, server)


async def test_a_closed_stream_frees_its_pages_within_two_steps_of_being_seen() -> None:
    engine = ScriptedEngine(step_time=0.02)
    aborted_at: list[int] = []
    abort = engine.abort

    def seen(request_id: str, tenant: str | None = None) -> bool:
        aborted_at.append(engine.loads().steps)
        return abort(request_id)

    engine.abort = seen
    async with behind_a_gateway(engine) as (client, server, _):
        stream = await client.completions.create(model="scripted", prompt="hello", max_tokens=4000, stream=True)
        seen_chunks = 0
        async for _ in stream:
            seen_chunks += 1
            if seen_chunks == 5:
                break
        await stream.close()
        await eventually(lambda: engine.loads().running == 0 and bool(aborted_at))
        assert engine.loads().steps - aborted_at[0] <= 2
        await back_to_the_start(engine, server)


async def test_100_past_the_queues_limit_are_exactly_100_429s_with_retries_and_the_health_of_both_stays_good() -> None:
    """smg tries each again by itself, and does not pass on when to; without its retries they are quick, see
    `test_reliability_overload`."""
    engine = ScriptedEngine(slots=8, max_waiting=16)
    engine.paused.set()
    async with behind_a_gateway(engine) as (client, server, direct):

        async def run() -> str:
            answer = await client.completions.create(model="scripted", prompt="hello", max_tokens=3)
            return answer.choices[0].text

        async def refused() -> None:
            with pytest.raises(openai.RateLimitError, match="the queue is full: it takes 24") as error:
                await run()
            assert "retry-after" not in error.value.response.headers

        accepted = [asyncio.create_task(run()) for _ in range(24)]
        await eventually(lambda: engine.submitted == 24)
        past = [asyncio.create_task(refused()) for _ in range(100)]
        while not all(one.done() for one in past):
            assert await direct.is_ready()
            assert (await client.models.list()).data[0].id == "scripted"
            await asyncio.sleep(0.01)
        await asyncio.gather(*past)
        assert not any(one.done() for one in accepted)
        engine.paused.clear()
        assert await asyncio.gather(*accepted) == ["abc"] * 24
        assert engine.submitted == 24
        await back_to_the_start(engine, server)


async def test_what_the_server_refuses_is_400_and_names_the_field() -> None:
    async with behind_a_gateway(ScriptedEngine()) as (client, _, _):
        with pytest.raises(openai.BadRequestError, match=r"sampling_params\.seed"):
            await client.completions.create(model="scripted", prompt="a", max_tokens=1, seed=-5)
        with pytest.raises(openai.BadRequestError, match="4096 tokens"):
            await client.completions.create(model="scripted", prompt="x" * 5000, max_tokens=1)


async def test_many_streams_at_once_lose_and_mix_nothing() -> None:
    engine = ScriptedEngine(slots=16, max_waiting=64)
    async with behind_a_gateway(engine) as (client, server, _):

        async def run(count: int) -> None:
            stream = await client.completions.create(model="scripted", prompt="hi", max_tokens=count, stream=True)
            choices = [choice async for chunk in stream for choice in chunk.choices]
            assert "".join(choice.text for choice in choices) == bytes(expected_ids(count)).decode()
            assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]

        await asyncio.gather(*(run(5 + 3 * number) for number in range(48)))
        await back_to_the_start(engine, server)
