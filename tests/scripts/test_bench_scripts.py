"""The benchmarks run, and their arithmetic is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from benchmarks import steps  # noqa: E402
from benchmarks.latency import StreamTimes  # noqa: E402
from benchmarks.server import serve_options  # noqa: E402
from benchmarks.summary import median_of, percentiles, report, rounded  # noqa: E402

from jaxserve.cli import build_parser  # noqa: E402
from jaxserve.commands.options import engine_config  # noqa: E402
from jaxserve.config import EngineConfig  # noqa: E402
from jaxserve.core.messages import StepRecord  # noqa: E402


def record(step: int, dispatched: float, retired: float, **fields) -> StepRecord:
    values = {"sequences": 2, "chunk_tokens": 0, "host_seconds": 0.001, "wait_seconds": 0.0}
    slots = {"given_slots": [], "taken_slots": [], "freed_slots": []}
    return StepRecord(step=step, dispatched=dispatched, retired=retired, **{**values, **slots, **fields})


def run_script(name: str, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments, "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_percentiles_lie_between_neighbours():
    assert percentiles([4, 1, 3, 2], "itl_ms") == {"itl_ms_p50": 2.5, "itl_ms_p90": 3.7, "itl_ms_p99": 3.97}
    assert percentiles([], "itl_ms") == {"itl_ms_p50": None, "itl_ms_p90": None, "itl_ms_p99": None}


def test_medians_are_of_numbers_and_the_rest_is_kept():
    rounds = [{"a": 3.0, "b": None, "c": "x", "d": 1}, {"a": 1.0, "b": 2.0, "c": "x", "d": 3}]
    assert median_of([*rounds, {"a": 2.0, "b": 4.0, "c": "x", "d": 2}]) == {"a": 2.0, "b": 3.0, "c": "x", "d": 2}
    assert [rounded(value) for value in (12345.6, 0.0123456, 3)] == [12346, 0.01235, 3]


def test_the_last_line_is_one_json_object(capsys: pytest.CaptureFixture[str]):
    report({"a": 1, "runs": [{"b": 2.5}, {"b": None}], "c": {"d": "x"}}, True, also={"b": 2.5})
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"a": 1, "runs": [{"b": 2.5}, {"b": None}], "c": {"d": "x"}, "b": 2.5}
    assert [line.split() for line in lines[:-1]] == [
        ["a", "1"],
        ["runs[0].b", "2.5"],
        ["runs[1].b", "None"],
        ["c.d", "x"],
    ]


def test_idle_time_is_what_no_interval_covers():
    intervals = [(5.0, 6.0), (0.0, 2.0), (1.0, 3.0)]
    assert steps.union(intervals) == [(0.0, 3.0), (5.0, 6.0)]
    assert steps.busy_seconds(intervals) == 4.0
    assert steps.idle_ratio(intervals) == pytest.approx(1 / 3)


def test_a_simulated_step_starts_when_it_is_dispatched_or_the_one_before_is_done():
    records = [record(1, 0.0, 8.1), record(2, 1.0, 16.2), record(3, 18.0, 26.5)]
    assert steps.simulated_intervals(records, 8.0) == [(0.0, 8.0), (8.0, 16.0), (18.0, 26.0)]
    assert steps.gaps(steps.simulated_intervals(records, 8.0)) == [0.0, 2.0]
    assert steps.observed_intervals(records) == [(0.0, 8.1), (8.1, 16.2), (18.0, 26.5)]


def test_slot_reuse_counts_from_the_last_token_to_the_next_owner():
    records = [
        record(1, 0, 1, given_slots=[0, 1], taken_slots=[0, 1]),
        record(2, 1, 2, freed_slots=[0, 1]),
        record(3, 2, 3, given_slots=[0], taken_slots=[0]),
        record(4, 3, 4, given_slots=[1]),
        record(5, 4, 5, taken_slots=[1], freed_slots=[0]),
    ]
    assert steps.reuse_lags(records) == [1, 2]
    assert steps.reuse_lags(records, first_piece=True) == [1, 3]


def test_the_loaded_steps_are_those_between_the_first_and_the_last_full_one():
    records = [record(step, step, step + 1, sequences=rows) for step, rows in enumerate([1, 2, 1, 2, 1])]
    assert steps.full_range(records, 2) == slice(1, 4)
    with pytest.raises(ValueError, match="no step had all 3 slots"):
        steps.full_range(records, 3)


def test_latencies_of_a_stream():
    times = StreamTimes(sent=10.0, arrivals=[10.5, 10.75, 11.5], token_ids=[1, 2, 3, 4, 5], tokens=5)
    assert (times.first_token, times.total, times.per_token, times.gaps) == (0.5, 1.5, 0.25, [0.25, 0.75])
    assert StreamTimes(sent=0.0, arrivals=[1.0], token_ids=[1], tokens=1).per_token is None


@pytest.mark.parametrize("config", [EngineConfig(), EngineConfig(slots=4, prefix_cache=False, max_context=64)])
def test_a_server_is_started_with_the_configuration_of_the_benchmark(config: EngineConfig):
    arguments = build_parser().parse_args(["serve", *serve_options(config)])
    assert engine_config(arguments) == config


def test_overlap_hides_the_host_behind_a_simulated_device():
    result = run_script(
        "bench_overlap.py", "--simulated-step-ms", "2", "--slots", "8", "--rounds", "1", "--output-len", "16",
        "--probes", "16", "--long-len", "64",
    )  # fmt: skip
    assert result["slot_reuse_lag_steps"] <= 2
    assert result["slot_reuses"] > 0 and result["overrun_rows"] > 0
    assert 0 <= result["device_idle_ratio"] <= 1
    assert result["delivery_lag_ms_p50"] > 0 and result["short_p99_ratio"] > 0


def test_a_step_whose_rows_have_a_feature_is_compared_with_one_without():
    result = run_script(
        "bench_features.py", "--model", str(SCRIPTS.parent / "tests/fixtures/families/qwen3"), "--slots", "4",
        "--rounds", "1", "--prompt-len", "8", "--output-len", "12", "--max-context", "64", "--shares", "0.5", "1",
    )  # fmt: skip
    plain = result["features"].pop("plain")
    assert plain["mask_ms"] == 0 and plain["over_plain"] == 1
    features = ("constraint", "temperature", "top_p", "top_k_top_p", "penalties", "logprobs")
    assert list(result["features"]) == [f"{feature} {share}" for feature in features for share in ("50%", "100%")]
    for kind, figures in result["features"].items():
        assert figures["over_plain"] > 0 and figures["tokens_per_s"] > 0
        assert (figures["mask_ms"] > 0) == kind.startswith("constraint")
    assert result["compiles_after_warmup"] == 0


@pytest.mark.parametrize("protocol", ["grpc", "vllm", "http"])
def test_a_served_engine_delivers_every_token(protocol: str):
    result = run_script(
        "bench_serving.py", "--simulated-step-ms", "2", "--slots", "8", "--concurrency", "4", "--rate", "200",
        "--rounds", "1", "--requests", "8", "--output-len", "8", "--prompt-len", "8", "--ttft-limit-ms", "60000",
        "--protocol", protocol,
    )  # fmt: skip
    closed, poisson = result["loads"]
    assert (closed["concurrency"], poisson["rate"]) == (4, 200.0)
    assert closed["good_share"] == poisson["good_share"] == 1
    assert closed["output_tokens_per_s"] > 0 and closed["ttft_ms_p99"] >= closed["ttft_ms_p50"] > 0


def test_every_token_comes_through_the_gateway_whose_time_is_told_apart():
    result = run_script(
        "bench_serving.py", "--simulated-step-ms", "2", "--slots", "8", "--concurrency", "4", "--rounds", "1",
        "--requests", "8", "--output-len", "8", "--prompt-len", "8", "--through-smg",
    )  # fmt: skip
    assert result["output_tokens_per_s"] > 0 and result["ttft_ms_p50"] > 0
    assert min(result["gateway_cpu_s"], result["server_cpu_s"], result["client_cpu_s"]) >= 0


def test_absent_peers_are_named():
    script = "import sys; sys.path.insert(0, sys.argv[1]); import bench_peers as b; import argparse"
    ask = "print(b.missing_module(argparse.Namespace(peer_python='/nowhere/python'), b.TRANSFORMERS))"
    done = subprocess.run([sys.executable, "-c", f"{script}; {ask}", str(SCRIPTS)], capture_output=True, text=True)
    assert done.stdout.strip() == "there is no interpreter /nowhere/python", done.stderr
