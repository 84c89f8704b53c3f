"""The client of a served engine, a process of its own: loads in, the times of their streams out, a JSON line each.

    python -m benchmarks.serving_client URL

The URL is grpc://HOST:PORT, vllm://HOST:PORT or http://HOST:PORT. A load is {"model", "prompts": [[token id], or text],
"output_len", "return_text"} with "concurrency" (a closed loop: so many streams are
open, and where one ends the next begins) or "rate" (an open loop: requests a second, at the times of a Poisson process
drawn from "seed", however slow the server is). The answer has the `streams`, how `late` the open loop sent, and this
process's `cpu_seconds`.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterable
from dataclasses import replace

from benchmarks.latency import at_times, closed_loop, follow, poisson_times
from benchmarks.load.targets import Address, Target, connect
from benchmarks.workload import greedy_request
from jaxserve.events import Event
from jaxserve.request import Request
from rpc.event_loop import new_event_loop


def request_of(load: dict, prompt: str | list[int]) -> Request:
    """A request of a load."""
    given = prompt if isinstance(prompt, str) else tuple(prompt)
    return replace(greedy_request(given, load["output_len"], return_text=load["return_text"]), model=load.get("model"))


async def run_load(target: Target, load: dict) -> dict:
    """One load."""
    requests = [request_of(load, prompt) for prompt in load["prompts"]]

    def send(request: Request) -> AsyncIterable[Event]:
        return target.send(request, timeout=None)

    cpu = time.process_time()
    if "rate" in load:
        times = poisson_times(time.monotonic(), load["rate"], len(requests), load["seed"])
        due = zip(times, requests, strict=True)
        streams, late = await at_times(lambda request, sent: follow(send(request), sent), due)
    else:
        streams, late = await closed_loop(send, requests, load["concurrency"]), [0.0]
    return {
        "streams": [stream.to_json() for stream in streams],
        "late": max(late),
        "cpu_seconds": time.process_time() - cpu,
    }


async def answer_loads(url: str) -> None:
    """Answers loads until the input ends."""
    async with connect(Address(url)) as target:
        print(json.dumps({"ready": True}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await run_load(target, json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(answer_loads(sys.argv[1]), loop_factory=new_event_loop)
