"""Several sequences for one prompt: each its own stream of draws, one prompt, one end each."""

import time
from collections import Counter
from dataclasses import replace

import pytest
from engine_at_rest import all_pages_are_back

from jaxserve.engine import Engine
from jaxserve.events import Delta, Finished, Started
from jaxserve.front.completion import collect
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams, output_seed
from jaxserve.request_errors import InvalidRequest, QueueFull

PROMPT = tuple(range(1000, 1050))


def asking(n: int, tokens: int = 12, seed: int | None = 7, **fields) -> Request:
    return Request(
        token_ids=PROMPT,
        sampling=SamplingParams(n=n, seed=seed, temperature=fields.pop("temperature", 1.0)),
        stopping=StoppingParams(max_tokens=tokens, min_tokens=tokens, stop=fields.pop("stop", ())),
        output=OutputParams(logprobs=fields.pop("logprobs", 2)),
        **fields,
    )


def test_each_sequence_is_the_same_for_any_n_and_alone(engine: Engine):
    five, two = engine.generate([asking(5), asking(2)])
    alone = engine.generate([asking(1, seed=output_seed(7, index)) for index in range(5)])
    assert len({output.token_ids for output in five.outputs}) == 5
    assert [output.index for output in five.outputs] == list(range(5))
    assert two.outputs == five.outputs[:2]
    for output, single in zip(five.outputs, alone, strict=True):
        assert (output.token_ids, output.text, output.logprobs) == (single.token_ids, single.text, single.logprobs)
    assert five.seed == 7
    assert all_pages_are_back(engine)


def test_unseeded_requests_differ(engine: Engine):
    one, other = engine.generate([asking(2, seed=None), asking(2, seed=None)])
    assert one.seed != other.seed
    assert len({output.token_ids for output in (*one.outputs, *other.outputs)}) == 4


def test_greedy_sequences_are_equal(engine: Engine):
    (completion,) = engine.generate([asking(3, temperature=0.0)])
    assert len({output.token_ids for output in completion.outputs}) == 1


def test_a_prompt_is_computed_and_counted_once(engine: Engine):
    before = engine.loads()
    (completion,) = engine.generate([asking(4, cache_salt="counted once")])
    records = [record for record in engine.step_records if record.step > before.steps]
    page = engine.config.page_size
    assert sum(record.chunk_tokens for record in records) == len(PROMPT) + 3 * (len(PROMPT) % page)
    usage = completion.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (len(PROMPT), 0, 4 * 12)
    after = engine.loads()
    assert after.prefix_queries - before.prefix_queries == len(PROMPT)


def test_a_stream_has_one_start_and_an_end_for_each_index(engine: Engine):
    events = list(engine.submit(asking(3)))
    assert isinstance(events[0], Started)
    assert Counter(type(event) for event in events)[Started] == 1
    ended = [event.index for event in events if isinstance(event, Finished)]
    assert sorted(ended) == [0, 1, 2]
    for index in range(3):
        own = [event for event in events if not isinstance(event, Started) and event.index == index]
        assert isinstance(own[-1], Finished)
        assert sum(len(event.token_ids) for event in own if isinstance(event, Delta)) == 12
        timings = own[-1].timings
        assert timings.first_token == pytest.approx(timings.queue + timings.prefill)
        assert timings.total == pytest.approx(timings.first_token + timings.decode)


def test_a_stop_string_ends_its_own_sequence_alone(engine: Engine):
    stopping = StoppingParams(max_tokens=24, ignore_eos=True)
    request = Request(token_ids=PROMPT, sampling=SamplingParams(n=3, seed=7), stopping=stopping)
    free = collect(engine.submit(request))
    stop = free.outputs[1].text[5:12]
    assert stop not in free.outputs[0].text + free.outputs[2].text
    stopped = collect(engine.submit(replace(request, request_id="stopped", stopping=replace(stopping, stop=(stop,)))))
    assert [output.matched_stop for output in stopped.outputs] == [None, stop, None]
    assert stopped.outputs[1].text == free.outputs[1].text[: free.outputs[1].text.index(stop)]


@pytest.mark.parametrize("how", ["cancel", "abort", "deadline"])
def test_every_sequence_ends_with_the_request(engine: Engine, how: str):
    deadline = time.monotonic() + 1.0 if how == "deadline" else None
    stream = engine.submit(asking(5, tokens=1900, deadline=deadline))
    next(stream)
    if how == "cancel":
        stream.cancel()
    elif how == "abort":
        assert engine.abort(stream.request_id)
    reasons = [event.finish_reason for event in stream if isinstance(event, Finished)]
    assert reasons == ["deadline" if how == "deadline" else "abort"] * 5
    assert not engine.abort(stream.request_id)
    assert all_pages_are_back(engine)


@pytest.mark.parametrize("n", [0, -1, 129, 10**9, 1.5, True, "2"])
def test_n_out_of_range_is_named_at_once(engine: Engine, n: object):
    began = time.thread_time()  # the machine may pause
    with pytest.raises(InvalidRequest) as error:
        engine.submit(Request(token_ids=PROMPT, sampling=SamplingParams(n=n)))
    assert time.thread_time() - began < 0.05
    assert error.value.field == "n"
    assert all_pages_are_back(engine)


def test_the_queue_counts_sequences():
    with Engine(simulated_step_ms=1.0, slots=2, max_waiting=3, max_context=2048) as small:
        with pytest.raises(InvalidRequest, match=r"\[1, 5\]"):
            small.submit(asking(6))
        stream = small.submit(asking(4, tokens=1900))
        with pytest.raises(QueueFull):
            small.submit(asking(2))
        other = small.submit(asking(1, tokens=1900))
        assert small.loads().running + small.loads().waiting == 5
        stream.cancel()
        other.cancel()
        assert len(collect(stream).outputs) == 4
        assert collect(other).finish_reason == "abort"
