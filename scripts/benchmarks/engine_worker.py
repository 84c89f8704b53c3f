"""Our engine as a benchmark's worker: the same lines in and out as the peers' (see scripts/peers).

    python -m benchmarks.engine_worker CONFIG      the EngineConfig as JSON

Cases: {"case", "prompts": [[token id]], "output_len"}, with "return_text" to have text made as well, and "concurrency"
to submit a request only when another has ended; with case

    decode   the steps in which all sequences decode and no prompt rides along
    offline  prompts and output_len tokens each, end to end
    prefill  prompts alone, one token from each
"""

import asyncio
import json
import sys
import time

from benchmarks.latency import closed_loop
from benchmarks.steps import step_seconds
from benchmarks.workload import greedy_request
from jaxserve import Engine, EngineConfig


def measure(
    engine: Engine,
    case: str,
    prompts: list[list[int]],
    output_len: int,
    return_text: bool = False,
    concurrency: int | None = None,
) -> dict[str, float]:
    """One round of a case."""
    length = 1 if case == "prefill" else output_len
    requests = [greedy_request(tuple(prompt), length, return_text=return_text) for prompt in prompts]
    first = engine.loads().steps
    start = time.perf_counter()
    if concurrency is None:
        done = engine.generate(requests)
    else:
        done = asyncio.run(closed_loop(engine.submit, requests, concurrency))
    seconds = time.perf_counter() - start
    made = sum(len(one.token_ids) for one in done)
    if made != len(prompts) * length:
        raise RuntimeError(f"{made} tokens came out of {len(prompts)} x {length}")
    if case == "prefill":
        made = sum(map(len, prompts))
    elif case == "decode":
        records = [record for record in engine.step_records if record.step > first]
        intervals = step_seconds(records, len(prompts), mixed=False)
        seconds, made = sum(intervals), len(intervals) * len(prompts)
    return {"seconds": seconds, "tokens": made, "tokens_per_s": made / seconds}


def main() -> int:
    """Answers cases until the input ends."""
    config = EngineConfig.from_json(json.loads(sys.argv[1]))
    with Engine(config) as engine:
        ready = {"device": engine.device.device_kind, "attention": engine.device.attention}
        print(json.dumps({**ready, "vocab_size": engine.model_config.vocab_size}), flush=True)
        for line in sys.stdin:
            print(json.dumps(measure(engine, **json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
