"""SmolLM2 behind a real server, asked by a real client: what arrives is what the engine gives."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from serving import ROOT, back_to_the_start, lent, serving

from jaxserve.events import Delta, Finished, FinishReason
from jaxserve.front.completion import CompletionBuilder
from jaxserve.request import Constraint, OutputParams, Request, SamplingParams, StoppingParams
from jaxserve.request_errors import InvalidRequest
from rpc.client import AsyncClient

if TYPE_CHECKING:
    from jaxserve.engine import Engine

pytestmark = pytest.mark.asyncio

GREEDY = SamplingParams(temperature=0.0)


@asynccontextmanager
async def served(engine: "Engine") -> AsyncIterator[AsyncClient]:
    async with serving(lent(engine)) as (server, client):
        yield client
        await back_to_the_start(engine, server)


def requests() -> list[Request]:
    """Prompts of each kind and of several lengths."""
    text = "The lighthouse keeper wrote down the weather every evening, and so"
    prompts = [
        *(Request(prompt=text * times) for times in (1, 4, 12)),
        *(Request(token_ids=tuple(range(100, 100 + length))) for length in (1, 17, 64)),
        *(Request(messages=({"role": "user", "content": content},)) for content in ("Hi", "Name three colours.")),
    ]
    return [
        replace(request, sampling=GREEDY, stopping=StoppingParams(max_tokens=6 + 2 * number), request_id=f"r{number}")
        for number, request in enumerate(prompts)
    ]


async def test_streams_at_once_give_the_tokens_the_engine_gives(engine: "Engine") -> None:
    wanted = [replace(request, output=OutputParams(logprobs=2)) for request in requests()]
    expected = await asyncio.to_thread(engine.generate, list(wanted))

    async def run(client: AsyncClient, request: Request) -> tuple[tuple[int, ...], str, list[int]]:
        generation = client.generate(request)
        deltas = [delta async for delta in generation]
        assert generation.finished is not None
        logprobs = [entry.token_id for delta in deltas for entry in delta.logprobs or ()]
        ids = tuple(token for delta in deltas for token in delta.token_ids)
        return ids, "".join(delta.text for delta in deltas), logprobs

    async with served(engine) as client:
        results = await asyncio.gather(*(run(client, request) for request in wanted))
        once = await client.generate_once(replace(wanted[0], request_id="once"))
    for (ids, text, logprobs), completion in zip(results, expected, strict=True):
        assert ids == completion.token_ids
        assert text == completion.text
        assert logprobs == list(ids)
    assert once.token_ids == expected[0].token_ids
    assert once.logprobs is not None
    assert expected[0].logprobs is not None
    for got, want in zip(once.logprobs, expected[0].logprobs, strict=True):
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)  # float32 on the wire


async def test_every_sequence_of_a_request_arrives_and_ends_once(engine: "Engine") -> None:
    fields = {"n": 4, "seed": 11, "max_tokens": 10, "ignore_eos": True}
    (expected,) = await asyncio.to_thread(lambda: engine.generate(["The tide"], **fields))
    async with served(engine) as client:
        generation = client.generate("The tide", **fields)
        builder = CompletionBuilder(generation.request_id)
        ended = []
        async for event in generation.events():
            builder.add(event)
            if isinstance(event, Finished):
                ended.append(event.index)
        once = await client.generate_once("The tide", **fields)
        assert sorted(ended) == [0, 1, 2, 3]
        assert builder.build().outputs == expected.outputs == once.outputs
        assert once.usage.completion_tokens == expected.usage.completion_tokens == 40
        assert once.usage.prompt_tokens == expected.usage.prompt_tokens
        assert (once.seed, generation.started and generation.started.seed) == (11, 11)
        with pytest.raises(InvalidRequest, match=r"sampling\.n|\[1, 96\]") as caught:
            await client.generate_once("The tide", n=10**9)
        assert caught.value.field == "n"
        async for _ in client.generate("The tide", n=4, ignore_eos=True):
            break  # leaves all four


async def test_log_probabilities_of_the_prompt_arrive_as_the_engine_gives_them(engine: "Engine") -> None:
    fields = {"prompt_logprobs": 2, "max_tokens": 2, "temperature": 0.0}
    (expected,) = await asyncio.to_thread(lambda: engine.generate(["The tide comes in twice"], **fields))
    async with served(engine) as client:
        generation = client.generate("The tide comes in twice", **fields)
        await generation.text()
        once = await client.generate_once("The tide comes in twice", **fields)
    assert expected.prompt_logprobs
    assert generation.started is not None
    assert generation.started.prompt_logprobs == once.prompt_logprobs
    for got, want in zip(once.prompt_logprobs or (), expected.prompt_logprobs, strict=True):
        assert (got.token_id, [token for token, _ in got.top]) == (want.token_id, [token for token, _ in want.top])
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)  # float32 on the wire


async def test_a_short_request_is_done_long_before_its_long_neighbours(engine: "Engine") -> None:
    async def run(client: AsyncClient, tokens: int, seen: list[int]) -> None:
        fields = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        async for delta in client.generate({"token_ids": list(range(50, 60))}, **fields):
            seen.append(len(delta.token_ids))

    async with served(engine) as client:
        long_seen: list[list[int]] = [[] for _ in range(3)]
        long_runs = [asyncio.ensure_future(run(client, 40, seen)) for seen in long_seen]
        await run(client, 8, [])
        assert all(sum(seen) < 40 for seen in long_seen)
        await asyncio.gather(*long_runs)
        assert [sum(seen) for seen in long_seen] == [40, 40, 40]


async def test_a_stop_string_ends_the_text_before_it(engine: "Engine") -> None:
    async with served(engine) as client:
        whole = await client.generate_once("One, two, three,", temperature=0.0, max_tokens=24, ignore_eos=True)
        stop = whole.text[8:12]
        generation = client.generate("One, two, three,", temperature=0.0, max_tokens=24, stop=[stop], ignore_eos=True)
        text = await generation.text()
    assert text == whole.text[: whole.text.index(stop)]
    assert generation.finished is not None
    assert generation.finished.finish_reason is FinishReason.STOP
    assert generation.finished.matched_stop == stop


async def test_leaving_a_deadline_and_abort_free_the_pages(engine: "Engine") -> None:
    async with served(engine) as client:
        endless = {"ignore_eos": True, "temperature": 0.0}
        async for _ in client.generate("Once upon a time", **endless):
            assert engine.loads().running == 1
            break
        await back_to_the_start(engine)
        with pytest.raises(TimeoutError):
            await client.generate("Once upon a time", timeout=0.5, **endless).text()
        await back_to_the_start(engine)
        generation = client.generate("Once upon a time", **endless)
        async for _ in generation:
            await client.abort(generation.request_id)
        assert generation.finished is not None
        assert generation.finished.finish_reason is FinishReason.ABORT


async def test_a_killed_client_frees_its_pages_and_disturbs_nobody(engine: "Engine") -> None:
    script = """
import sys
from rpc.client import Client
for delta in Client(sys.argv[1]).generate("The sea was", ignore_eos=True):
    print("token", flush=True)
"""
    async with served(engine) as client:
        fields = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
        alone = await client.generate_once("A short history of tea", **fields)
        process = subprocess.Popen(
            [sys.executable, "-c", script, client.address], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "token\n"
        neighbour = asyncio.ensure_future(client.generate_once("A short history of tea", **fields))
        process.kill()
        process.communicate()
        assert (await neighbour).token_ids == alone.token_ids
        await back_to_the_start(engine)


async def test_refusals_name_the_field_and_allocate_nothing(engine: "Engine") -> None:
    async with served(engine) as client:
        steps = engine.loads().steps
        info = await client.model_info()
        for prompt, fields, field in (
            ("a " * (2 * info.max_context), {}, "prompt"),
            ({"token_ids": [info.vocab_size]}, {}, "token_ids"),
            ({"messages": []}, {}, "messages"),
            ("a", {"max_tokens": info.max_context}, "max_tokens"),
            ("a", {"top_p": 0.0}, "top_p"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                await client.generate_once(prompt, **fields)
            assert caught.value.field == field
        assert engine.loads().steps == steps


async def test_control_calls_answer_for_the_real_model(engine: "Engine") -> None:
    async with served(engine) as client:
        ids = await client.tokenize("Grüße, 世界!")
        assert ids == engine.tokenizer.encode("Grüße, 世界!")
        assert await client.detokenize(ids) == "Grüße, 世界!"
        messages = [{"role": "user", "content": "Hi"}]
        assert await client.tokenize(messages) == engine.tokenizer.encode_chat(messages)
        info = await client.server_info()
        assert info.device.platform
        assert info.limits.max_context == engine.max_context
        loads = await client.loads()
        assert loads.total_pages == engine.loads().total_pages
        assert loads.compiles_after_warmup == 0


async def test_deltas_arrive_as_they_are_made(engine: "Engine") -> None:
    async with served(engine) as client:
        times: list[float] = []
        async for event in client.generate("Hello", max_tokens=16, ignore_eos=True).events():
            if isinstance(event, Delta):
                times.append(time.monotonic())
        assert len(times) > 1  # not one message at the end


async def test_a_constraint_holds_over_the_wire_and_a_bad_one_names_its_field(engine: "Engine") -> None:
    constraints = [
        Constraint(choice=("yes", "no")),
        Constraint(regex="[0-9]{4}"),
        Constraint(json_schema={"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}),
        Constraint(grammar='start: "a" "b"'),
    ]
    wanted = [Request(prompt="Answer:", sampling=GREEDY, constraint=constraint) for constraint in constraints]
    expected = await asyncio.to_thread(engine.generate, list(wanted))
    async with served(engine) as client:
        answers = await asyncio.gather(*(client.generate_once(request) for request in wanted))
        assert [answer.text for answer in answers] == [completion.text for completion in expected]
        assert [answer.finish_reason for answer in answers] == ["stop"] * 4
        with pytest.raises(InvalidRequest, match="unclosed group") as caught:
            await client.generate_once(Request(prompt="a", constraint=Constraint(regex="(")))
        assert caught.value.field == "regex"
