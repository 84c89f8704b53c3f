"""SmolLM2 asked over HTTP: what arrives is what the engine gives."""

import asyncio
import json
import os
import signal
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Literal

import jsonschema
import openai
import pytest
from http_serving import PATIENCE, http_serving, openai_client, openai_serving
from pydantic import BaseModel, Field
from serving import back_to_the_start, lent

from jaxserve import limited_process

if TYPE_CHECKING:
    from jaxserve.engine import Engine

pytestmark = pytest.mark.asyncio

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three colours."}]


async def test_streams_and_whole_answers_have_the_tokens_and_logprobs_of_the_engine(engine: "Engine") -> None:
    prompt, fields = "The lighthouse keeper wrote down", {"temperature": 0.0, "max_tokens": 12}
    (expected,) = await asyncio.to_thread(engine.generate, [prompt], logprobs=2, **fields)
    asked = {"model": engine.model_name, "prompt": prompt, "logprobs": 2, **fields}
    body = {"return_token_ids": True}
    async with openai_serving(lent(engine)) as (server, client):
        whole, stream = await asyncio.gather(
            client.completions.create(**asked, extra_body=body),
            client.completions.create(**asked, extra_body=body, stream=True),
        )
        chunks = [chunk.choices[0] async for chunk in stream]
        await back_to_the_start(engine, server)
    choice = whole.choices[0]
    assert expected.logprobs is not None
    logprobs = [entry.logprob for entry in expected.logprobs]
    for ids, text, values in (
        (choice.model_extra["token_ids"], choice.text, choice.logprobs.token_logprobs),
        (
            [token for chunk in chunks for token in chunk.model_extra.get("token_ids", ())],
            "".join(chunk.text for chunk in chunks),
            [value for chunk in chunks if chunk.logprobs for value in chunk.logprobs.token_logprobs],
        ),
    ):
        assert (tuple(ids), text) == (expected.token_ids, expected.text)
        assert values == pytest.approx(logprobs, abs=1e-5)
    assert "".join(choice.logprobs.tokens) == expected.text
    assert choice.logprobs.text_offset == [
        len("".join(choice.logprobs.tokens[:index])) for index in range(len(choice.logprobs.tokens))
    ]
    assert whole.usage.completion_tokens == expected.usage.completion_tokens


async def test_the_first_chat_of_a_server_finds_its_renderer_running(engine: "Engine") -> None:
    template = engine.tokenizer._chat_template
    assert template is not None
    template._renderer._end()  # of earlier tests
    async with openai_serving(lent(engine)) as (_, client):
        process = template._renderer.process
        assert process is not None and process.poll() is None
        await client.chat.completions.create(model=engine.model_name, messages=CHAT, max_tokens=1)
        assert template._renderer.process is process


async def test_a_chat_stops_where_the_engine_stops_and_counts_the_same(engine: "Engine") -> None:
    fields = {"temperature": 0.0, "max_tokens": 40, "stop": [","]}
    (expected,) = await asyncio.to_thread(engine.generate, [{"messages": CHAT}], **fields)
    async with openai_serving(lent(engine)) as (_, client):
        answer = await client.chat.completions.create(model=engine.model_name, messages=CHAT, **fields)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == expected.usage.completion_tokens


async def test_several_choices_of_one_prompt_are_those_of_the_seed_in_a_stream_too(engine: "Engine") -> None:
    asked = {"model": engine.model_name, "messages": CHAT, "n": 3, "seed": 5, "max_tokens": 8, "temperature": 1.0}
    async with openai_serving(lent(engine)) as (_, client):
        whole = await client.chat.completions.create(**asked)
        texts, prompt_tokens = ["", "", ""], 0
        stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
            prompt_tokens = chunk.usage.prompt_tokens if chunk.usage else prompt_tokens
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1
    assert prompt_tokens == whole.usage.prompt_tokens  # counted once


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "hex": {"enum": ["#ff0000", "#00ff00"]}},
    "required": ["name", "hex"],
    "additionalProperties": False,
}


async def test_a_response_format_holds_the_text_to_it_in_a_stream_too(engine: "Engine") -> None:
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA, "strict": True}}
    asked = {"model": engine.model_name, "messages": CHAT, "max_tokens": 200, "seed": 3}
    async with openai_serving(lent(engine)) as (_, client):
        whole = await client.chat.completions.create(**asked, response_format=form)
        stream = await client.chat.completions.create(**asked, response_format=form, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        chosen = await client.completions.create(
            model=engine.model_name, prompt="The answer is", extra_body={"choice": ["yes", "no"]}
        )
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
            bad = {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}},
            }
            await client.chat.completions.create(**asked, response_format=bad)
    assert whole.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(whole.choices[0].message.content), SCHEMA)
    assert text == whole.choices[0].message.content
    assert chosen.choices[0].text in ("yes", "no")
    assert refused.value.param == "response_format"


async def test_a_forced_call_is_one_of_the_tools_with_arguments_of_its_schema(engine: "Engine") -> None:
    tools = [
        {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "stop", "parameters": {"type": "object"}}},
    ]
    with pytest.MonkeyPatch.context() as patch:
        # SmolLM2's own template has no tools; what it would be told of them is not the point here.
        patch.setattr(type(engine.tokenizer), "chat_template", "{{ tools }}<tool_call>")
        async with openai_serving(lent(engine)) as (_, client):
            asked = {
                "model": engine.model_name,
                "messages": CHAT,
                "tools": tools,
                "tool_choice": {"type": "function", "function": {"name": "paint"}},
                "max_tokens": 200,
                "seed": 4,
            }
            answer = await client.chat.completions.create(**asked)
            chunks = [chunk.choices[0] async for chunk in await client.chat.completions.create(**asked, stream=True)]
    choice = answer.choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, "paint")
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    (streamed,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert (streamed.function.name, streamed.function.arguments) == ("paint", call.function.arguments)
    assert (chunks[-1].finish_reason, streamed.index) == ("tool_calls", 0)


ENDS_VALUES = {"109": 12, "6150": 12, "23597": 12, "17859": 12}
"""A bias on what has a closing brace: a small model may find no end."""


@pytest.mark.parametrize(
    ("parameters", "valid"),
    [
        (None, {"type": "object"}),
        ({}, {"type": "object"}),
        ({"properties": {"a": {"type": "boolean"}}, "additionalProperties": False}, {"type": "object"}),
        ({"$ref": "#/$defs/Tree", "$defs": {"Tree": {"properties": {"t": {"$ref": "#/$defs/Leaf"}}}, "Leaf": {}}}, {}),
    ],
)
async def test_a_forced_call_is_a_call_whatever_its_schema_leaves_out(
    engine: "Engine", parameters: object, valid: dict[str, object]
) -> None:
    """And each function's references are to its own definitions."""
    same_name = {name: {"$ref": "#/$defs/Tin", "$defs": {"Tin": {"const": {name: 1}}}} for name in ("g", "h")}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in {"f": parameters, **same_name}.items()
    ]
    asked = {"model": engine.model_name, "messages": CHAT, "max_tokens": 40, "tools": tools, "temperature": 2.0}
    asked |= {"n": 6, "seed": 1, "logit_bias": ENDS_VALUES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.tokenizer), "chat_template", "{{ tools }}<tool_call>")
        async with openai_serving(lent(engine)) as (_, client):
            one = {"tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": False}
            answers = await asyncio.gather(
                client.chat.completions.create(**asked, **one),
                client.chat.completions.create(**asked, tool_choice="required"),
            )
    called = Counter[str]()
    for choice in (choice for answer in answers for choice in answer.choices):
        if choice.finish_reason == "length":
            continue
        (call,) = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)
        called[call.function.name] += 1
        jsonschema.validate(arguments, valid if call.function.name == "f" else {"const": {call.function.name: 1}})
    assert called["f"] and called["g"] + called["h"], called


async def test_a_prompt_too_long_among_several_lets_none_of_them_begin(engine: "Engine") -> None:
    async with openai_serving(lent(engine)) as (server, client):
        before = engine.loads()
        with pytest.raises(openai.BadRequestError, match="limit"):
            await client.completions.create(model=engine.model_name, prompt=["hello", "again " * 4000])
        with pytest.raises(openai.BadRequestError, match="sequences are asked for at once"):
            await client.completions.create(model=engine.model_name, prompt=["hello"] * 100, n=8)
        await back_to_the_start(engine, server)
        assert engine.loads() == before
        answer = await client.completions.create(
            model=engine.model_name, prompt="The sea", extra_body={"ignore_eos": True, "timeout": 1.5}
        )
        assert answer.choices[0].finish_reason in ("deadline", "length")


class Tin(BaseModel):
    """What paint comes in."""

    litres: Literal[1, 5]


class Paint(BaseModel):
    """Paint a thing."""

    tin: Tin
    colour: Literal["red", "green", "blue"]
    coats: Annotated[int, Field(ge=1, le=3)]
    gloss: bool | None
    then: list[Literal["sand", "wax"]] = Field(max_length=2)


async def test_what_the_client_parses_into_classes_is_held_to_them(engine: "Engine") -> None:
    asked = {"model": engine.model_name, "messages": CHAT, "max_tokens": 120, "temperature": 1.0}
    tools = [openai.pydantic_function_tool(Paint, name="paint")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.tokenizer), "chat_template", "{{ tools }}<tool_call>")
        async with openai_serving(lent(engine)) as (_, client):
            whole = asyncio.gather(
                client.chat.completions.parse(**asked, response_format=Paint, n=3, seed=1),
                client.chat.completions.parse(**asked, tools=tools, tool_choice="required", seed=2),
            )
            async with client.chat.completions.stream(**asked, tools=tools, tool_choice="required", seed=2) as stream:
                streamed = await stream.get_final_completion()
            said, called = await whole
    assert all(isinstance(choice.message.parsed, Paint) for choice in said.choices) and len(said.choices) == 3
    for answer in (called, streamed):
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls"
        assert isinstance(call.function.parsed_arguments, Paint)
    assert streamed.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


async def test_nobody_waits_for_the_compiler_but_who_has_a_constraint(
    engine: "Engine", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited_process, "_PATIENCE", 600.0)
    engine.generate([{"prompt": "a", "regex": "b", "max_tokens": 1}])  # starts it
    compiler = engine._admission.constraints._process.process.pid
    async with http_serving(lent(engine)) as (server, address), openai_client(address) as client:

        async def chat(**fields: object) -> str:
            answer = await client.chat.completions.create(
                model=engine.model_name, messages=CHAT, max_tokens=20, extra_body=fields
            )
            return answer.choices[0].message.content

        os.kill(compiler, signal.SIGSTOP)
        try:
            held = [asyncio.create_task(chat(choice=[f"a choice {number}"])) for number in range(20)]
            async with asyncio.timeout(PATIENCE):
                while len(server.calls) < len(held):
                    await asyncio.sleep(0.01)
            free = await asyncio.gather(*(chat() for _ in range(10)))
            assert all(free) and not any(task.done() for task in held)
        finally:
            os.kill(compiler, signal.SIGCONT)
        assert await asyncio.gather(*held) == [f"a choice {number}" for number in range(20)]


async def test_a_closed_connection_frees_the_pages_within_two_steps(engine: "Engine") -> None:
    async with openai_serving(lent(engine)) as (server, client):
        stream = await client.completions.create(
            model=engine.model_name, prompt="The sea was", stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        seen_at = asyncio.get_running_loop().create_future()
        (call,) = server.calls._calls
        assert call.stream is not None
        cancel = call.stream.cancel

        def cancelled() -> None:
            if not seen_at.done():
                seen_at.set_result(engine.loads().steps)
            cancel()

        call.stream.cancel = cancelled  # pyright: ignore[reportAttributeAccessIssue]
        await stream.close()
        steps = await seen_at
        await back_to_the_start(engine, server)
        assert engine.loads().steps - steps <= 2
