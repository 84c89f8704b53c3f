"""Runs engines in a process with as many virtual CPU devices as its environment asks for.

Standard input has a JSON list of engine configurations; standard output gets a JSON list of what each engine gave: the
tokens and log-probabilities of fixed requests, and how its weights and cache lie on the devices.
"""

import json
import random
import sys
from dataclasses import asdict

import jax

from jaxserve.core.client import CoreThread
from jaxserve.device.model_runner import ModelRunner
from jaxserve.engine import Engine, EngineStartError
from jaxserve.front.completion import collect
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams

REQUESTS = 12


def prompt_of(number: int) -> tuple[int, ...]:
    """Random tokens of a length that is random too, but for the one that others go on from."""
    source = random.Random(number)
    length = source.choice((1, 7, 40, 90))
    return tuple(source.randrange(3, 250) for _ in range(70 if number == 2 else length))


def make_request(number: int) -> Request:
    """Greedy, sampled, filtered and penalized requests in turn, with prompts from one token to several chunks. The last
    three go on from the prompt of the third, whose pages they find when slots are free for them; every third wants its
    prompt scored."""
    sampling = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=number),
        SamplingParams(temperature=0.9, seed=number, top_k=20, top_p=0.9, frequency_penalty=0.5, logit_bias={5: 2.0}),
    )[number % 4]
    prompt = prompt_of(number) if number < REQUESTS - 3 else prompt_of(2) + prompt_of(number)[:9]
    return Request(
        token_ids=prompt,
        sampling=sampling,
        stopping=StoppingParams(max_tokens=24, min_tokens=24),
        output=OutputParams(logprobs=2, prompt_logprobs=1 if number % 3 == 0 else None, return_text=False),
    )


def runners(engine: Engine) -> list[ModelRunner]:
    """Those of an engine whose core runs on threads of this process."""
    core = engine._core
    cores = getattr(core, "_cores", [core])
    assert all(isinstance(core, CoreThread) for core in cores)
    return [core._loop._runner for core in cores]


def device_bytes(arrays: object) -> list[int]:
    """Bytes of the arrays on each device that holds some."""
    held: dict[int, int] = {}
    for array in jax.tree.leaves(arrays):
        for shard in array.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return list(held.values())


def run(fields: dict) -> dict:
    """What one engine gives; only the error where it does not start."""
    try:
        engine = Engine(compilation_cache=None, **fields)
    except (EngineStartError, ValueError) as error:
        return {"error": str(error)}
    with engine:
        found = runners(engine)
        completions = [collect(stream) for stream in [engine.submit(make_request(n)) for n in range(REQUESTS)]]
        return {
            "tokens": [completion.token_ids for completion in completions],
            "logprobs": [[entry.logprob for entry in completion.logprobs] for completion in completions],
            "prompt_logprobs": [
                [entry.logprob for entry in completion.prompt_logprobs or () if entry is not None]
                for completion in completions
            ],
            "weights": [device_bytes(runner._weights) for runner in found],
            "cache": [device_bytes(runner._cache) for runner in found],
            "loads": asdict(engine.loads()),
            "taken_slots": [slot for record in engine.step_records for slot in record.taken_slots],
        }


if __name__ == "__main__":
    json.dump([run(fields) for fields in json.load(sys.stdin)], sys.stdout)
