"""The load test: what a server breaks is seen, and runs on a real server are clean."""

import asyncio
import json
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import load_test  # noqa: E402
from benchmarks.load.client import Client, Part, make_request  # noqa: E402
from benchmarks.load.clients import Run  # noqa: E402
from benchmarks.load.figures import Limits, figures_of  # noqa: E402
from benchmarks.load.gauges import Gauges, Sample, open_gauges, parse_metrics  # noqa: E402
from benchmarks.load.outcome import Outcome, run_planned  # noqa: E402
from benchmarks.load.plan import Load, Planned  # noqa: E402
from benchmarks.load.sweep import Trial, highest_rate  # noqa: E402
from benchmarks.load.targets import Address, connect  # noqa: E402
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
from jaxserve.request_errors import EngineUnavailable, QueueFull  # noqa: E402

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


async def test_a_closed_loop_that_is_refused_does_not_ask_again_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("benchmarks.load.client.REFUSED_PAUSE", 0.1)
    part = load_test_of(monkeypatch, "--load", "closed:2", "--duration", "0.25")._part(Load.parse("closed:2"))
    await Client(Script(QueueFull(3, 1.0))).run(replace(part, start=time.monotonic()))
    assert 2 <= capsys.readouterr().out.count('"ending": "refused"') <= 6


# Figures


def timed(first: float, gap: float, tokens: int = 4, ending: str = "completed") -> Outcome:
    arrivals = [first + gap * number for number in range(tokens)]
    return Outcome(0.0, arrivals, tokens, arrivals[-1], ending=ending)  # type: ignore[arg-type]


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


# What the program makes of its options, and of servers that fail


def load_test_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> load_test.LoadTest:
    monkeypatch.setattr(sys, "argv", ["load_test", *words])
    return load_test.LoadTest(load_test.parse_arguments())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--load", "poisson:5", "--duration", "0"], "--duration: must be more than 0"),
        (["--sweep", "8"], "LOW:HIGH"),
        (["--sweep", "8:2"], "less than HIGH"),
        (["--load", "trace:/nowhere.csv"], "/nowhere.csv"),
        (["--text", "/nowhere.txt"], "/nowhere.txt"),
        (["--prompt-len", "2000"], "2000 and an output of 64 tokens are over 2048"),
        (["--output-len", "uniform:9-3"], "uniform:9-3"),
        (["--sweep", "1:2", "--prompt-len", "0"], "'0': must be"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
):
    with pytest.raises((ValueError, OSError), match=says):
        load_test_of(monkeypatch, *words)


def test_a_second_run_sends_other_prompts_unless_it_is_told_the_seed(monkeypatch: pytest.MonkeyPatch):
    def prompt(*words: str) -> tuple[int, ...] | None:
        part = load_test_of(monkeypatch, *words)._part(Load.parse("closed:1"))
        return make_request(Planned(0, None, 8, 8), part, None).token_ids

    assert prompt() != prompt()
    assert prompt("--seed", "3") == prompt("--seed", "3")


async def test_a_server_that_is_gone_is_reported_with_what_was_seen_of_it(monkeypatch: pytest.MonkeyPatch):
    reads = iter([Sample(0.0, 0, 0, 0)])

    async def read() -> Sample:
        for sample in reads:
            return sample
        raise EngineUnavailable("connection refused")

    class Sent:
        async def run(self, part: Part) -> Run:
            return Run([timed(0.1, 0.02)])

    test = load_test_of(monkeypatch)
    for requests in (1, 0):  # gone in a load, and before one
        result = await test._run_load(Load.parse("closed:1"), Sent(), Gauges(read))  # type: ignore[arg-type]
        assert (result.figures["requests"], result.figures["broken"]) == (requests, 1)
        assert "connection refused" in result.figures["broken_first"][0]


async def test_a_connection_that_the_server_closes_is_a_refusal():
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, connect(Address(f"http://127.0.0.1:{port}")) as target:
        outcome = await run_planned(target, Planned(7, None, 1, 3), greedy_request((1,), 3), 0.0)
    assert (outcome.ending, outcome.broken) == ("refused", [])


async def test_gauges_are_read_by_https_from_a_server_of_a_trusted_authority_alone(tmp_path: Path):
    authority = trustme.CA()
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    text = "jaxserve:num_requests_running 3\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        async with open_gauges(Address(url, root_certificates=str(trusted))) as gauges:
            assert gauges is not None
            await gauges.start()
            await gauges.stop()
            assert gauges.samples[0].running == 3
        with pytest.raises(OSError, match="certificate"):
            async with open_gauges(Address(url)):
                pass


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
    lengths = ["--prompt-len", "4", "--output-len", "4", "--longest", "64", "--vocab-size", "1000"]
    url = ["--url", f"grpc://{server.address}"]
    test = load_test_of(monkeypatch, *url, "--load", "closed:2", "--requests", "4", *lengths)
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
