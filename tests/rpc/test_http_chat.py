"""`/v1/chat/completions` with the openai package's client."""

import json
from types import SimpleNamespace

import openai
import pytest
from http_serving import openai_serving
from scripted_engine import ByteTokenizer, ScriptedEngine

from jaxserve.events import Delta, Finished, FinishReason, Timings, Usage
from jaxserve.request_errors import InvalidRequest
from rpc.http.chat import ChatAnswer
from rpc.http.schema import Asked, Fields
from rpc.http.tools import ToolCallReader, ToolSyntax, parse_tools, syntax_of

USER = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]
HERMES_TEMPLATE = "{% if tools %}{{ tools | tojson }} Answer <tool_call>{...}</tool_call>{% endif %}"


@pytest.mark.asyncio
async def test_a_chat_has_a_message_reason_and_usage() -> None:
    async with openai_serving(ScriptedEngine()) as (_, client):
        answer = await client.chat.completions.create(model="scripted", messages=USER, max_completion_tokens=5)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "abcde", "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 5)
    assert answer.id.startswith("chatcmpl-")


@pytest.mark.asyncio
async def test_a_stream_of_a_chat_gives_the_role_the_text_the_reason_and_the_usage() -> None:
    async with openai_serving(ScriptedEngine()) as (_, client):
        stream = await client.chat.completions.create(
            model="scripted", messages=USER, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "abcdefghijklmnopqrstuvwxyzabcd"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30


@pytest.mark.asyncio
async def test_logprobs_of_a_chat_have_bytes_and_alternatives() -> None:
    async with openai_serving(ScriptedEngine()) as (_, client):
        asked = {"model": "scripted", "messages": USER, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
        whole = (await client.chat.completions.create(**asked)).choices[0].logprobs
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
    assert whole is not None and whole.content is not None
    assert [(entry.token, entry.logprob, entry.bytes) for entry in whole.content] == [
        ("a", -0.5, [97]),
        ("b", -0.5, [98]),
        ("c", -0.5, [99]),
    ]
    assert [top.logprob for top in whole.content[0].top_logprobs] == [-0.5, -1.5]
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry.token for part in parts if part is not None for entry in part.content or ()] == ["a", "b", "c"]


@pytest.mark.asyncio
async def test_messages_may_have_parts_and_calls_of_before_and_bad_ones_are_named() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    good = [
        {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    bad = [
        [],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}]}],
        [{"role": "user", "content": "x", "audio": {"id": "a"}}],
        [{"content": "x"}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "no json"}}]}],
        [{"role": "nobody", "content": "x"}],
        "hello",
    ]
    async with openai_serving(ScriptedEngine()) as (_, client):
        answer = await client.chat.completions.create(model="scripted", messages=good, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len("<user>hello there<assistant><tool>sunny")
        for messages in bad:
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model="scripted", messages=messages)
            assert refused.value.param == "messages"


@pytest.mark.asyncio
async def test_what_cannot_be_had_is_refused_by_name_and_what_changes_nothing_is_taken() -> None:
    refused = {
        "tools": (TOOLS, {"name": "f"}, [{"type": "retrieval"}], [{"type": "function", "function": {"name": "a b"}}]),
        "tool_choice": ("required", {"type": "function", "function": {"name": "weather"}}),
        "response_format": ({"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}}),
        "parallel_tool_calls": ("no",),
        "top_logprobs": (3,),
        "max_completion_tokens": (5,),  # beside max_tokens
        "store": (True,),
        "prediction": ({"type": "content", "content": "x"},),
        "stream_options": ({"include_usage": True},),
        "functions": ([{"name": "f"}],),
    }
    async with openai_serving(ScriptedEngine()) as (_, client):
        for name, values in refused.items():
            for value in values:
                body = {"max_tokens": 4, name: value}
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.chat.completions.create(model="scripted", messages=USER, extra_body=body)
                assert caught.value.param == name
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
        with pytest.raises(openai.BadRequestError, match="json_schema is set as well") as caught:
            body = {"response_format": form, "json_schema": {"type": "string"}}
            await client.chat.completions.create(model="scripted", messages=USER, extra_body=body)
        assert caught.value.param == "response_format"
        for name, value in (("max_completion_tokens", 0), ("max_completion_tokens", 2**31), ("top_logprobs", 21)):
            body = {name: value, "logprobs": True}
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(model="scripted", messages=USER, extra_body=body)
            assert (caught.value.param, name in caught.value.message) == (name, True)
        neutral = {
            "user": "me",
            "json_object": False,
            "store": False,
            "metadata": {"a": "b"},
            "service_tier": "auto",
            "tools": [],
        }
        body = {**neutral, "max_tokens": 2, "parallel_tool_calls": True, "stop": None, "logit_bias": {"97": 1}}
        answer = await client.chat.completions.create(model="scripted", messages=USER, extra_body=body)
        assert answer.choices[0].message.content == "ab"


def test_a_model_whose_calls_are_of_an_unknown_form_may_be_forced_to_one() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for template, choice in (("{{ tools }}", "auto"), ("{{ messages }}", "auto"), ("{{ messages }}", "required")):
        with pytest.raises(InvalidRequest) as caught:
            parse_tools(Fields({"tools": tools, "tool_choice": choice}), template)
        assert caught.value.field == "tools"
    assert parse_tools(Fields({"tools": tools, "tool_choice": "required"}), "{{ tools }}").forced is not None


@pytest.mark.asyncio
async def test_a_forced_call_must_be_of_a_tool_that_is_offered() -> None:
    engine = ScriptedEngine()
    engine.tokenizer.chat_template = HERMES_TEMPLATE
    async with openai_serving(engine) as (_, client):
        for choice in ("always", {"type": "function", "function": {"name": "other"}}, {"type": "custom"}, 3):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(
                    model="scripted", messages=USER, tools=TOOLS, tool_choice=choice, max_tokens=3
                )
            assert caught.value.param == "tool_choice"
        for parameters in ({"type": "string"}, {"type": ["array", "null"]}, [], False):
            tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
            with pytest.raises(
                openai.BadRequestError, match="parameters must be the JSON schema of an object"
            ) as caught:
                await client.chat.completions.create(
                    model="scripted",
                    messages=USER,
                    tools=[tool],  # pyright: ignore[reportArgumentType]
                    max_tokens=3,
                )
            assert caught.value.param == "tools"


@pytest.mark.asyncio
async def test_tools_are_taken_where_the_template_has_them() -> None:
    engine = ScriptedEngine()
    engine.tokenizer.chat_template = HERMES_TEMPLATE
    async with openai_serving(engine) as (_, client):
        answer = await client.chat.completions.create(model="scripted", messages=USER, tools=TOOLS, max_tokens=3)
    # What is no call is text.
    assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == ("abc", None)


CALL = '{"name": "weather", "arguments": {"city": "Bern"}}'
SAYINGS = [
    (ToolSyntax.HERMES, f"Let me see.<tool_call>\n{CALL}\n</tool_call>", "Let me see.", 1),
    (ToolSyntax.HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", 2),
    (ToolSyntax.HERMES, f"<tool_call>{CALL}", "", 1),
    (ToolSyntax.HERMES, "1 < 2 <tool", "1 < 2 <tool", 0),
    (ToolSyntax.HERMES, "<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", 0),
    (ToolSyntax.MISTRAL, f"[TOOL_CALLS][{CALL}]", "", 1),
    (ToolSyntax.MISTRAL, f" [{CALL}, {CALL}]", "", 2),
    (ToolSyntax.MISTRAL, "[sic] it is", "[sic] it is", 0),
    (ToolSyntax.LLAMA, CALL.replace("arguments", "parameters"), "", 1),
    (ToolSyntax.LLAMA, "It is {sunny}", "It is {sunny}", 0),
    (ToolSyntax.FORCED, CALL, "", 1),
    (ToolSyntax.FORCED, CALL[:-5], CALL[:-5], 0),
]


def answered(syntax: ToolSyntax, text: str, stream: bool, size: int, one_call: bool = False) -> tuple[str, list, str]:
    """Content, calls and reason of an answer to which the model said a text, given in pieces of a size."""
    request = SimpleNamespace(sampling=SimpleNamespace(n=1), output=SimpleNamespace(logprobs=None))
    asked = Asked((request,), stream, False, False, None, syntax, one_call)  # pyright: ignore[reportArgumentType]
    answer = ChatAnswer(asked, "id", "model", ByteTokenizer())
    finished = Finished("id", 0, FinishReason.STOP, Usage(1, 0, 1), Timings(0, 0, 0, 0))
    deltas = [Delta("id", text=text[start : start + size]) for start in range(0, len(text), size)]
    if not stream:
        for delta in deltas:
            answer.add_delta(0, delta)
        answer.add_finished(0, finished)
        choice = json.loads(answer.whole())["choices"][0]
        message = choice["message"]
        return message["content"] or "", message.get("tool_calls", []), choice["finish_reason"]
    data = b"".join(answer.delta_chunk(0, delta) for delta in deltas) + answer.finished_chunk(0, finished)
    chunks = [json.loads(line.removeprefix(b"data: "))["choices"][0] for line in data.split(b"\n\n") if line]
    content = "".join(chunk["delta"].get("content", "") for chunk in chunks)
    calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    assert [call.pop("index") for call in calls] == list(range(len(calls)))
    return content, calls, chunks[-1]["finish_reason"]


@pytest.mark.parametrize(("syntax", "text", "content", "count"), SAYINGS)
@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_told_from_text_however_it_comes(
    syntax: ToolSyntax, text: str, content: str, count: int, size: int, stream: bool
) -> None:
    said, calls, reason = answered(syntax, text, stream, size)
    assert said.strip() == content
    assert [(call["type"], call["function"]["name"]) for call in calls] == [("function", "weather")] * count
    assert all(json.loads(call["function"]["arguments"]) == {"city": "Bern"} for call in calls)
    assert len({call["id"] for call in calls}) == count
    assert reason == ("tool_calls" if count else "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_of_several_calls_that_were_not_wanted_at_once_the_first_is_told(stream: bool) -> None:
    text = SAYINGS[1][1]
    _, calls, reason = answered(ToolSyntax.HERMES, text, stream, 7, one_call=True)
    assert len(calls) == 1 and reason == "tool_calls"


def test_text_that_cannot_be_a_call_is_shown_at_once() -> None:
    reader = ToolCallReader(ToolSyntax.HERMES)
    assert [reader.push(piece) for piece in ("Hello", " <", "b>", "<tool")] == ["Hello", " ", "<b>", ""]


def test_the_form_of_calls_is_read_from_the_template() -> None:
    assert syntax_of(HERMES_TEMPLATE) is ToolSyntax.HERMES
    assert syntax_of("{% if tools is not none %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") is ToolSyntax.MISTRAL
    assert syntax_of('{% for tool in tools %}{"name": ..., "parameters": ...}{% endfor %}') is ToolSyntax.LLAMA
    for template in (None, "{{ messages }}", "{{ tools }}", "<tool_call>"):
        assert syntax_of(template) is None
    for other in (
        "<tool_call>\\n<function=example_function_name>",  # Qwen3-Coder
        "<tool_call>{function-name}\\n<arg_key>{arg-key-1}</arg_key>",  # GLM-4.5
        "'[TOOL_CALLS]' + tool['function']['name'] + '[ARGS]' + arguments",  # Devstral
    ):
        assert syntax_of("{{ tools }}" + other) is None
