"""What a load test sends is what its options say."""

import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.load.client import Part
from benchmarks.load.lengths import Lengths
from benchmarks.load.plan import Load, Mix, make_plan
from benchmarks.load.trace import TraceError, read_trace

FIXED = Lengths.parse("8")
BEHAVED = Mix()


def plan(word: str, duration: float = 10.0, requests: int | None = None, mix: Mix = BEHAVED, seed: int = 1):
    return list(make_plan(Load.parse(word), duration, requests, FIXED, FIXED, 100, mix, seed))


def test_a_plan_follows_from_its_seed():
    mix = Mix(cancel=0.3)
    assert plan("poisson:20", mix=mix) == plan("poisson:20", mix=mix)
    assert plan("poisson:20", mix=mix) != plan("poisson:20", mix=mix, seed=2)


def test_a_poisson_load_has_its_rate_and_a_ramp_grows():
    times = [one.at for one in plan("poisson:50", duration=100.0)]
    assert len(times) == pytest.approx(5000, rel=0.06) and times == sorted(times)
    assert times[-1] == pytest.approx(100.0, rel=0.01)
    ramp = [one.at for one in plan("ramp:0-40", duration=100.0)]
    assert len(ramp) == pytest.approx(2000, rel=0.1)
    assert sum(at < 50 for at in ramp) == pytest.approx(500, rel=0.2)


def test_a_burst_comes_at_once_and_again():
    assert [one.at for one in plan("burst:3/4", duration=9.0)] == [0, 0, 0, 4, 4, 4, 8, 8, 8]


def test_shares_of_requests_do_not_behave():
    mix = Mix(cancel=0.2, deadline=0.1, slow=0.05, deadline_seconds=0.4)
    planned = plan("closed:1", requests=4000, mix=mix)
    shares = {kind: sum(one.behaviour == kind for one in planned) / 4000 for kind in ("cancel", "deadline", "slow")}
    assert shares == pytest.approx({"cancel": 0.2, "deadline": 0.1, "slow": 0.05}, abs=0.02)
    assert {one.amount for one in planned if one.behaviour == "deadline"} == {0.4}
    assert all(0 <= one.amount < one.output_tokens for one in planned if one.behaviour == "cancel")
    with pytest.raises(ValueError, match="at most 1"):
        Mix(cancel=0.8, slow=0.3)


def test_lengths_have_their_distribution_and_bounds():
    random_ = random.Random(1)
    drawn = [Lengths.parse("lognormal:40,0.5").draw(random_, 1000) for _ in range(4001)]
    assert sorted(drawn)[2000] == pytest.approx(40, abs=2)
    uniform = [Lengths.parse("uniform:3-9").draw(random_, 7) for _ in range(1000)]
    assert (min(uniform), max(uniform)) == (3, 7)


def test_a_prompt_is_as_long_as_was_asked_for_while_its_output_has_room(tmp_path: Path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "prompt_tokens": 1500, "output_tokens": 900}')

    def lengths(load: str, prompt: str, output: str) -> tuple[int, int]:
        prompts, outputs = Lengths.parse(prompt), Lengths.parse(output)
        (planned,) = make_plan(Load.parse(load), 10.0, 1, prompts, outputs, 2048, BEHAVED, 1)
        return planned.prompt_tokens, planned.output_tokens

    assert lengths("closed:1", "1500", "64") == (1500, 64)
    assert lengths("closed:1", "lognormal:100000,0.1", "64") == (1984, 64)
    assert lengths("closed:1", "1500", "lognormal:100000,0.1") == (1500, 548)
    assert lengths(f"trace:{trace}", "8", "8") == (1500, 548)
    with pytest.raises(ValueError, match="2000 and an output of 64 tokens are over 2048"):
        lengths("closed:1", "2000", "64")


@pytest.mark.parametrize("word", ["poisson:50", "ramp:1-50", "burst:9/1", "closed:2"])
def test_neither_more_requests_than_asked_for_are_sent_nor_longer_than_the_duration(word: str):
    assert len(plan(word, duration=10.0, requests=7)) == 7
    times = [one.at for one in plan(word, duration=0.5, requests=1000) if one.at is not None]
    assert len(times) < 100 and all(at < 0.5 for at in times)


@pytest.mark.parametrize("loads", ["closed:1", "closed:2", "closed:5", "poisson:9"])
def test_all_clients_together_send_every_request_once(loads: str):
    part = Part(loads, time.monotonic(), 60.0, 20, "8", "8", 64, vars(BEHAVED), 1, 100, None, 0, 1)
    sent = [one.index for number in range(3) for one in replace(part, part=number, parts=3).plan()]
    assert sorted(sent) == list(range(20))


@pytest.mark.parametrize(
    "word",
    [
        "",
        "closed",
        "closed:x",
        "closed:0",
        "closed:0.4",
        "poisson:-1",
        "poisson:nan",
        "poisson:inf",
        "burst:5/0",
        "burst:1.5/1",
        "trace:",
        "flood:3",
        "ramp:1",
    ],
)
def test_a_word_that_is_no_load_is_refused(word: str):
    with pytest.raises(ValueError, match="must be"):
        Load.parse(word)


def test_traces_of_the_usual_kinds_are_read(tmp_path: Path):
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text('{"timestamp": 3000, "input_length": 6755, "output_length": 500}\n')
    ours = tmp_path / "ours.jsonl"
    ours.write_text(
        '{"timestamp": 9, "prompt_tokens": 3, "output_tokens": 4}\n{"timestamp": 7.5, "prompt_tokens": 1, "output_tokens": 2}\n'
    )
    assert [(round(at, 3), *rest) for at, *rest in read_trace(azure)] == [(0.0, 374, 44), (4.315, 396, 109)]
    assert read_trace(mooncake) == [(0.0, 6755, 500)]
    assert read_trace(ours) == [(0.0, 1, 2), (1.5, 3, 4)]
    ours.write_text('{"timestamp": 1, "prompt_tokens": 3}\n')
    with pytest.raises(TraceError, match=r"entry 1: .*output_tokens"):
        read_trace(ours)
