"""What constraints cost: a decode step with none, some and all of its rows constrained, in turn, in one run.

    python scripts/bench_constraints.py --slots 32 --prompt-len 128 --output-len 64 --json

Requests are random token ids, all submitted at once. A constrained row writes an array of JSON objects that is longer
than its output. Every request runs to its full length; rounds take turns and medians are taken over the steps of all.

    decode_step_ms       between a full decode step's retiring and the one before, by the share of rows constrained
    over_plain           the same over that with none
    mask_ms              computing the masks of a step, which the device spends on the forward
    tokens_per_s         output of a round, end to end
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_offline import make_requests, median_interval
from benchmarks.engine_arguments import add_engine_arguments, add_run_arguments, engine_config

from jaxserve import Engine
from jaxserve.core.messages import StepRecord
from jaxserve.request import Constraint, Request, SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,12}$"}, "maxItems": 5},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
PEOPLE = Constraint(json_schema={"type": "array", "items": PERSON, "minItems": 10_000})


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="of rows constrained")
    add_run_arguments(parser, rounds=5)
    arguments = parser.parse_args()
    arguments.requests = arguments.slots
    return arguments


def constrained_requests(arguments: argparse.Namespace, vocab_size: int, share: float, seed: int) -> list[Request]:
    """Requests for every slot, a share of them constrained, in no order."""
    requests = make_requests(arguments, vocab_size, seed)
    sampling = SamplingParams(temperature=arguments.temperature, seed=seed)
    requests = [replace(request, sampling=sampling) for request in requests]
    chosen = random.Random(seed).sample(range(len(requests)), round(share * len(requests)))
    for number in chosen:
        requests[number] = replace(requests[number], constraint=PEOPLE)
    return requests


def run_round(engine: Engine, requests: list[Request]) -> tuple[float, list[StepRecord]]:
    """Output tokens a second, and the steps."""
    first = engine.loads().steps
    start = time.monotonic()
    completions = engine.generate(requests)
    seconds = time.monotonic() - start
    errors = [completion.error for completion in completions if completion.finish_reason != "length"]
    if errors:
        raise RuntimeError(f"{len(errors)} requests ended early: {errors[0]}")
    tokens = sum(len(completion.token_ids) for completion in completions)
    return tokens / seconds, [record for record in engine.step_records if record.step > first]


def summarize(arguments: argparse.Namespace, rounds: list[tuple[float, list[StepRecord]]]) -> dict[str, float | None]:
    """The figures of one share."""
    records = [record for _, records in rounds for record in records]
    decodes = [record for record in records if record.chunk_tokens == 0 and record.sequences == arguments.slots]
    step = median_interval(records, arguments.slots, mixed=False)
    return {
        "decode_step_ms": step and round(step, 3),
        "mask_ms": round(1e3 * statistics.median(record.mask_seconds for record in decodes), 4),
        "host_step_ms": round(1e3 * statistics.median(record.host_seconds for record in decodes), 4),
        "tokens_per_s": round(statistics.median(rate for rate, _ in rounds), 2),
    }


def main() -> int:
    """Runs the benchmark."""
    arguments = parse_arguments()
    engine = Engine(engine_config(arguments, max_waiting=arguments.slots))
    vocab_size = engine.model_config.vocab_size
    rounds: dict[float, list[tuple[float, list[StepRecord]]]] = defaultdict(list)
    for number in range(-1, arguments.rounds):  # the first is for the caches
        for share in arguments.shares:
            result = run_round(engine, constrained_requests(arguments, vocab_size, share, seed=2 + number))
            if number >= 0:
                rounds[share].append(result)
    shares = {share: summarize(arguments, rounds[share]) for share in arguments.shares}
    plain = shares.get(0.0, {}).get("decode_step_ms")
    for figures in shares.values():
        step = figures["decode_step_ms"]
        figures["over_plain"] = round(step / plain, 4) if step and plain else None
    result = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "slots": arguments.slots,
        "prompt_len": arguments.prompt_len,
        "output_len": arguments.output_len,
        "temperature": arguments.temperature,
        "rounds": arguments.rounds,
        "constrained": {str(share): figures for share, figures in shares.items()},
        "compiles_after_warmup": engine.loads().compiles_after_warmup,
        "device": engine.device.device_kind,
    }
    engine.shutdown()
    for share, figures in shares.items():
        print(f"{share:4.0%} constrained  " + "  ".join(f"{name} {value}" for name, value in figures.items()))
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
