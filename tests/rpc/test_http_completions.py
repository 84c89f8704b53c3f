"""`/v1/completions` with the openai package's client."""

import asyncio
import json

import openai
import pytest
from http_serving import http_serving, openai_serving, request_bytes
from scripted_engine import LETTERS, ByteTokenizer, ScriptedEngine
from serving import back_to_the_start, eventually

from jaxserve.events import Delta, Finished, FinishReason, Timings, TokenLogprob, Usage
from jaxserve.request import OutputParams, Request
from rpc.http.answers import LEAST_LOGPROB, CompletionAnswer
from rpc.http.schema import Asked

pytestmark = pytest.mark.asyncio


def text_of(count: int) -> str:
    return "".join(chr(LETTERS[number % 26]) for number in range(count))


async def test_a_completion_has_text_reason_and_usage() -> None:
    async with openai_serving(ScriptedEngine()) as (_, client):
        answer = await client.completions.create(model="scripted", prompt="hello", max_tokens=30)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (text_of(30), "length", 0)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 30, 35)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == "scripted"


async def test_prompts_may_be_texts_ids_and_lists_of_them() -> None:
    async with openai_serving(ScriptedEngine()) as (_, client):
        for prompt, count, prompt_tokens in (
            ("abc", 1, 3),
            ([1, 2], 1, 2),
            (["a", "bc", "def"], 3, 6),
            ([[1, 2], [3]], 2, 3),
        ):
            answer = await client.completions.create(model="scripted", prompt=prompt, max_tokens=4)
            assert [choice.index for choice in answer.choices] == list(range(count))
            assert {choice.text for choice in answer.choices} == {"abcd"}
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == prompt_tokens


async def test_a_stream_gives_every_token_once_then_the_usage() -> None:
    async with openai_serving(ScriptedEngine()) as (_, client):
        texts, reasons, usages = ["", "", ""], {}, []
        stream = await client.completions.create(
            model="scripted",
            prompt=["one", "two", "three"],
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            usages.append(chunk.usage)
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                if choice.finish_reason is not None:
                    reasons[choice.index] = choice.finish_reason
    assert texts == [text_of(40)] * 3
    assert reasons == dict.fromkeys(range(3), "length")
    assert all(usage is None for usage in usages[:-1])
    assert (usages[-1].prompt_tokens, usages[-1].completion_tokens) == (11, 120)


async def test_logprobs_have_the_shape_of_the_api_and_the_same_in_a_stream() -> None:
    async with openai_serving(ScriptedEngine()) as (_, client):
        asked = {"model": "scripted", "prompt": "x", "max_tokens": 3, "logprobs": 2}
        whole = (await client.completions.create(**asked)).choices[0].logprobs
        chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
    assert whole is not None
    assert (whole.tokens, whole.token_logprobs, whole.text_offset) == (["a", "b", "c"], [-0.5] * 3, [0, 1, 2])
    assert whole.top_logprobs == [{"\0": -0.5, "\1": -1.5}] * 3
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for part in parts if part is not None for token in part.tokens or ()] == ["a", "b", "c"]
    assert [offset for part in parts if part is not None for offset in part.text_offset or ()] == [0, 1, 2]


async def test_a_closed_connection_cancels_every_sequence_of_the_request() -> None:
    engine = ScriptedEngine()
    async with openai_serving(engine) as (server, client):
        stream = await client.completions.create(model="scripted", prompt=["a", "b", "c"], stream=True)
        async for _ in stream:
            break
        assert engine.loads().running + engine.loads().waiting == 3
        await stream.close()
        await eventually(lambda: (engine.loads().running, engine.loads().waiting) == (0, 0))
        assert engine.loads().available_pages == engine.loads().total_pages
        waiting = asyncio.ensure_future(client.completions.create(model="scripted", prompt="x"))
        await eventually(lambda: engine.loads().running == 1)
        waiting.cancel()
        await eventually(lambda: (engine.loads().running, len(server.calls)) == (0, 0))


def completion_logprobs(*entries: TokenLogprob) -> dict[str, list]:
    """As shown for a completion of these tokens."""
    request = Request(prompt="x", output=OutputParams(logprobs=5))
    asked = Asked((request,), stream=False, include_usage=False, return_token_ids=False)
    answer = CompletionAnswer(asked, "1", "scripted", ByteTokenizer())
    answer.add_delta(0, Delta("1", logprobs=entries))
    answer.add_finished(0, Finished("1", 0, FinishReason.LENGTH, Usage(1, 0, len(entries)), Timings(0, 0, 0, 0)))
    return json.loads(answer.whole())["choices"][0]["logprobs"]


async def test_parts_of_characters_have_names_of_their_own_and_of_one_name_the_likeliest_counts() -> None:
    first, second = "🙂".encode()[:2]
    top = ((first, -0.5), (second, -1.5), (65, -2.5), (65, -3.5), (66, float("-inf")))
    shown = completion_logprobs(TokenLogprob(first, -0.5, top))
    assert shown["tokens"] == [r"bytes:\xf0"]
    assert shown["top_logprobs"] == [{r"bytes:\xf0": -0.5, r"bytes:\x9f": -1.5, "A": -2.5, "B": LEAST_LOGPROB}]


async def test_special_tokens_which_are_no_text_move_no_offset() -> None:
    shown = completion_logprobs(*(TokenLogprob(token, -0.5, ()) for token in (0, 65, 0, 66)))
    assert shown["text_offset"] == [0, 0, 1, 1]
    assert shown["tokens"] == ["\0", "A", "\0", "B"]


async def test_ids_whose_text_is_yet_to_come_are_in_the_stream_for_who_asked_for_ids() -> None:
    for ids_wanted in (True, False):
        asked = Asked((Request(prompt="x"),), stream=True, include_usage=False, return_token_ids=ids_wanted)
        answer = CompletionAnswer(asked, "1", "scripted", ByteTokenizer())
        chunks = answer.delta_chunk(0, Delta("1", token_ids=(240, 159))).decode().split("data: ")[1:]
        shown = [json.loads(chunk)["choices"][0] for chunk in chunks]
        assert [(choice["token_ids"], choice["text"]) for choice in shown] == [([240, 159], "")] * ids_wanted


@pytest.mark.parametrize("stream", [False, True])
async def test_a_closed_connection_ends_its_request_though_others_wait_behind_it(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(step_time=0.01)
    asked = json.dumps({"prompt": "x", "stream": stream}).encode()
    behind = b"GET /health HTTP/1.1\r\nhost: test\r\n\r\n"
    async with http_serving(engine) as (server, address):
        for later in (b"", behind):  # sent at once, or once the first is answered
            _, writer = await asyncio.open_connection(*address.split(":"))
            request = request_bytes("/v1/completions", asked).replace(b"connection: close\r\n", b"")
            writer.write(request + (b"" if later else behind))
            await eventually(lambda: engine.loads().running == 1)
            writer.write(later)
            await writer.drain()
            await asyncio.sleep(0.1)
            writer.transport.abort()
            await eventually(lambda: (engine.loads().running, len(server.calls)) == (0, 0))
        await back_to_the_start(engine, server)
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


async def test_refusals_raise_the_clients_own_classes() -> None:
    engine = ScriptedEngine(slots=1, max_waiting=1)
    async with openai_serving(engine) as (server, client):
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="scripted", prompt="x", max_tokens=0)
        assert (bad.value.param, bad.value.code) == ("max_tokens", "invalid_value")
        with pytest.raises(openai.BadRequestError) as unknown:
            await client.completions.create(model="scripted", prompt="x", extra_body={"beam_width": 4})
        assert unknown.value.param == "beam_width"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="x")
        stream = await client.completions.create(model="scripted", prompt="x", stream=True)
        waiting = asyncio.ensure_future(client.completions.create(model="scripted", prompt="x", stream=True))
        await eventually(lambda: engine.submitted == 2)
        with pytest.raises(openai.RateLimitError) as busy:
            await client.completions.create(model="scripted", prompt="x")
        assert int(busy.value.response.headers["retry-after"]) >= 1
        waiting.cancel()
        await stream.close()
        await eventually(lambda: engine.loads().running + engine.loads().waiting == 0)
        with pytest.raises(openai.InternalServerError):
            await client.completions.create(model="scripted", prompt="raise")
        with pytest.raises(openai.InternalServerError, match="a scripted failure"):
            await client.completions.create(model="scripted", prompt="break")
        stream = await client.completions.create(model="scripted", prompt="break", stream=True)
        with pytest.raises(openai.APIError, match="a scripted failure"):
            async for _ in stream:
                pass
        await eventually(lambda: len(server.calls) == 0)
        assert engine.loads().available_pages == engine.loads().total_pages


async def test_models_are_listed_and_found_by_name() -> None:
    async with openai_serving(ScriptedEngine()) as (_, client):
        assert [model.id async for model in client.models.list()] == ["scripted"]
        assert (await client.models.retrieve("scripted")).id == "scripted"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("another/one")


async def test_of_several_prompts_all_are_accepted_or_none() -> None:
    engine = ScriptedEngine(slots=1, max_waiting=2)
    async with openai_serving(engine) as (server, client):
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="scripted", prompt=[[1], [2], [300]])
        assert bad.value.param == "prompt"
        stream = await client.completions.create(model="scripted", prompt="x", stream=True)
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="scripted", prompt=["a", "b", "c"])
        assert engine.submitted == 1
        with pytest.raises(openai.ConflictError):  # the second of the two has the first one's name
            headers = {"x-request-id": "twice"}
            asked = {"model": "scripted", "prompt": "a", "max_tokens": 2, "extra_headers": headers}
            await asyncio.gather(*(client.completions.create(**asked) for _ in range(2)))
        assert engine.submitted == 2
        await stream.close()
        await back_to_the_start(engine, server)


async def test_past_its_timeout_a_request_ends_with_what_has_come_or_with_504() -> None:
    engine = ScriptedEngine(step_time=0.01)
    async with openai_serving(engine) as (server, client):
        asked = {"model": "scripted", "prompt": "x", "extra_body": {"timeout": 0.5}}
        whole = (await client.completions.create(**asked)).choices[0]
        assert (whole.finish_reason, whole.text) == ("deadline", text_of(len(whole.text)))
        chunks = [chunk.choices[0] async for chunk in await client.completions.create(**asked, stream=True)]
        assert chunks[-1].finish_reason == "deadline"
        text = "".join(chunk.text for chunk in chunks)
        assert text and text == text_of(len(text))
        several = await client.completions.create(**{**asked, "prompt": ["a", "b"]})
        assert [choice.finish_reason for choice in several.choices] == ["deadline"] * 2
        engine.paused.set()  # no token comes any more
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="the deadline passed") as late:
                await client.completions.create(**asked, stream=stream)
            assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        for wrong in (0, -1, 86401, "1", True, [1]):
            with pytest.raises(openai.BadRequestError) as bad:
                await client.completions.create(model="scripted", prompt="x", extra_body={"timeout": wrong})
            assert bad.value.param == "timeout"
        await back_to_the_start(engine, server)


async def test_past_its_timeout_a_request_ends_whose_long_prompt_is_still_tokenized() -> None:
    engine = ScriptedEngine()
    engine.may_submit.clear()
    async with openai_serving(engine) as (server, client):
        try:
            with pytest.raises(openai.InternalServerError, match="the deadline passed") as late:
                await client.completions.create(model="scripted", prompt="x" * 3000, extra_body={"timeout": 0.2})
            assert late.value.status_code == 504
            await eventually(lambda: len(server.calls) == 0)
        finally:
            engine.may_submit.set()
        await eventually(lambda: engine.submitted == 1)  # nobody wants it any more
        await back_to_the_start(engine, server)
