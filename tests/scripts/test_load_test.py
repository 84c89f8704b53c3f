"""The load test: its plans are what they say, what a server breaks is seen, and runs on a real server are clean."""

import argparse
import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import load_test  # noqa: E402
from benchmarks.load.clients import Run  # noqa: E402
from benchmarks.load.figures import Limits, figures_of  # noqa: E402
from benchmarks.load.gauges import parse_metrics  # noqa: E402
from benchmarks.load.lengths import Lengths  # noqa: E402
from benchmarks.load.outcome import Outcome, run_planned  # noqa: E402
from benchmarks.load.plan import Load, Mix, Planned, make_plan  # noqa: E402
from benchmarks.load.sweep import Trial, highest_rate  # noqa: E402
from benchmarks.load.trace import TraceError, read_trace  # noqa: E402
from benchmarks.plots import Bar, _in_lanes  # noqa: E402
from benchmarks.server import ServerProcess  # noqa: E402
from benchmarks.workload import greedy_request  # noqa: E402

from jaxserve.config import EngineConfig  # noqa: E402
from jaxserve.events import (  # noqa: E402
    Delta,
    Event,
    Finished,
    FinishReason,
    Started,
    Timings,
    Usage,
)
from jaxserve.request import Request  # noqa: E402
from jaxserve.request_errors import QueueFull  # noqa: E402

FIXED = Lengths.parse("8", 100)
BEHAVED = Mix()


def plan(word: str, duration: float = 10.0, requests: int | None = None, mix: Mix = BEHAVED, seed: int = 1):
    return list(make_plan(Load.parse(word), duration, requests, FIXED, FIXED, mix, seed))


# Plans


def test_a_plan_follows_from_its_seed():
    mix = Mix(cancel=0.3)
    assert plan("poisson:20", mix=mix) == plan("poisson:20", mix=mix)
    assert plan("poisson:20", mix=mix) != plan("poisson:20", mix=mix, seed=2)


def test_a_poisson_load_has_its_rate_and_a_ramp_grows():
    times = [one.at for one in plan("poisson:50", duration=100.0)]
    assert len(times) == 5000 and times == sorted(times)
    assert times[-1] == pytest.approx(100.0, rel=0.06)
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
    drawn = [Lengths.parse("lognormal:40,0.5", 1000).draw(random_) for _ in range(4001)]
    assert sorted(drawn)[2000] == pytest.approx(40, abs=2)
    uniform = [Lengths.parse("uniform:3-9", 7).draw(random_) for _ in range(1000)]
    assert (min(uniform), max(uniform)) == (3, 7)


@pytest.mark.parametrize("word", ["", "closed", "closed:x", "closed:0", "poisson:-1", "trace:", "flood:3", "ramp:1"])
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


# What a server breaks


class Script:
    """A target that gives scripted events."""

    def __init__(self, *events: Event | Exception):
        self._events = events
        self.left = False

    async def send(self, request: Request, timeout: float | None) -> AsyncGenerator[Event]:
        try:
            for event in self._events:
                await asyncio.sleep(0)
                if isinstance(event, Exception):
                    raise event
                yield event
        except GeneratorExit:
            self.left = True
            raise


def delta(*ids: int) -> Delta:
    return Delta("r", 0, ids, "")


def finished(tokens: int, reason: FinishReason = FinishReason.LENGTH) -> Finished:
    return Finished("r", 0, reason, Usage(1, 0, tokens), Timings(0, 0, 0, 0))


STARTED = Started("r", 1, 0, 0)
GOOD = (STARTED, delta(1), delta(2, 3), finished(3))


def outcome_of(*events: Event | Exception, behaviour: str = "complete", amount: float = 0.0) -> Outcome:
    planned = Planned(7, None, 1, 3, behaviour, amount)  # type: ignore[arg-type]
    return asyncio.run(run_planned(Script(*events), planned, greedy_request((1,), 3), 0.0))


def test_a_whole_stream_breaks_nothing():
    outcome = outcome_of(*GOOD)
    assert (outcome.ending, outcome.tokens, outcome.broken) == ("completed", 3, [])


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ((STARTED, delta(1, 2, 3)), "0 terminal messages"),
        ((*GOOD, finished(3)), "2 terminal messages"),
        ((STARTED, delta(1, 2), finished(3)), "2 tokens in messages, 3 in usage"),
        ((STARTED, delta(1, 2, 3, 4), finished(3)), "4 tokens in messages, 3 in usage"),
        ((STARTED, delta(1, 2), finished(2)), "2 of 3 tokens"),
        ((STARTED, delta(1, 2), finished(2, FinishReason.STOP)), "finish reason stop"),
        ((STARTED, delta(1), RuntimeError("no")), "RuntimeError: no"),
        ((STARTED, delta(1), QueueFull(3, 1.0)), "refused after 1 tokens"),
        ((STARTED, TimeoutError()), "a deadline passed that nobody set"),
    ],
)
def test_what_a_server_breaks_is_named(events: tuple[Event | Exception, ...], says: str):
    (broken,) = outcome_of(*events).broken
    assert "request 7" in broken and says in broken


def test_a_client_that_leaves_ends_its_stream():
    script = Script(*GOOD)
    planned = Planned(7, None, 1, 3, "cancel", 1.0)
    outcome = asyncio.run(run_planned(script, planned, greedy_request((1,), 3), 0.0))
    assert (outcome.ending, outcome.tokens, outcome.broken, script.left) == ("cancelled", 1, [], True)


def test_a_refusal_and_a_deadline_that_was_set_are_no_fault():
    assert outcome_of(QueueFull(3, 1.0)).ending == "refused"
    deadline = outcome_of(STARTED, TimeoutError(), behaviour="deadline", amount=0.1)
    assert (deadline.ending, deadline.broken) == ("deadline", [])


# Figures


def timed(first: float, gap: float, tokens: int = 4, ending: str = "completed") -> Outcome:
    arrivals = [first + gap * number for number in range(tokens)]
    return Outcome(0, ending, 0.0, arrivals, tokens, arrivals[-1])  # type: ignore[arg-type]


def test_goodput_counts_what_kept_every_limit():
    run = Run([timed(0.1, 0.02), timed(0.9, 0.02), timed(0.1, 0.3), timed(0.1, 0.02, ending="refused")])
    figures = figures_of(run, Limits.parse(["ttft=0.5", "itl=0.1"]), [])
    assert figures["good_share"] == 0.25
    assert figures["goodput_rps"] == pytest.approx(1 / 1.0)
    assert figures_of(run, Limits.parse([]), ["pages_used: 3 at the end, 0 before"])["broken"] == 1
    with pytest.raises(ValueError, match="ttft"):
        Limits.parse(["speed=3"])


def test_a_client_that_is_too_busy_or_late_is_named():
    assert Run([]).client_bound == ""
    assert "97 % of a core" in Run([], cpu_share=0.97).client_bound
    assert "200 ms late" in Run([], late_p99=0.2).client_bound


@pytest.mark.parametrize(("capacity", "found"), [(5.0, 5.0), (0.5, None), (100.0, 8.0)])
def test_a_sweep_finds_the_highest_rate_that_is_kept(capacity: float, found: float | None):
    async def attempt(rate: float) -> Trial:
        return Trial(rate, rate <= capacity, {})

    rate, trials = asyncio.run(highest_rate(attempt, 1.0, 8.0))
    assert rate == (None if found is None else pytest.approx(found, rel=0.06))
    assert len(trials) <= 9


def test_lanes_are_as_many_as_streams_were_open_at_once():
    bars = [Bar(0, 1, 4, "completed"), Bar(1, 2, 2, "completed"), Bar(2, 2, 3, "completed"), Bar(2.5, 3, 5, "failed")]
    assert _in_lanes(bars) == [0, 1, 1, 2]


def test_gauges_are_read_from_prometheus_text():
    sample = parse_metrics(
        '# HELP x\njaxserve:num_requests_running{model="m"} 3.0\nvllm:num_requests_waiting 2\njaxserve:kv_cache_usage_perc 0.25\n'
    )
    assert (sample.running, sample.waiting, sample.pages_used) == (3.0, 2.0, 0.25)


# A real server, which simulates its device


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(EngineConfig(simulated_step_ms=2.0, slots=8, max_waiting=64, max_context=4096)) as server:
        yield server


def run_load_test(*arguments: str) -> dict:
    command = [sys.executable, str(SCRIPTS / "load_test.py"), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout.splitlines()[-1])


MIXED = ["--prompt-len", "uniform:4-60", "--output-len", "lognormal:16,0.5", "--longest", "256"]
MIXED += ["--cancel-share", "0.2", "--deadline-share", "0.1", "--deadline", "0.02", "--slow-share", "0.1"]
MIXED += ["--slow-pace", "0.005", "--duration", "20"]


def test_it_drives_grpc_with_two_clients_and_draws(server: ServerProcess, tmp_path: Path):
    loads = ["--load", "closed:2", "closed:12", "burst:10/1", "--requests", "60", "--processes", "2"]
    result = run_load_test("--url", f"grpc://{server.address}", *loads, *MIXED, "--plot", str(tmp_path))
    for load in result["loads"]:
        assert load["requests"] == 60 and load["broken"] == 0 and load["gauges_read"]
        assert load["completed"] > 20 and load["cancelled"] > 0 and load["failed"] == 0
        assert load["ttft_ms_p50"] <= load["e2e_ms_p50"]
    drawn = {file.name for file in tmp_path.iterdir() if file.stat().st_size > 5000}
    assert drawn >= {"latency.png", "throughput_closed.png", "streams_0_closed.png", "streams_2_burst.png"}


def test_it_drives_http_and_replays_a_trace(server: ServerProcess, tmp_path: Path):
    trace = tmp_path / "trace.jsonl"
    entries = [{"timestamp": number / 40, "prompt_tokens": 5 + number, "output_tokens": 9} for number in range(30)]
    trace.write_text("\n".join(map(json.dumps, entries)))
    loads = ["--load", "closed:6", f"trace:{trace}", "--requests", "40"]
    closed, traced = run_load_test("--url", f"http://{server.http_address}", *loads, *MIXED)["loads"]
    assert closed["requests"] == 40 and closed["broken"] == traced["broken"] == 0
    assert traced["requests"] == 30 and closed["completed"] > 15


def test_it_sweeps(server: ServerProcess):
    limits = ["--limit", "ttft=30", "--limit", "itl=30"]
    result = run_load_test("--url", f"grpc://{server.address}", "--sweep", "5:10", "--requests", "8", *limits)
    assert result["highest_rate"] == 10.0 and [trial["kept"] for trial in result["trials"]] == [True, True]


def test_a_page_that_does_not_come_back_fails_the_test(server: ServerProcess, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.load.gauges.PATIENCE", 0.0)
    arguments = argparse.Namespace(
        **dict.fromkeys(("api_key_file", "root_certificates", "sweep", "processes", "text", "plot")),
        url=f"grpc://{server.address}", load=["closed:2"], limit=[], good_share=0.99, json=False,
        cancel_share=0.0, deadline_share=0.0, slow_share=0.0, deadline=1.0, slow_pace=0.1,
        duration=30.0, requests=4, prompt_len="4", output_len="4", longest=64, vocab_size=1000, seed=1,
    )  # fmt: skip
    test = load_test.LoadTest(arguments)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, server.address], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    asyncio.run(test.run())
    assert test.results[0].figures["broken"] == 0
    original = load_test.Clients.run

    async def hold_then_run(self, part):
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        await asyncio.to_thread(holder.stdout.readline)
        return await original(self, part)

    monkeypatch.setattr(load_test.Clients, "run", hold_then_run)
    asyncio.run(test.run())
    holder.kill()
    holder.communicate()
    assert test.results[1].figures["broken"] >= 1
    assert any("pages_used" in text for text in test.results[1].figures["broken_first"])


HOLD = """
import sys
from rpc.client import Client
sys.stdin.readline()
with Client(sys.argv[1]) as client:
    for delta in client.generate({"token_ids": [300] * 200}, max_tokens=3000, ignore_eos=True):
        print(flush=True)
"""
