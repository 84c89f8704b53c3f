"""Log-probabilities of the prompt's tokens: those that the same tokens have when they are generated, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.engine import Engine
from jaxserve.front.completion import collect
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams
from jaxserve.request_errors import InvalidRequest

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "smollm2_greedy.json").read_text())["prompts"]


def asking(token_ids: tuple[int, ...], alternatives: int | None = 3, **fields) -> Request:
    return Request(
        token_ids=token_ids,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=1, ignore_eos=True),
        output=OutputParams(prompt_logprobs=alternatives),
        **fields,
    )


def test_they_equal_transformers(engine: Engine):
    cases = [case for case in REFERENCE if len(case["token_ids"]) < 600]
    assert len(cases) >= 10
    requests = [asking((*case["token_ids"], *case["generated_ids"])) for case in cases]
    worst = 0.0
    for case, completion in zip(cases, engine.generate(requests), strict=True):
        assert completion.prompt_logprobs is not None
        assert [entry.token_id for entry in completion.prompt_logprobs] == [
            *case["token_ids"][1:],
            *case["generated_ids"],
        ]
        generated = completion.prompt_logprobs[-len(case["generated_ids"]) :]
        for entry, want in zip(generated, case["logprobs"], strict=True):
            worst = max(worst, abs(entry.logprob - want))
    print(f"worst logprob {worst:.1e} off")
    assert worst < 1e-3


def test_they_are_the_bits_of_the_same_tokens_generated(engine: Engine):
    prompt = tuple(range(2000, 2170))  # several pieces of the smallest chunk, and of what is scored together
    generated = collect(
        engine.submit(
            Request(
                token_ids=prompt,
                sampling=SamplingParams(seed=4),
                stopping=StoppingParams(max_tokens=100, ignore_eos=True),
                output=OutputParams(logprobs=3),
            )
        )
    )
    (again,) = engine.generate([asking((*prompt, *generated.token_ids))])
    assert again.prompt_logprobs is not None
    assert again.prompt_logprobs[-100:] == generated.logprobs
    assert len(again.prompt_logprobs) == len(prompt) + 99


def test_a_cached_prefix_is_computed_again_and_changes_nothing(engine: Engine):
    request = asking(tuple(range(3000, 3100)))
    before, after = (engine.generate([replace(request, request_id=name)])[0] for name in ("before", "after"))
    assert before.prompt_logprobs == after.prompt_logprobs
    assert after.usage.cached_tokens == 0
    (hit,) = engine.generate([asking(tuple(range(3000, 3100)), None)])
    assert hit.usage.cached_tokens == 96
    assert hit.prompt_logprobs is None


def test_every_sequence_shares_them(engine: Engine):
    request = asking(tuple(range(3000, 3050)))
    one = collect(engine.submit(request))
    three = collect(engine.submit(replace(request, sampling=SamplingParams(n=3, seed=1), request_id="three")))
    assert three.prompt_logprobs == one.prompt_logprobs
    assert len(three.outputs) == 3


def test_one_token_has_none(engine: Engine):
    assert collect(engine.submit(asking((3000,)))).prompt_logprobs == ()


@pytest.mark.parametrize("alternatives", [-1, 21, True])
def test_a_count_out_of_range_is_named(engine: Engine, alternatives: int):
    with pytest.raises(InvalidRequest) as error:
        engine.submit(asking((3000,), alternatives))
    assert error.value.field == "prompt_logprobs"
