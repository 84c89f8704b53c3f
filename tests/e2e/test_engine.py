"""The engine with SmolLM2 in float32: exact against an independent implementation, and whatever the neighbours."""

import asyncio
import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from engine_at_rest import all_pages_are_back

from jaxserve.core.messages import Abort, Message, Submit
from jaxserve.engine import Engine
from jaxserve.events import Delta, Finished, Started
from jaxserve.front.completion import collect
from jaxserve.request import Constraint, OutputParams, Request, SamplingParams, StoppingParams
from jaxserve.request_errors import DuplicateRequestId, InvalidRequest, ModelNotFound, QueueFull

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "smollm2_greedy.json").read_text())["prompts"]
GREEDY = SamplingParams(temperature=0.0)
TIE = 1e-3
"""Where the two best logits lie closer than this, either may win."""


def without_eos(tokens: int, **fields) -> dict:
    """Stopping that leaves the end-of-sequence ids out, as the reference does."""
    return {"stopping": StoppingParams(max_tokens=tokens, min_tokens=tokens), "sampling": GREEDY, **fields}


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    random_ = random.Random(seed)
    return tuple(random_.randrange(17, 49152) for _ in range(length))


def test_greedy_tokens_and_logprobs_equal_transformers(engine: Engine):
    requests = [
        Request(
            token_ids=tuple(case["token_ids"]),
            output=OutputParams(logprobs=0),
            **without_eos(len(case["generated_ids"])),
        )
        for case in REFERENCE
    ]
    ties, compared, worst = 0, 0, 0.0
    for case, completion in zip(REFERENCE, engine.generate(requests), strict=True):
        for index, (got, want) in enumerate(zip(completion.token_ids, case["generated_ids"], strict=True)):
            if got != want:
                assert case["gaps"][index] < TIE, f"token {index} of a prompt of {len(case['prompt_ids'])}"
                ties += 1
                break  # what follows a tie that broke the other way is another text
            assert completion.logprobs is not None
            worst = max(worst, abs(completion.logprobs[index].logprob - case["logprobs"][index]))
            compared += 1
    print(f"{compared} tokens of {len(REFERENCE)} prompts equal, {ties} other ties, worst logprob {worst:.1e} off")
    assert worst < 1e-3
    assert len(REFERENCE) >= 20
    assert ties <= 2


def test_a_request_that_ends_sooner_gives_the_beginning_of_a_longer_one(engine: Engine):
    def asking(tokens: int) -> Request:
        return Request(token_ids=prompt(21), output=OutputParams(logprobs=1), **without_eos(tokens))

    (longest,) = engine.generate([asking(40)])
    assert longest.logprobs is not None
    for tokens, shorter in enumerate(engine.generate([asking(tokens) for tokens in range(1, 40)]), 1):
        assert shorter.token_ids == longest.token_ids[:tokens]
        assert shorter.logprobs == longest.logprobs[:tokens]


def test_2_7_and_32_requests_at_once_give_the_tokens_and_logprobs_of_each_alone(engine: Engine):
    requests = [
        Request(token_ids=prompt(5 + 11 * index, index), output=OutputParams(logprobs=1), **without_eos(12))
        for index in range(32)
    ]
    alone = [
        engine.generate([Request.from_json({"token_ids": list(request.token_ids or ()), **ALONE})])[0]
        for request in requests
    ]
    for count in (2, 7, 32):
        apart = [replace(request, request_id=f"{count}-{index}") for index, request in enumerate(requests[:count])]
        for single, batched in zip(alone, engine.generate(apart), strict=False):
            assert single.token_ids == batched.token_ids
            assert single.logprobs == batched.logprobs


ALONE = {"temperature": 0.0, "max_tokens": 12, "min_tokens": 12, "logprobs": 1, "cache_salt": "alone"}


def test_a_seeded_sample_is_the_same_in_any_company(engine: Engine):
    sampling = SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.02, seed=7, repetition_penalty=1.2)
    stopping = StoppingParams(max_tokens=16, min_tokens=16)
    request = Request(prompt="The sea was", sampling=sampling, stopping=stopping)
    (alone,) = engine.generate([request])
    crowd = [Request(token_ids=prompt(40, index), stopping=StoppingParams(max_tokens=20)) for index in range(20)]
    again = Request(prompt="The sea was", sampling=sampling, stopping=stopping, cache_salt="x")
    completions = engine.generate([*crowd[:10], again, *crowd[10:]])
    assert completions[10].token_ids == alone.token_ids
    unseeded = engine.generate([Request(prompt="The sea was", stopping=stopping) for _ in range(4)])
    assert len({completion.token_ids for completion in unseeded}) > 1


def test_deltas_arrive_in_order_and_join_to_the_text(engine: Engine):
    stream = engine.submit(Request(messages=({"role": "user", "content": "Count to five."},), **without_eos(20)))
    events = list(stream)
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    deltas = [event for event in events if isinstance(event, Delta)]
    token_ids = [token for delta in deltas for token in delta.token_ids]
    assert len(token_ids) == 20 == events[-1].usage.completion_tokens
    assert "".join(delta.text for delta in deltas) == engine.tokenizer.decode(token_ids)
    assert len(deltas) > 3


def test_async_generate_streams_and_leaving_it_aborts(engine: Engine):
    async def read_some() -> list[str]:
        texts = []
        async for delta in engine.generate("Once upon a time", max_tokens=200, temperature=0.0, ignore_eos=True):
            texts.append(delta.text)
            if len(texts) == 3:
                break
        return texts

    assert all(asyncio.run(read_some()))
    (after,) = engine.generate(["x"], max_tokens=1)
    assert after.usage.completion_tokens == 1
    assert all_pages_are_back(engine)


def test_a_short_request_is_done_before_its_neighbours_have_made_16_tokens(engine: Engine):
    long = [engine.submit(Request(token_ids=prompt(9, index), **without_eos(60))) for index in range(9)]
    short = engine.submit(Request(token_ids=prompt(9, 99), **without_eos(8)))
    made = dict.fromkeys(range(9), 0)

    def count(index: int) -> None:
        for event in long[index]:
            made[index] += len(event.token_ids) if isinstance(event, Delta) else 0

    threads = [threading.Thread(target=count, args=(index,)) for index in range(9)]
    for thread in threads:
        thread.start()
    assert len(collect(short).token_ids) == 8
    most = max(made.values())
    for thread in threads:
        thread.join()
    assert most < 16
    assert list(made.values()) == [60] * 9


def test_a_stop_string_ends_the_text_before_it_and_only_its_tokens_are_billed(engine: Engine):
    (whole,) = engine.generate([Request(prompt="1, 2, 3, 4, 5,", **without_eos(16))])
    stop = whole.text[5:7]
    stopping = StoppingParams(max_tokens=16, stop=(stop,))
    (stopped,) = engine.generate([Request(prompt="1, 2, 3, 4, 5,", sampling=GREEDY, stopping=stopping)])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.matched_stop) == ("stop", stop)
    assert stopped.usage.completion_tokens == len(stopped.token_ids) < 16


def test_a_stop_id_ends_a_sequence_and_is_billed_but_not_shown(engine: Engine):
    (whole,) = engine.generate([Request(token_ids=prompt(20, 5), **without_eos(12))])
    stop = whole.token_ids[6]
    first = whole.token_ids.index(stop)
    stopping = StoppingParams(max_tokens=12, stop_token_ids=(stop,))
    (stopped,) = engine.generate([Request(token_ids=prompt(20, 5), sampling=GREEDY, stopping=stopping)])
    assert stopped.token_ids == whole.token_ids[:first]
    assert (stopped.finish_reason, stopped.matched_stop) == ("stop", stop)
    assert stopped.usage.completion_tokens == first + 1


def test_penalties_and_bias_change_what_is_chosen(engine: Engine):
    (plain,) = engine.generate([Request(token_ids=prompt(20, 6), **without_eos(12))])
    first = plain.token_ids[0]
    banned = SamplingParams(temperature=0.0, logit_bias={first: -100.0})
    (without,) = engine.generate(
        [Request(token_ids=prompt(20, 6), sampling=banned, stopping=StoppingParams(max_tokens=12))]
    )
    assert first not in without.token_ids
    penalized = SamplingParams(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=2.0)
    (varied,) = engine.generate(
        [Request(prompt="a a a a a a a a a a", sampling=penalized, stopping=StoppingParams(max_tokens=24))]
    )
    assert len(set(varied.token_ids)) == len(varied.token_ids)


def test_logprobs_of_the_likeliest_are_sorted_and_hold_the_greedy_choice(engine: Engine):
    (completion,) = engine.generate(
        [Request(prompt="The capital of France is", output=OutputParams(logprobs=20), **without_eos(4))]
    )
    assert completion.logprobs is not None
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        values = [logprob for _, logprob in entry.top]
        assert len(values) == 20 and values == sorted(values, reverse=True)
        assert (entry.token_id, entry.logprob) == entry.top[0] == (token, values[0])


def test_an_equal_prefix_is_reported_as_cached_and_changes_nothing(engine: Engine):
    request = {"token_ids": list(prompt(100, 77)), "max_tokens": 8, "min_tokens": 8, "temperature": 0.0, "logprobs": 0}
    (first,) = engine.generate([request])
    (second,) = engine.generate([request])
    (salted,) = engine.generate([{**request, "cache_salt": "other"}])
    assert (first.usage.cached_tokens, second.usage.cached_tokens, salted.usage.cached_tokens) == (0, 96, 0)
    assert first.token_ids == second.token_ids == salted.token_ids
    assert first.logprobs == second.logprobs == salted.logprobs


BAD = [
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": float("inf")}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"presence_penalty": 3.0}, "presence_penalty"),
    ({"frequency_penalty": -3.0}, "frequency_penalty"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"seed": -1}, "seed"),
    ({"n": 10**9}, "n"),
    ({"logit_bias": {49152: 1.0}}, "logit_bias"),
    ({"logit_bias": {None: 1.0}}, "logit_bias"),
    ({"logit_bias": {1.5: 1.0}}, "logit_bias"),
    ({"logit_bias": {0: 101.0}}, "logit_bias"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"min_tokens": 2**31 - 1}, "min_tokens"),
    ({"min_tokens": 2048}, "min_tokens"),
    ({"repetition_penalty": 1e-38}, "repetition_penalty"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["\ud800"]}, "stop"),
    ({"cache_salt": "\ud800"}, "cache_salt"),
    ({"temperature": 10**400}, "temperature"),
    ({"logit_bias": {"1": -(10**400)}}, "logit_bias"),
    ({"stop_token_ids": [49152]}, "stop_token_ids"),
    ({"logprobs": 21}, "logprobs"),
    ({"nonsense": 1}, "nonsense"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "word " * 100_000}, "prompt"),
    ({"messages": [{"role": "user", "content": "x"}]}, "prompt"),
    ({"prompt": None, "token_ids": [49152]}, "token_ids"),
    ({"prompt": None, "token_ids": [0] * 2048}, "token_ids"),
    ({"prompt": None, "token_ids": [0] * 2000, "max_tokens": 49}, "max_tokens"),
    ({"prompt": None, "messages": []}, "messages"),
    ({"prompt": None, "messages": [{"content": "x"}]}, "messages"),
    ({"prompt": None, "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools"),
]


@pytest.mark.parametrize(("fields", "field"), BAD, ids=lambda value: repr(value)[:40])
def test_bad_input_names_its_field_and_allocates_nothing(engine: Engine, fields: dict, field: str):
    before = engine.loads()
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(Request.from_json({"prompt": "x", **fields}))
    assert caught.value.field == field
    assert engine.loads() == before


BAD_DEADLINES = [float("nan"), float("inf"), -float("inf"), 10**400, "soon", True]


@pytest.mark.parametrize("deadline", BAD_DEADLINES, ids=lambda value: repr(value)[:40])
def test_a_deadline_that_is_no_time_is_refused(engine: Engine, deadline):
    before = engine.loads()
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(Request(prompt="x", deadline=deadline))
    assert caught.value.field == "deadline"
    assert engine.loads() == before


def test_a_deadline_may_be_farther_than_a_thread_can_wait(engine: Engine):
    # The core has nothing to do but wait while it compiles the constraint, until then at most.
    request = Request(prompt="x", deadline=4e11, constraint=Constraint(choice=("far",)))
    assert collect(engine.submit(request)).text == "far"


def test_what_cannot_be_given_to_the_core_leaves_nothing_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    before = engine.loads()
    sent = list[Message]()
    send = engine._core.send

    def fail_at_the_second(command: Message) -> None:
        sent.append(command)
        if len(sent) == 2:
            raise RuntimeError("can't start new thread")
        send(command)

    requests = [Request(prompt="x", request_id=name, **without_eos(30)) for name in ("first", "second")]
    monkeypatch.setattr(engine._core, "send", fail_at_the_second)
    with pytest.raises(RuntimeError, match="new thread"):
        engine.submit_all(requests)
    monkeypatch.undo()
    assert len(engine._requests) == 0
    assert [type(command) for command in sent] == [Submit, Submit, Abort, Abort]
    (after,) = engine.generate([replace(requests[0], stopping=StoppingParams(max_tokens=1))])
    assert after.request_id == "first"
    assert all_pages_are_back(engine)
    assert engine.loads().running == before.running


def test_a_prompt_at_the_limit_succeeds(engine: Engine):
    limit = engine.max_context
    (completion,) = engine.generate([Request(token_ids=prompt(limit - 1, 3), sampling=GREEDY)])
    assert completion.usage.prompt_tokens == limit - 1
    assert completion.usage.completion_tokens == 1


def test_an_unknown_model_and_a_duplicate_id_are_refused(engine: Engine):
    with pytest.raises(ModelNotFound, match="gpt-9"):
        engine.submit(Request(prompt="x", model="gpt-9"))
    stream = engine.submit(Request(prompt="x", request_id="twin", **without_eos(30)))
    with pytest.raises(DuplicateRequestId, match="twin"):
        engine.submit(Request(prompt="x", request_id="twin"))
    stream.cancel()
    assert collect(stream).finish_reason == "abort"


def test_a_full_queue_refuses_exactly_what_is_beyond_its_bound(engine: Engine):
    streams, refused = [], 0
    for _ in range(engine.capacity + 10):
        try:
            streams.append(engine.submit(Request(token_ids=prompt(3), **without_eos(40))))
        except QueueFull as error:
            assert error.retry_after > 0
            refused += 1
    assert refused == 10
    for stream in streams:
        stream.cancel()
    reasons = {collect(stream).finish_reason for stream in streams}
    assert reasons == {"abort"}
    assert all_pages_are_back(engine)


def test_random_submissions_cancellations_and_deadlines_return_every_page(engine: Engine):
    random_ = random.Random(11)
    for _ in range(25):
        streams = []
        for _ in range(random_.randint(1, 8)):
            deadline = time.monotonic() + random_.uniform(0, 0.3) if random_.random() < 0.3 else None
            request = Request(
                token_ids=prompt(random_.randint(1, 200), random_.randint(0, 3)),
                deadline=deadline,
                **without_eos(random_.randint(1, 12)),
            )
            streams.append(engine.submit(request))
        for stream in streams:
            if random_.random() < 0.4:
                threading.Timer(random_.uniform(0, 0.2), stream.cancel).start()
        for stream in streams:
            events = list(stream)
            assert [isinstance(event, Finished) for event in events].count(True) == 1
            assert isinstance(events[-1], Finished)
            assert events[-1].finish_reason in ("length", "abort", "deadline")
        assert all_pages_are_back(engine)


def test_nothing_was_compiled_after_warm_up(engine: Engine):
    assert engine.loads().compiles_after_warmup == 0
