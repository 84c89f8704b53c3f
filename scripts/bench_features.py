"""What a request's features cost: a decode step whose rows have none, and one in which a share of them has one.

    python scripts/bench_features.py --slots 32 --features top_p logprobs --json
    python scripts/bench_features.py --slots 32 --features constraint --shares 0.5 1 --json

Requests are random token ids, all submitted at once, greedy where the feature says nothing else. A constrained row
writes an array of JSON objects that is longer than its output. Every request runs to its full length; rounds take turns
and medians are taken over the steps of all.

    decode_step_ms       between a full decode step's retiring and the one before
    over_plain           the same over that of rows without a feature
    mask_ms              computing the masks of a step with constraints, which the device spends on the forward
    host_step_ms         of the step loop
    tokens_per_s         output of a round, end to end
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_offline import make_requests, median_interval
from benchmarks.engine_arguments import add_engine_arguments, add_run_arguments, engine_config

from jaxserve import Engine
from jaxserve.core.messages import StepRecord
from jaxserve.request import Constraint, OutputParams, Request, SamplingParams

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
FEATURES: dict[str, dict[str, object]] = {
    "constraint": {"constraint": PEOPLE},
    "temperature": {"sampling": SamplingParams(temperature=0.8)},
    "top_p": {"sampling": SamplingParams(temperature=0.8, top_p=0.95)},
    "top_k_top_p": {"sampling": SamplingParams(temperature=0.6, top_k=20, top_p=0.95)},
    "penalties": {"sampling": SamplingParams(temperature=0.0, repetition_penalty=1.1, presence_penalty=0.5)},
    "logprobs": {"output": OutputParams(return_text=False, logprobs=5)},
}
"""What a request that has one asks for."""
PLAIN = "plain"

Round = tuple[float, list[StepRecord]]
"""Output tokens a second, and the steps."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0], help="of rows that have the feature")
    add_run_arguments(parser, rounds=5)
    arguments = parser.parse_args()
    arguments.requests = arguments.slots
    return arguments


def requests_with(
    feature: str, share: float, arguments: argparse.Namespace, vocab_size: int, seed: int
) -> list[Request]:
    """Requests for every slot, a share of them with the feature, in no order."""
    requests = make_requests(arguments, vocab_size, seed)
    for number in random.Random(seed).sample(range(len(requests)), round(share * len(requests))):
        requests[number] = replace(requests[number], **FEATURES[feature])
    return requests


def run_round(engine: Engine, requests: list[Request]) -> Round:
    """Runs the requests to their ends. Raises RuntimeError where one ends early."""
    first = engine.loads().steps
    start = time.monotonic()
    completions = engine.generate(requests)
    seconds = time.monotonic() - start
    errors = [completion.error for completion in completions if completion.finish_reason != "length"]
    if errors:
        raise RuntimeError(f"{len(errors)} requests ended early: {errors[0]}")
    tokens = sum(len(completion.token_ids) for completion in completions)
    return tokens / seconds, [record for record in engine.step_records if record.step > first]


def summarize(slots: int, rounds: list[Round]) -> dict[str, float | None]:
    """The figures of one kind of rows."""
    records = [record for _, records in rounds for record in records]
    decodes = [record for record in records if record.chunk_tokens == 0 and record.sequences == slots]
    step = median_interval(records, slots, mixed=False)
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
    kinds: dict[str, Callable[[int], list[Request]]] = {
        PLAIN: lambda seed: make_requests(arguments, engine.model_config.vocab_size, seed)
    }
    for feature in arguments.features:
        for share in arguments.shares:
            kinds[f"{feature} {share:.0%}"] = partial(
                requests_with, feature, share, arguments, engine.model_config.vocab_size
            )
    rounds: dict[str, list[Round]] = defaultdict(list)
    for number in range(-1, arguments.rounds):  # the first is for the caches
        for place, (kind, requests) in enumerate(kinds.items()):
            # Prompts of its own: those of another kind would be in the prefix cache.
            result = run_round(engine, requests((1 + number) * len(kinds) + place))
            if number >= 0:
                rounds[kind].append(result)
    figures = {kind: summarize(arguments.slots, rounds[kind]) for kind in kinds}
    plain = figures[PLAIN]["decode_step_ms"]
    for of_kind in figures.values():
        step = of_kind["decode_step_ms"]
        of_kind["over_plain"] = round(step / plain, 4) if step and plain else None
    result = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "slots": arguments.slots,
        "prompt_len": arguments.prompt_len,
        "output_len": arguments.output_len,
        "rounds": arguments.rounds,
        "features": figures,
        "compiles_after_warmup": engine.loads().compiles_after_warmup,
        "device": engine.device.device_kind,
    }
    engine.shutdown()
    for kind, of_kind in figures.items():
        print(f"{kind:18}" + "  ".join(f"{name} {value}" for name, value in of_kind.items()))
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
