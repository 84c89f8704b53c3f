"""Offline throughput of the engine, beside the bare matrix products of its step, in one run.

    python scripts/bench_offline.py --requests 32 --prompt-len 128 --output-len 64 --slots 32 --json

Requests are random token ids, all submitted at once; greedy; every request runs to its full length. Rounds are
repeated and medians taken. With --json the last line is one JSON object.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxserve import Engine, EngineConfig
from jaxserve.core_messages import StepRecord
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams

FLOOR_ROUNDS = 9


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantization", choices=("none", "int8"), default="none")
    parser.add_argument("--attention", default=None, help="attention implementation; the platform's own if unset")
    parser.add_argument("--requests", type=int, default=32, help="requests a round")
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument(
        "--prefill-chunks", type=int, nargs="+", default=list(EngineConfig.prefill_chunks), help="tokens"
    )
    parser.add_argument("--max-context", type=int, default=2048, help="tokens")
    parser.add_argument("--pipeline-depth", type=int, default=1, help="steps dispatched ahead; 0 is synchronous")
    parser.add_argument("--core", choices=("thread", "process"), default="thread")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over the rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args()


def make_requests(arguments: argparse.Namespace, vocab_size: int, seed: int) -> list[Request]:
    """Prompts that share no prefix, and are not in the prefix cache."""
    random_ = random.Random(seed)
    length = arguments.output_len
    return [
        Request(
            token_ids=tuple(random_.randrange(vocab_size) for _ in range(arguments.prompt_len)),
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_tokens=length, min_tokens=length),
            output=OutputParams(return_text=False),
        )
        for _ in range(arguments.requests)
    ]


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
    """Median milliseconds between a step of the kind retiring and the step before it; None if there was none."""
    intervals = [
        1e3 * (step.retired - before.retired)
        for before, step in pairwise(records)
        if (step.chunk_tokens > 0) == mixed
        and (rows is None or step.sequences == rows)
        and step.step == before.step + 1
    ]
    return statistics.median(intervals) if intervals else None


def matmul_floor(engine: Engine, rows: int) -> float:
    """Milliseconds of a step's bare matrix products: every weight of the model against `rows` rows, nothing else."""
    import jax
    import jax.numpy as jnp

    from jaxserve.models.llama import abstract_llama

    config = engine.config
    _, params = abstract_llama(engine.model_config, config.dtype, config.quantization)
    shapes = {path: leaf for path, leaf in jax.tree.leaves_with_path(params) if leaf.ndim == 2}
    if not engine.model_config.tie_embeddings or config.quantization != "none":
        # The head has weights of its own: the embedding is only looked up.
        shapes = {path: leaf for path, leaf in shapes.items() if "embedding" not in jax.tree_util.keystr(path)}
    weights = [jnp.ones(leaf.shape, leaf.dtype) for leaf in shapes.values()]

    def products(weights: list[jax.Array], inputs: dict[int, jax.Array]) -> list[jax.Array]:
        # Each result is reduced to a row so that storing it costs nothing, and chained so that none run side by side.
        outs = []
        token = jnp.zeros((), inputs[weights[0].shape[1]].dtype)
        for w in weights:
            x = inputs[w.shape[1]] + token
            total = jnp.int32 if w.dtype == jnp.int8 else jnp.float32
            out = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=total)
            token = (out[0, 0] * 0).astype(x.dtype)
            outs.append(out[0, 0])
        return outs

    kinds = {w.shape[1]: w.dtype for w in weights}
    inputs = {size: jnp.ones((rows, size), dtype) for size, dtype in kinds.items()}
    compiled = jax.jit(products).lower(weights, inputs).compile()
    times = []
    for _ in range(FLOOR_ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(weights, inputs))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def process_start() -> float:
    """Monotonic seconds at which this process was started by exec."""
    with open("/proc/self/stat") as stat:
        ticks = int(stat.read().rsplit(")", 1)[1].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")  # since boot, as CLOCK_MONOTONIC on a machine that has not slept


def main() -> int:
    """Runs the benchmark."""
    arguments = parse_arguments()
    engine = Engine(
        model=arguments.model,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        attention=arguments.attention,
        slots=arguments.slots,
        prefill_chunks=tuple(arguments.prefill_chunks),
        max_context=arguments.max_context,
        pipeline_depth=arguments.pipeline_depth,
        core=arguments.core,
        max_waiting=max(arguments.requests, 1),
        progress=lambda what, fraction: None,
    )
    startup = time.clock_gettime(time.CLOCK_BOOTTIME) - process_start()
    rounds, floors, records = [], [], []
    run_round(engine, arguments, seed=0)
    for number in range(arguments.rounds):
        floors.append(matmul_floor(engine, arguments.slots))
        seconds, prefilled, steps = run_round(engine, arguments, seed=1 + number)
        rounds.append((seconds, prefilled))
        records += steps
    seconds = statistics.median(seconds for seconds, _ in rounds)
    prefilled = statistics.median(prefilled for _, prefilled in rounds)
    decode = median_interval(records, arguments.slots, mixed=False)
    floor = statistics.median(floors)
    host = [1e3 * record.host_seconds for record in records]
    result = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "attention": engine.device.attention,
        "requests": arguments.requests,
        "prompt_len": arguments.prompt_len,
        "output_len": arguments.output_len,
        "slots": arguments.slots,
        "rounds": arguments.rounds,
        "output_tokens_per_s": round(arguments.requests * arguments.output_len / seconds, 2),
        "prompt_tokens_per_s": round(arguments.requests * arguments.prompt_len / prefilled, 2),
        "decode_step_ms_p50": decode and round(decode, 3),
        "mixed_step_ms_p50": (mixed := median_interval(records, None, mixed=True)) and round(mixed, 3),
        "host_step_ms_p50": round(statistics.median(host), 4),
        "matmul_floor_ms": round(floor, 3),
        "decode_over_floor": decode and round(decode / floor, 3),
        "startup_s": round(startup, 2),
        "compiles_after_warmup": engine.loads().compiles_after_warmup,
        "device": engine.device.device_kind,
    }
    engine.shutdown()
    for name, value in result.items():
        print(f"{name:24} {value}")
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
