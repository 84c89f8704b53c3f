"""Short requests among long ones and among short ones: whether a request's end depends on who shares its steps."""

import asyncio
import random
import time

from benchmarks.latency import follow
from benchmarks.workload import greedy_request, random_prompts
from jaxserve import Engine
from jaxserve.events import Delta

PROMPT_LEN = 16
SHORT_LEN = 16
"""Tokens of a short request."""


class Neighbourhood:
    """Half of the slots are held by neighbours of one kind, and short requests pass through the other half.

    Each slot's first request has a random part of the usual length and is not measured: else all would begin and end in
    the same steps, and the figure would tell of that flood of prompts and not of the neighbours.

    Args:
        engine: with at least two slots.
        neighbour_len: tokens of a neighbour; when one ends the next takes its place.
        seed: of the prompts.
    """

    def __init__(self, engine: Engine, neighbour_len: int, seed: int):
        self._engine = engine
        self._neighbour_len = neighbour_len
        self._random = random.Random(seed)
        self._over = False
        self._probes_left = 0
        self._seconds: list[float] = []

    def measure(self, probes: int) -> list[float]:
        """Seconds from sending to the last token, of `probes` short requests."""
        self._probes_left = probes
        asyncio.run(self._run())
        return self._seconds

    async def _run(self) -> None:
        half = self._engine.config.slots // 2
        running = [asyncio.Event() for _ in range(half)]
        neighbours = [asyncio.create_task(self._keep_neighbour(event)) for event in running]
        await asyncio.gather(*(event.wait() for event in running))
        await asyncio.gather(*(self._send_probes() for _ in range(half)))
        self._over = True
        await asyncio.gather(*neighbours)

    def _prompt(self) -> tuple[int, ...]:
        vocab_size = self._engine.model_config.vocab_size
        return random_prompts(1, PROMPT_LEN, vocab_size, self._random.getrandbits(32))[0]

    async def _keep_neighbour(self, running: asyncio.Event) -> None:
        length = self._random.randint(1, self._neighbour_len)
        while not self._over:
            stream = self._engine.submit(greedy_request(self._prompt(), length))
            length = self._neighbour_len
            async for event in stream:
                if isinstance(event, Delta):
                    running.set()
                    if self._over:
                        stream.cancel()

    async def _send_probes(self) -> None:
        await follow(self._engine.submit(greedy_request(self._prompt(), self._random.randint(1, SHORT_LEN))), 0.0)
        while self._probes_left > 0:
            self._probes_left -= 1
            sent = time.monotonic()
            times = await follow(self._engine.submit(greedy_request(self._prompt(), SHORT_LEN)), sent)
            self._seconds.append(times.total)
