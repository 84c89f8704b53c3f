"""A request's tokens and log-probabilities are its own: the same bits in any company, at any slot, however its prompt is
cut, after a prefix hit, after preemption, synchronous or not."""

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.engine import Engine
from jaxserve.events import Completion
from jaxserve.front.completion import collect
from jaxserve.front.request_stream import RequestStream
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams, output_seed

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
REQUESTS = 48
SUBMISSIONS = 600


def make_request(number: int, **fields: str) -> Request:
    """One of REQUESTS fixed requests; several share prefixes, and every kind of sampling is among them."""
    random_ = random.Random(number)
    shared = random.Random(number % 4)
    prefix = [shared.randrange(3, 250) for _ in range(random_.choice((0, 16, 33)))]
    own = [random_.randrange(3, 250) for _ in range(random_.randint(1, 60))]
    sampling = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=number),
        SamplingParams(temperature=1.1, seed=number, top_k=20, top_p=0.9, min_p=0.01),
        SamplingParams(
            temperature=0.7, seed=number, frequency_penalty=0.5, repetition_penalty=1.3, logit_bias={5: 3.0}
        ),
    )[number % 4]
    sampling = replace(sampling, n=random_.choice((1, 1, 3)))
    output = random_.randint(1, 40)
    return Request(
        token_ids=(*prefix, *own),
        sampling=sampling,
        stopping=StoppingParams(max_tokens=output, min_tokens=output // 2),
        output=OutputParams(
            logprobs=random_.choice((0, 2)), prompt_logprobs=random_.choice((None, None, 1)), return_text=False
        ),
        **fields,
    )


def outcome(completion: Completion) -> list[tuple]:
    return [
        (output.token_ids, output.logprobs, output.finish_reason, completion.prompt_logprobs)
        for output in completion.outputs
    ]


def alone(engine: Engine, number: int) -> list[tuple]:
    """What each sequence of a request gives when it is asked for by itself."""
    request = make_request(number)
    sequences = [
        replace(request, request_id=f"alone-{index}", sampling=replace(request.sampling, n=1, seed=seed))
        for index, seed in enumerate(output_seed(number, index) for index in range(request.sampling.n))
    ]
    return [outcome(completion)[0] for completion in engine.generate(sequences)]


@pytest.mark.parametrize(("dtype", "host_cache_bytes"), [("float32", 0), ("bfloat16", 1 << 20)])
@pytest.mark.parametrize("family", ["smollm2", "qwen3"])
def test_thousands_of_requests_in_random_schedules_give_their_solo_bits(family: str, dtype: str, host_cache_bytes: int):
    shape = {"model": str(FAMILIES / family), "dtype": dtype, "max_context": 160}
    with Engine(**shape, slots=1, prefill_chunks=(160,), prefix_cache=False, pipeline_depth=0) as solo:
        expected = [alone(solo, number) for number in range(REQUESTS)]
    mismatches, cached, cancelled = 0, 0, 0
    random_ = random.Random(5)
    crowded = {"slots": 7, "small_slots": 3, "prefill_chunks": (16, 48), "num_pages": 18, "page_size": 16}
    with Engine(**shape, **crowded, host_cache_bytes=host_cache_bytes) as engine:
        waiting: list[tuple[int, RequestStream]] = []

        def collect_oldest() -> None:
            nonlocal mismatches, cached
            number, stream = waiting.pop(0)
            completion = collect(stream)
            cached += completion.usage.cached_tokens
            if all(output.finish_reason != "abort" for output in completion.outputs):
                mismatches += outcome(completion) != expected[number]

        for _ in range(SUBMISSIONS):
            number = random_.randrange(REQUESTS)
            stream = engine.submit(make_request(number, cache_salt=random_.choice(("", "", str(number)))))
            waiting.append((number, stream))
            if random_.random() < 0.05:
                random_.choice(waiting)[1].cancel()
                cancelled += 1
            if random_.random() < 0.1:
                time.sleep(random_.random() * 0.005)
            while len(waiting) > random_.randint(1, 40):
                collect_oldest()
        while waiting:
            collect_oldest()
        loads = engine.loads()
    assert mismatches == 0
    assert cached > 0 and cancelled > 0 and loads.preemptions > 0
    assert (loads.restored_pages > 0) == (host_cache_bytes > 0), "preempted pages come back, or are recomputed"
    assert loads.available_pages == loads.total_pages
    assert loads.compiles_after_warmup == 0
