"""An engine with weights in blocks of 4 bits, of the real model: its own tokens in any company, and those of its file."""

import random

import pytest

from jaxserve.engine import Engine
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams


def make_request(number: int) -> Request:
    random_ = random.Random(number)
    return Request(
        token_ids=tuple(random_.randrange(3, 40_000) for _ in range(random_.randint(1, 40))),
        sampling=SamplingParams(temperature=0.0 if number % 2 else 0.8, seed=number),
        stopping=StoppingParams(max_tokens=random_.randint(4, 16), ignore_eos=True),
        output=OutputParams(logprobs=1, return_text=False),
    )


@pytest.fixture(scope="module")
def engine():
    with Engine(quantization="int4", slots=12, small_slots=3, prefill_chunks=(16,), max_context=64) as engine:
        yield engine


def test_tokens_and_logprobs_are_the_same_alone_and_together(engine: Engine):
    requests = [make_request(number) for number in range(12)]
    alone = [engine.generate([request])[0] for request in requests]
    together = engine.generate(requests)
    assert [(one.token_ids, one.logprobs) for one in together] == [(one.token_ids, one.logprobs) for one in alone]
    assert engine.loads().compiles_after_warmup == 0


def test_the_model_still_knows_what_it_knew(engine: Engine):
    (completion,) = engine.generate(["The capital of France is"], temperature=0.0, max_tokens=4)
    assert "Paris" in completion.text
