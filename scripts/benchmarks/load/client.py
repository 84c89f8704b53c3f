"""A client of a load test, a process of its own: loads in, outcomes out, a JSON line each.

    python -m benchmarks.load.client

The first line is the address; when there is a connection a `ready` line is printed. Each line after it is a `Part`: for
every request an `outcome` line is printed as it ends, twice a second a `progress` line, and at the end a `done` line.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.latency import at_times, in_turn
from benchmarks.load.lengths import Lengths
from benchmarks.load.outcome import run_planned
from benchmarks.load.plan import Load, Mix, Planned, make_plan
from benchmarks.load.targets import Address, Target, connect
from benchmarks.workload import greedy_request, random_prompts
from jaxserve.request import Request
from rpc.event_loop import new_event_loop

PROGRESS_INTERVAL = 0.5
"""Seconds between progress lines."""
REFUSED_PAUSE = 1.0
"""Seconds after which a stream of a closed loop comes again that was refused: asking without a pause would take the
server's time from the requests that it serves, and the share of refusals would be that of how fast it says no."""
CHARACTERS_A_TOKEN = 4
"""Of English text, about."""


@dataclass(frozen=True)
class Part:
    """What one of several clients sends: every `parts`-th request of a plan that all of them make."""

    load: str
    start: float
    """Monotonic second at which the load begins, the same for all."""
    duration: float
    requests: int | None
    prompt_len: str
    output_len: str
    longest: int
    """Tokens of prompt and output together."""
    mix: dict[str, float]
    seed: int
    vocab_size: int
    text: str | None
    """File whose text the prompts are cut from; None makes random token ids."""
    part: int
    parts: int

    def plan(self) -> Iterator[Planned]:
        """This client's requests."""
        load = Load.parse(self.load)
        prompts, outputs = Lengths.parse(self.prompt_len), Lengths.parse(self.output_len)
        plan = make_plan(load, self.duration, self.requests, prompts, outputs, self.longest, Mix(**self.mix), self.seed)
        # A client without a stream sends nothing.
        parts = min(self.parts, round(load.amount)) if load.kind == "closed" else self.parts
        for planned in plan:
            if planned.at is None and time.monotonic() > self.start + self.duration:
                return
            if planned.index % parts == self.part:
                yield planned


class Client:
    """Sends one part after another to a target."""

    def __init__(self, target: Target):
        self._target = target
        self._counts = {"sent": 0, "open": 0, "tokens": 0}

    async def run(self, part: Part) -> None:
        """One part, from its first request to the end of its last."""
        texts = None if part.text is None else Path(part.text).read_text(encoding="utf-8")
        load, late = Load.parse(part.load), [0.0]
        cpu = time.process_time()

        async def send(planned: Planned, sent: float) -> None:
            self._counts["sent"] += 1
            self._counts["open"] += 1
            outcome = await run_planned(self._target, planned, make_request(planned, part, texts), sent)
            self._counts["open"] -= 1
            self._counts["tokens"] += outcome.tokens
            tell("outcome", vars(outcome))
            if outcome.ending == "refused" and load.kind == "closed":
                await asyncio.sleep(REFUSED_PAUSE)

        reporting = asyncio.create_task(self._report())
        await asyncio.sleep(max(0.0, part.start - time.monotonic()))
        if load.kind == "closed":
            streams, rest = divmod(round(load.amount), part.parts)
            await in_turn(send, part.plan(), streams + (part.part < rest))
        else:
            due = ((part.start + (planned.at or 0.0), planned) for planned in part.plan())
            late = (await at_times(send, due))[1] or late
        reporting.cancel()
        tell("done", {"cpu_seconds": time.process_time() - cpu, "seconds": time.monotonic() - part.start, "late": late})

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL)
            tell("progress", self._counts)


def make_request(planned: Planned, part: Part, text: str | None) -> Request:
    """The request of a plan; the same seed gives the same one."""
    seed = part.seed * 1_000_003 + planned.index
    if text is None:
        (token_ids,) = random_prompts(1, planned.prompt_tokens, part.vocab_size, seed)
        return greedy_request(token_ids, planned.output_tokens)
    length = planned.prompt_tokens * CHARACTERS_A_TOKEN
    begin = random.Random(seed).randrange(max(1, len(text) - length))
    return greedy_request(text[begin : begin + length], planned.output_tokens)


def tell(what: str, value: object) -> None:
    """One line to the parent."""
    sys.stdout.write(json.dumps({what: value}) + "\n")
    sys.stdout.flush()


async def main() -> None:
    """Runs the parts that come in."""
    address = Address(**json.loads(sys.stdin.readline()))
    async with connect(address) as target:
        client = Client(target)
        tell("ready", True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            await client.run(Part(**json.loads(line)))


if __name__ == "__main__":
    asyncio.run(main(), loop_factory=new_event_loop)
