"""Structured output: whatever the model would rather say, its text matches the constraint, as others judge it."""

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from random_schemas import SchemaMaker

from jaxserve.constraints import token_masks
from jaxserve.engine import Engine
from jaxserve.events import Completion
from jaxserve.request import Constraint, Request
from jaxserve.request_errors import InvalidRequest

PROMPT = {"messages": [{"role": "user", "content": "Answer shortly: describe a thing you like."}]}
ENDLESS = 10
"""Every tenth schema lets a text go on for ever."""
WHOLE, CUT = 500, 80
"""Tokens of an output: more than any value of a schema that bounds it needs, and enough where none does."""
CLOSERS, CLOSING_BIAS = ('"', "null", " null"), 10.0
CHECKER = Draft202012Validator.FORMAT_CHECKER


@CHECKER.checks("date-time", ValueError)
def is_date_time(value: object) -> bool:
    """As RFC 3339 has it: `t` and `z` may be small, and a minute may have a leap second."""
    return not isinstance(value, str) or bool(datetime.fromisoformat(value.upper().replace(":60", ":59")))


def generate(engine: Engine, requests: list[dict]) -> list[Completion]:
    return engine.generate([{**PROMPT, "temperature": 0.0, **request} for request in requests])


def test_results_of_random_schemas_are_valid(engine: Engine, request: pytest.FixtureRequest):
    count = request.config.getoption("--schemas")
    assert isinstance(count, int)
    numbers = range(count)
    schemas = [SchemaMaker(number, endless=number % ENDLESS == 0).make() for number in numbers]
    validators = [Draft202012Validator(schema, format_checker=CHECKER) for schema in schemas]
    asked = [
        {
            "json_schema": schemas[number],
            "temperature": number % 3 / 2,
            "seed": number,
            "max_tokens": CUT if number % ENDLESS == 0 else WHOLE,
        }
        for number in numbers
    ]
    cut = []
    for number, completion in zip(numbers, generate(engine, asked), strict=True):
        if number % ENDLESS == 0 and completion.finish_reason == "length":
            assert completion.usage.completion_tokens == CUT
            cut.append(number)
        else:
            assert completion.finish_reason == "stop", (number, completion)
            validators[number].validate(json.loads(completion.text))
    # A small model may not find the end of what has none; a user's means is to favour what ends it.
    ends = {*engine.model_config.eos_ids, *(id for text in CLOSERS for id in engine.tokenizer.encode(text))}
    favour = {"logit_bias": dict.fromkeys(ends, CLOSING_BIAS), "frequency_penalty": 1.0, "max_tokens": WHOLE}
    again = [{**asked[number], **favour} for number in cut]
    for number, completion in zip(cut, generate(engine, again), strict=True):
        assert completion.finish_reason == "stop", (number, completion)
        validators[number].validate(json.loads(completion.text))
    print(f"{len(schemas)} schemas, all results whole and valid; {len(cut)} went on for ever and were asked for again")
    assert engine.loads().compiles_after_warmup == 0


REGEXES = (
    r"[A-Z][a-z]{3,9} \d{4}",
    r"(\+\d{1,3} )?\d{3}-\d{4}",
    r"(?:the|a) (red|green|blue) [a-z]{1,12}( (and|or) [a-z]{1,12}){0,2}\.",
    r"[\u0430-\u044f]{3,6}!",
    r'"[^"\n]{1,30}"/x',
    r"-?(0|[1-9]\d{0,4})(\.\d{1,3})?",
    r"^line one\nline (two|three)$",
)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_results_of_regular_expressions_match_from_end_to_end(engine: Engine, temperature: float):
    asked = [{"regex": regex, "temperature": temperature, "seed": 1, "max_tokens": 60} for regex in REGEXES]
    for regex, completion in zip(REGEXES, generate(engine, asked), strict=True):
        assert completion.finish_reason == "stop"
        assert re.fullmatch(regex, completion.text), (regex, completion.text)


CHOICES = (
    "yes",
    "no",
    "yes please",
    'a "quoted" \\ one',
    "line\nfeed\ttab",
    "héllo 日本 \U0001f600",
    " space",
    "nothing",
)


def test_a_choice_is_one_of_the_choices_and_each_can_be_chosen(engine: Engine):
    asked = [{"choice": CHOICES, "temperature": 5.0, "seed": seed} for seed in range(24)]
    asked += [{"choice": [choice], "min_tokens": 100} for choice in CHOICES]
    texts = [completion.text for completion in generate(engine, asked)]
    assert set(texts[:24]) <= set(CHOICES) and len(set(texts[:24])) > 3
    assert tuple(texts[24:]) == CHOICES


def test_a_json_object_and_a_grammar_of_ones_own(engine: Engine):
    nested = 'start: "(" start ")" | WORD\nWORD: /[a-z]{1,8}/\n'
    json_object, grammar = generate(
        engine,
        [
            {"json_object": True, "temperature": 0.7, "seed": 5, "max_tokens": 300},
            {"grammar": nested, "max_tokens": 40},
        ],
    )
    assert json_object.finish_reason == "length" or isinstance(json.loads(json_object.text), dict)
    assert re.fullmatch(r"\(*[a-z]{0,8}\)*", grammar.text)


def test_where_nothing_may_follow_the_output_stops_and_where_it_is_cut_it_says_length(engine: Engine):
    digits, cut, longest, accepted, schema = generate(
        engine,
        [
            {"regex": "[0-9]{3}", "max_tokens": 3, "min_tokens": 3},
            {"regex": "[0-9]{5}", "max_tokens": 3},
            {"regex": "(ab){1,4}", "ignore_eos": True, "max_tokens": 50},
            {"regex": "a*", "logit_bias": {2: 100.0}, "max_tokens": 50},
            {"json_schema": {"const": 7}, "max_tokens": 1},
        ],
    )
    assert (digits.finish_reason, digits.matched_stop, digits.usage.completion_tokens) == ("stop", None, 3)
    assert (cut.finish_reason, len(cut.text)) == ("length", 3)
    assert (longest.finish_reason, longest.text) == ("stop", "abababab")
    assert (accepted.finish_reason, accepted.matched_stop) == ("stop", 2), "the model ends where it may"
    assert (schema.finish_reason, schema.text) == ("stop", "7")


def test_a_constraint_goes_with_everything_else(engine: Engine):
    plain, reported, stopped, biased, early = generate(
        engine,
        [
            {"regex": "[ab]{12}"},
            {"regex": "[ab]{12}", "logprobs": 3},
            {"regex": "[ab]{12}", "stop": ["ab"], "include_stop": True},
            {"regex": "[ab]{12}", "logit_bias": {81: -100.0}, "presence_penalty": 2.0, "temperature": 0.5, "seed": 1},
            {"regex": "[0-9]{3}", "stop_token_ids": list(range(32, 38)), "min_tokens": 2, "max_tokens": 9},
        ],
    )
    assert reported.token_ids == plain.token_ids
    assert [entry.token_id for entry in reported.logprobs or ()] == list(plain.token_ids)
    likeliest = [entry.top[0][1] >= entry.logprob for entry in reported.logprobs or ()]
    assert all(likeliest), "log-probabilities are of the model's own distribution"
    assert stopped.text == (plain.text.partition("ab")[0] + "ab" if "ab" in plain.text else plain.text)
    assert re.fullmatch("[ab]{12}", biased.text) and 81 not in biased.token_ids
    assert early.finish_reason == "stop" and re.fullmatch("[0-9]{0,3}", early.text)


def test_several_sequences_of_a_prompt_each_hold_to_the_constraint(engine: Engine):
    (completion,) = generate(engine, [{"regex": "[a-z]{3} [a-z]{4}", "n": 4, "temperature": 1.5, "seed": 2}])
    texts = [output.text for output in completion.outputs]
    assert len(texts) == 4 and all(re.fullmatch("[a-z]{3} [a-z]{4}", text) for text in texts) and len(set(texts)) > 1


KINDS = (
    {"json_object": True},
    {"json_schema": {"type": "array", "items": {"enum": ["ab", 12, None]}, "minItems": 2, "maxItems": 4}},
    {"choice": ["a b", "a c", "b"]},
    {"regex": "(ab |cd ){2,6}e"},
    {"grammar": 'start: "(" start ")" | /[a-z]{1,8}/'},
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: next(iter(kind)))
def test_every_kind_goes_with_what_else_a_request_may_ask_for(engine: Engine, kind: dict):
    common = {**kind, "temperature": 1.0, "seed": 3, "max_tokens": 40}
    plain, several, reported, long, stopped = generate(
        engine,
        [
            common,
            {**common, "n": 3},
            {**common, "logprobs": 2},
            {**common, "min_tokens": 5},
            {**common, "stop": ["a", "1"]},
        ],
    )
    assert several.outputs[0].text == reported.text == plain.text
    assert [entry.token_id for entry in reported.logprobs or ()] == list(plain.token_ids)
    assert stopped.text == re.split("[a1]", plain.text)[0]
    for output in (*several.outputs, *long.outputs):
        assert output.finish_reason == "length" or _matches(kind, output.text), output


def _matches(kind: dict, text: str) -> bool:
    match kind:
        case {"choice": choices}:
            return text in choices
        case {"regex": regex}:
            return re.fullmatch(regex, text) is not None
        case {"grammar": _}:
            opened = len(text) - len(text.lstrip("("))
            return re.fullmatch(f"[(]{{{opened}}}[a-z]{{1,8}}[)]{{{opened}}}", text) is not None
        case {"json_schema": schema}:
            return Draft202012Validator(schema).is_valid(json.loads(text))
    return isinstance(json.loads(text), dict)


REFUSED = (
    ({"regex": "("}, "regex", "unclosed group"),
    ({"regex": r"(?=a)b"}, "regex", "look-around"),
    ({"regex": r"(a)\1"}, "regex", "backreferences"),
    ({"regex": r"[^\s\S]"}, "regex", "no output matches"),
    ({"regex": "a" * 70_000}, "regex", "limit 65536"),
    ({"regex": ""}, "regex", "not empty"),
    ({"regex": 3}, "regex", "text"),
    ({"grammar": "begin: 'a'"}, "grammar", "lexer error"),
    ({"grammar": "start: missing"}, "grammar", "missing"),
    ({"grammar": "start: " + "(" * 50_000}, "grammar", "nested"),
    ({"grammar": 'start: %json {"not": {}, "x-guidance": {"lenient": true}}'}, "grammar", "not"),
    ({"choice": []}, "choice", "1 to 1024"),
    ({"choice": ["a", ""]}, "choice", "not empty"),
    ({"choice": "yes"}, "choice", "list"),
    ({"choice": ["\udc80"]}, "choice", "Unicode"),
    ({"json_object": 1}, "json_object", "true or false"),
    ({"json_schema": "{"}, "json_schema", "not JSON"),
    ({"json_schema": "[" * 20_000}, "json_schema", "nested"),
    ({"json_schema": [1]}, "json_schema", "must be"),
    ({"json_schema": {"type": "strin"}}, "json_schema", "strin"),
    ({"json_schema": False}, "json_schema", "Unsatisfiable"),
    ({"json_schema": {"items": {"not": {}}}}, "json_schema", r"'not' at \$\.items"),
    ({"json_schema": {"properties": {"a": {"nullable": True}}}}, "json_schema", r"'nullable' at \$\.properties\.a"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema", "uniqueItems"),
    ({"json_schema": {"x-guidance": {"lenient": True}}}, "json_schema", "x-guidance"),
    ({"json_schema": {"type": "string", "format": "color"}}, "json_schema", "color"),
    ({"json_schema": {"type": "object", "minProperties": 3}}, "json_schema", "minProperties"),
    ({"json_schema": {"minimum": 3, "exclusiveMinimum": True}}, "json_schema", "exclusiveMinimum"),
    ({"json_schema": {"$ref": "https://example.com/schema"}}, "json_schema", "example.com"),
    ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "json_schema", "greater than maximum"),
    ({"json_schema": {"a": float("nan")}}, "json_schema", "not JSON"),
    ({"regex": "a", "choice": ["a"]}, "constraint", "regex and choice are set"),
)


def test_what_cannot_be_held_to_is_refused_with_the_field_and_the_reason(engine: Engine):
    steps = engine.loads().steps
    for fields, field, reason in REFUSED:
        with pytest.raises(InvalidRequest, match=reason) as caught:
            engine.submit(Request.from_json({**PROMPT, **fields}))
        assert caught.value.field == field, fields
    with pytest.raises(InvalidRequest, match="none is set"):
        engine.submit(Request(prompt="a", constraint=Constraint()))
    assert engine.loads().steps == steps


def test_schemas_that_explode_are_refused_in_bounded_time_and_the_next_is_compiled():
    parts = [
        {
            "anyOf": [
                {"type": "object", "properties": {f"{i}.{j}": {"const": j}}, "required": [f"{i}.{j}"]} for j in range(9)
            ]
        }
        for i in range(9)
    ]
    with Engine(model="smollm2-135m", dtype="float32", slots=2, max_context=64, constraint_cpu_seconds=0.01) as small:
        with pytest.raises(InvalidRequest, match=r"0\.01 s of processor time|too large"):
            small.generate([{"prompt": "a", "json_schema": {"allOf": parts}}])
        with pytest.raises(InvalidRequest, match=r"0\.01 s of processor time|fuel"):
            both = "start: BOTH\nBOTH: /(.*a.{18}b.*)/ & /(.*c.{17}d.*)/ & ~/(.*e.{15}f.*)/"
            small.generate([{"prompt": "a", "grammar": both}])
        assert [c.text for c in small.generate([{"prompt": "a", "choice": ["yes"]}])] == ["yes"]


def test_a_request_whose_masks_take_too_long_ends_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_masks, "MASK_SECONDS", -1.0)
    slow, plain = generate(engine, [{"regex": "[ab]{30}"}, {"max_tokens": 8}])
    assert slow.finish_reason == "error" and "too complex" in (slow.error or "")
    assert plain.finish_reason == "length" and plain.error is None
    assert engine.is_healthy
    assert engine.loads().available_pages == engine.loads().total_pages


def test_threads_that_outlive_the_main_one_go_on_with_constraints():
    """Once it has ended Python's pools take nothing more, and no thread is started."""
    model = Path(__file__).parents[1] / "fixtures" / "families" / "smollm2"
    program = f"""
import threading
from jaxserve import Engine

def ask():
    threading.main_thread().join()
    print(*(one.finish_reason for one in engine.generate(["a", "b"], choice=["yes", "no"])))

engine = Engine(model={str(model)!r}, slots=2, max_context=64)
threading.Thread(target=ask).start()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["stop", "stop"], done.stderr


def test_without_threads_for_the_masks_outputs_are_what_they_are_with_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    def refuse() -> None:
        raise ValueError("Resource temporarily unavailable (os error 11)")

    requests = [{"regex": regex, "max_tokens": 12} for regex in REGEXES]
    expected = [completion.token_ids for completion in generate(engine, requests)]
    masks = engine._core._loop._masks
    with monkeypatch.context() as scarce:
        scarce.delitem(masks.__dict__, "_executor")
        scarce.setattr("llguidance.LLExecutor", refuse)
        assert [completion.token_ids for completion in generate(engine, requests)] == expected
        assert engine.is_healthy
