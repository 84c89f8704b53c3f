"""Offline throughput of the engine, beside the bare matrix products of its step, in one run.

    python scripts/bench_offline.py --requests 32 --prompt-len 128 --output-len 64 --slots 32 --json

Requests are random token ids, all submitted at once; greedy; every request runs to its full length. Rounds are
repeated and medians taken. With --json the last line is one JSON object.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine_arguments import add_engine_arguments, add_run_arguments, engine_config
from benchmarks.matmul_floor import MatmulFloor
from benchmarks.steps import step_seconds
from benchmarks.summary import report
from benchmarks.workload import greedy_request, random_prompts

from jaxserve import Engine
from jaxserve.core.messages import StepRecord
from jaxserve.request import Request


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--requests", type=int, default=32, help="requests a round")
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    add_run_arguments(parser, rounds=3)
    return parser.parse_args()


def make_requests(arguments: argparse.Namespace, vocab_size: int, seed: int) -> list[Request]:
    """Prompts that share no prefix, and are not in the prefix cache."""
    prompts = random_prompts(arguments.requests, arguments.prompt_len, vocab_size, seed)
    return [greedy_request(prompt, arguments.output_len) for prompt in prompts]


def run_round(engine: Engine, arguments: argparse.Namespace, seed: int) -> tuple[float, float, list[StepRecord]]:
    """Seconds to the last token and to the last first token, and the steps of one round."""
    requests = make_requests(arguments, engine.model_config.vocab_size, seed)
    first = engine.loads().steps
    start = time.monotonic()
    completions = engine.generate(requests)
    seconds = time.monotonic() - start
    made = sum(len(completion.token_ids) for completion in completions)
    if made != arguments.requests * arguments.output_len:
        raise RuntimeError(f"{made} tokens came out of {arguments.requests} x {arguments.output_len}")
    prefilled = max(completion.timings.queue + completion.timings.prefill for completion in completions)
    return seconds, prefilled, [record for record in engine.step_records if record.step > first]


def median_interval(records: list[StepRecord], rows: int | None, mixed: bool) -> float | None:
    """Median milliseconds of `step_seconds`; None if there was no such step."""
    intervals = step_seconds(records, rows, mixed)
    return 1e3 * statistics.median(intervals) if intervals else None


def process_start() -> float:
    """Monotonic seconds at which this process was started by exec."""
    with open("/proc/self/stat") as stat:
        ticks = int(stat.read().rsplit(")", 1)[1].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")  # since boot, as CLOCK_MONOTONIC on a machine that has not slept


def main() -> int:
    """Runs the benchmark."""
    arguments = parse_arguments()
    engine = Engine(engine_config(arguments, max_waiting=arguments.requests))
    startup = time.clock_gettime(time.CLOCK_BOOTTIME) - process_start()
    rounds, records = [], []
    run_round(engine, arguments, seed=0)
    floors = {matmul: MatmulFloor(arguments, matmul) for matmul in dict.fromkeys(("xla", engine.device.matmul))}
    for number in range(arguments.rounds):
        for floor in floors.values():
            floor.measure()
        seconds, prefilled, steps = run_round(engine, arguments, seed=1 + number)
        rounds.append((seconds, prefilled))
        records += steps
    seconds = statistics.median(seconds for seconds, _ in rounds)
    prefilled = statistics.median(prefilled for _, prefilled in rounds)
    decode = median_interval(records, arguments.slots, mixed=False)
    mixed = median_interval(records, None, mixed=True)
    floor = floors[engine.device.matmul].milliseconds
    host = [1e3 * record.host_seconds for record in records]
    result = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "attention": engine.device.attention,
        "matmul": engine.device.matmul,
        "requests": arguments.requests,
        "prompt_len": arguments.prompt_len,
        "output_len": arguments.output_len,
        "slots": arguments.slots,
        "rounds": arguments.rounds,
        "output_tokens_per_s": round(arguments.requests * arguments.output_len / seconds, 2),
        "prompt_tokens_per_s": round(arguments.requests * arguments.prompt_len / prefilled, 2),
        "decode_step_ms_p50": decode and round(decode, 3),
        "mixed_step_ms_p50": mixed and round(mixed, 3),
        "host_step_ms_p50": round(statistics.median(host), 4),
        "matmul_floor_ms": round(floor, 3),
        "decode_over_floor": decode and round(decode / floor, 3),
        "xla_matmul_floor_ms": round(floors["xla"].milliseconds, 3),
        "decode_over_xla_floor": decode and round(decode / floors["xla"].milliseconds, 3),
        "startup_s": round(startup, 2),
        "compiles_after_warmup": engine.loads().compiles_after_warmup,
        "device": engine.device.device_kind,
    }
    engine.shutdown()
    report(result, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
