"""The client of a served engine, a process of its own: loads in, the times of their streams out, a JSON line each.

    python -m benchmarks.serving_client ADDRESS

A load is {"prompts": [[token id]], "output_len", "return_text"} with "concurrency" (a closed loop: so many streams are
open, and where one ends the next begins) or "rate" (an open loop: requests a second, at the times of a Poisson process
drawn from "seed", however slow the server is). The answer has the `streams`, how `late` the open loop sent, and this
process's `cpu_seconds`.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterable, Callable, Iterable

from benchmarks.latency import StreamTimes, closed_loop, follow
from benchmarks.workload import greedy_request
from jaxserve.request import Event, Request
from rpc.client import AsyncClient


async def open_loop(
    send: Callable[[Request], AsyncIterable[Event]], requests: Iterable[Request], rate: float, seed: int
) -> tuple[list[StreamTimes], float]:
    """Sends requests at the arrivals of a Poisson process; the streams, and by how many seconds the latest was late.

    Times count from when a request should have been sent: waiting for a slow server is part of its latency.
    """
    random_ = random.Random(seed)
    tasks: list[asyncio.Task[StreamTimes]] = []
    late = 0.0
    due = time.monotonic()
    for request in requests:
        due += random_.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        late = max(late, time.monotonic() - due)
        tasks.append(asyncio.create_task(follow(send(request), due)))
    return await asyncio.gather(*tasks), late


async def run_load(client: AsyncClient, load: dict) -> dict:
    """One load."""
    text = load["return_text"]
    requests = [greedy_request(tuple(prompt), load["output_len"], return_text=text) for prompt in load["prompts"]]

    def send(request: Request) -> AsyncIterable[Event]:
        return client.generate(request).events()

    cpu = time.process_time()
    if "rate" in load:
        streams, late = await open_loop(send, requests, load["rate"], load["seed"])
    else:
        streams, late = await closed_loop(send, requests, load["concurrency"]), 0.0
    return {
        "streams": [stream.to_json() for stream in streams],
        "late": late,
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
