"""The client of a served engine, a process of its own: loads in, the times of their streams out, a JSON line each.

    python -m benchmarks.serving_client ADDRESS

A load is {"prompts": [[token id]], "output_len", "return_text"} with "concurrency" (a closed loop: so many streams are
open, and where one ends the next begins) or "rate" (an open loop: requests a second, at the times of a Poisson process
drawn from "seed", however slow the server is). The answer has the `streams`, how `late` the open loop sent, and this
process's `cpu_seconds`.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterable

from benchmarks.latency import at_times, closed_loop, follow, poisson_times
from benchmarks.workload import greedy_request
from jaxserve.request import Event, Request
from rpc.client import AsyncClient


async def run_load(client: AsyncClient, load: dict) -> dict:
    """One load."""
    text = load["return_text"]
    requests = [greedy_request(tuple(prompt), load["output_len"], return_text=text) for prompt in load["prompts"]]

    def send(request: Request) -> AsyncIterable[Event]:
        return client.generate(request).events()

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


async def answer_loads(address: str) -> None:
    """Answers loads until the input ends."""
    async with AsyncClient(address) as client:
        await client.wait_until_ready()
        print(json.dumps({"ready": True}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await run_load(client, json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(answer_loads(sys.argv[1]))
