"""A request with a constraint is as much its own as any: the same bits in any company, after preemption, after a failed
step; and the others are as if it were not there."""

import os
import random
import re
from pathlib import Path

import pytest

from jaxserve.engine import Engine
from jaxserve.events import Completion
from jaxserve.front.completion import collect
from jaxserve.front.request_stream import RequestStream
from jaxserve.request import Constraint, OutputParams, Request, SamplingParams, StoppingParams

FAMILY = Path(__file__).parents[1] / "fixtures" / "families" / "qwen3"
SHAPE = {"model": str(FAMILY), "dtype": "bfloat16", "max_context": 160}
REQUESTS = 30
SUBMISSIONS = 300
LETTERS, WORDS = "[a-f]{1,60}", "([a-z]{2,5} ){3,9}[a-z]+"
CONSTRAINTS = (
    None,
    Constraint(regex=LETTERS),
    None,
    Constraint(json_schema={"type": "array", "items": {"enum": ["ab", 12, None]}, "minItems": 2}),
    Constraint(regex=WORDS),
    Constraint(choice=("yes, of course", "yes", "no, never", "perhaps")),
    Constraint(grammar='start: item ("," item)*\nitem: /[a-z]{1,4}/ "=" /[0-9]+/'),
    Constraint(json_object=True),
)


def make_request(number: int, **fields: str) -> Request:
    random_ = random.Random(number)
    shared = random.Random(number % 3)
    prompt = [shared.randrange(3, 250) for _ in range(17)] + [random_.randrange(3, 250) for _ in range(number % 40 + 1)]
    output = random_.randint(8, 40)
    return Request(
        token_ids=tuple(prompt),
        sampling=(
            SamplingParams(temperature=0.0),
            SamplingParams(temperature=1.0, seed=number, top_p=0.9),
            SamplingParams(temperature=0.7, seed=number, frequency_penalty=0.5, logit_bias={70: 3.0}),
        )[number % 3],
        stopping=StoppingParams(max_tokens=output, min_tokens=number % 2 * output // 2, ignore_eos=number % 7 == 0),
        output=OutputParams(logprobs=random_.choice((None, 2))),
        constraint=CONSTRAINTS[number % len(CONSTRAINTS)],
        **fields,
    )


def outcome(completion: Completion) -> tuple:
    return completion.token_ids, completion.text, completion.logprobs, completion.finish_reason


@pytest.fixture(scope="module")
def alone() -> list[tuple]:
    with Engine(**SHAPE, slots=1, prefill_chunks=(160,), prefix_cache=False, pipeline_depth=0) as solo:
        return [outcome(solo.generate([make_request(number)])[0]) for number in range(REQUESTS)]


def test_constrained_and_free_requests_together_give_their_solo_bits(alone: list[tuple]):
    for number, (_, text, _, _) in enumerate(alone):
        if number % len(CONSTRAINTS) == CONSTRAINTS.index(Constraint(regex=LETTERS)):
            assert re.fullmatch("[a-f]{1,60}", text), "cut or not, it is a match here"
    random_ = random.Random(3)
    mismatches = constrained = 0
    waiting: list[tuple[int, RequestStream]] = []
    with Engine(**SHAPE, slots=7, small_slots=3, prefill_chunks=(16, 48), num_pages=12, page_size=16) as engine:

        def collect_oldest() -> None:
            nonlocal mismatches
            number, stream = waiting.pop(0)
            completion = collect(stream)
            if completion.finish_reason != "abort":
                mismatches += outcome(completion) != alone[number]

        for _ in range(SUBMISSIONS):
            number = random_.randrange(REQUESTS)
            stream = engine.submit(make_request(number, cache_salt=random_.choice(("", "", str(number)))))
            waiting.append((number, stream))
            if random_.random() < 0.05:
                random_.choice(waiting)[1].cancel()
            while len(waiting) > random_.randint(1, 30):
                collect_oldest()
        while waiting:
            collect_oldest()
        loads = engine.loads()
        constrained = sum(record.constrained for record in engine.step_records)
    assert mismatches == 0
    assert constrained > 0 and loads.preemptions > 0 and loads.prefix_hits > 0
    assert loads.available_pages == loads.total_pages
    assert loads.compiles_after_warmup == 0


@pytest.mark.parametrize("where", ["forward", "choose", "read"])
def test_after_a_failed_step_constrained_streams_go_on_where_they_were(alone: list[tuple], where: str):
    with Engine(**SHAPE, slots=8, prefill_chunks=(64,)) as engine:
        runner = engine._core._loop._runner
        original, calls = getattr(runner, where), 0

        def fail_twice(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls in (7, 12):
                raise RuntimeError("injected")
            return original(*arguments)

        setattr(runner, where, fail_twice)
        numbers = range(12)
        assert [outcome(c) for c in engine.generate([make_request(n) for n in numbers])] == [alone[n] for n in numbers]
        assert calls > 12


def test_a_core_in_a_process_of_its_own_holds_to_constraints_too(alone: list[tuple]):
    with Engine(**SHAPE, slots=4, core="process") as engine:
        assert os.getpriority(os.PRIO_PROCESS, engine._core.pid) > os.nice(0), "it gives way to those who deliver"
        numbers = range(10)
        assert [outcome(c) for c in engine.generate([make_request(n) for n in numbers])] == [alone[n] for n in numbers]
