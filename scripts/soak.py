"""Seeded chaos on a server, and what must be as before at its end.

    python scripts/soak.py                                    half an hour on SmolLM2
    python scripts/soak.py --minutes 2 --simulated-step-ms 5 --json
    python scripts/soak.py --address 127.0.0.1:50051 --pid 4711      a server that runs already

Clients send requests of every kind without a pause: many lengths, priorities, n, sampled and greedy, cancelled,
aborted, with deadlines, read slowly, refused, and on connections that are cut. Meanwhile a canary asks the same of the
server again and again. It fails, with exit status 1, where

    memory         of the server's processes grows by more than 1 MB an hour after the warm-up (every page of the cache
                   used once, in a long run every step record too, and then a third of the time), by more than twice
                   the error of that slope, which is reported with it; a run of less than 15 minutes after that cannot
                   tell so little: see soak/trend.py
    descriptors    are more at the end than after the warm-up
    pages          are not all free or evictable at the end, or requests are still open
    recompiles     are not 0
    canary         gives other tokens once
    promises       are broken: a request without its one terminal message, a wrong count, a refusal of what is valid
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine_arguments import add_engine_arguments, engine_config
from benchmarks.machine import descriptors, process_tree, resident_bytes
from benchmarks.plots import require_plots, samples_over_time
from benchmarks.server import ServerProcess
from benchmarks.soak.chaos import Chaos, Limits, limits_of
from benchmarks.soak.trend import LONG_RUN, memory_limit, trend_of
from benchmarks.summary import report, rounded
from benchmarks.workload import random_prompts

from jaxserve.front.delivery import STEP_RECORDS
from jaxserve.request import Request, SamplingParams, StoppingParams
from rpc.client import AsyncClient

SAMPLE_INTERVAL = 0.5
"""Seconds between samples of the processes."""
CANARY_INTERVAL = 3.0
"""Seconds between canaries."""
FILL_SEED = 1 << 40
"""Of prompts that no client sends."""
CANARY = Request(
    token_ids=tuple(range(300, 330)),
    sampling=SamplingParams(temperature=0.0),
    stopping=StoppingParams(max_tokens=16, ignore_eos=True),
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser, core="process")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warmup", type=float, default=None, help="seconds that do not count (default: a third)")
    parser.add_argument("--clients", type=int, default=48, help="at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--settle", type=float, default=30.0, help="seconds in which a server must be at rest once its clients are"
    )
    parser.add_argument("--address", help="of a server that runs, instead of one of its own")
    parser.add_argument("--pid", type=int, help="of that server")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw into this folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    if (arguments.address is None) != (arguments.pid is None):
        parser.error("--address and --pid: both or neither must be given")
    return arguments


@dataclass
class Watched:
    """What was seen of the server's processes, by monotonic second."""

    pids: list[int]
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Bytes."""
    descriptors: list[tuple[float, float]] = field(default_factory=list)

    def sample(self) -> None:
        """Takes one sample."""
        now = time.monotonic()
        self.memory.append((now, resident_bytes(self.pids)))
        self.descriptors.append((now, descriptors(self.pids)))

    async def run(self) -> None:
        """Takes samples until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(SAMPLE_INTERVAL)


class Canary:
    """The same request again and again, whose tokens must never change."""

    def __init__(self, client: AsyncClient):
        self._client = client
        self.asked = 0
        self.wrong: list[str] = []
        self._expected: tuple[int, ...] = ()

    async def ask(self) -> None:
        """Once. The first answer is the one to be had ever after."""
        tokens = (await self._client.generate_once(CANARY)).token_ids
        self._expected = self._expected or tokens
        self.asked += 1
        if tokens != self._expected:
            self.wrong.append(f"canary {self.asked}: {tokens}, not {self._expected}")

    async def run(self) -> None:
        """Asks until cancelled."""
        while True:
            await asyncio.sleep(CANARY_INTERVAL)
            await self.ask()


async def at_rest(client: AsyncClient, settle: float) -> list[str]:
    """Waits until nothing runs or waits and all pages are free or evictable; what is not, after `settle` seconds."""
    deadline = time.monotonic() + settle
    while True:
        loads = await client.loads()
        held = loads.total_pages - loads.available_pages
        left = {"running": loads.running, "waiting": loads.waiting, "open calls": loads.open_calls, "pages": held}
        kept = [f"{count} {name} at rest" for name, count in left.items() if count]
        if not kept or time.monotonic() > deadline:
            return kept
        await asyncio.sleep(0.1)


async def fill(client: AsyncClient, limits: Limits, settle: float) -> None:
    """Uses every page of the cache once, with prompts of full length: what is noted of each is no growth later on."""
    loads, before, number = await client.loads(), -1, 0
    while before < loads.cached_pages < loads.total_pages:
        prompts = random_prompts(loads.slots, limits.max_context - 1, limits.vocab_size, FILL_SEED + number)
        requests = [Request(token_ids=prompt, stopping=StoppingParams(max_tokens=1)) for prompt in prompts]
        await asyncio.gather(*(client.generate_once(request) for request in requests))
        await at_rest(client, settle)
        before, loads, number = loads.cached_pages, await client.loads(), number + 1


async def fill_history(client: AsyncClient, limits: Limits) -> None:
    """Takes as many steps as the server keeps records of."""
    prompt = CANARY.token_ids or ()
    stopping = StoppingParams(max_tokens=limits.max_context - len(prompt), ignore_eos=True)
    while (await client.loads()).steps < STEP_RECORDS:
        await client.generate_once(Request(token_ids=prompt, stopping=stopping))


async def soak(arguments: argparse.Namespace, address: str, pids: list[int]) -> dict[str, object]:
    """Runs it; the report."""
    seconds = 60 * arguments.minutes
    warm_up = seconds / 3 if arguments.warmup is None else arguments.warmup
    watched = Watched(pids)
    async with AsyncClient(address) as client:
        await client.wait_until_ready()
        canary = Canary(client)
        await canary.ask()
        limits = await limits_of(client)
        chaos = [Chaos(client, limits, 1_000_003 * arguments.seed + number) for number in range(arguments.clients)]
        await fill(client, limits, arguments.settle)
        if seconds - warm_up >= LONG_RUN:
            await fill_history(client, limits)
        kept = await at_rest(client, arguments.settle)
        start = time.monotonic()
        beside = [asyncio.create_task(task) for task in (watched.run(), canary.run())]
        await asyncio.gather(*(one.run(start + warm_up) for one in chaos))
        kept += await at_rest(client, arguments.settle)
        descriptors_before = descriptors(pids)
        counted_from = time.monotonic()
        await asyncio.gather(*(one.run(start + seconds) for one in chaos))
        for task in beside:
            task.cancel()
        ended = await asyncio.gather(*beside, return_exceptions=True)
        kept += await at_rest(client, arguments.settle)
        await asyncio.sleep(1.0)  # connections that were cut are closed by both sides
        watched.sample()
        descriptors_after = descriptors(pids)
        await canary.ask()
        loads = await client.loads()
        recompiles = loads.compiles_after_warmup
    trend = trend_of([(at, value / 1e6 * 3600) for at, value in watched.memory if at >= counted_from])
    broken = [*kept, *canary.wrong, *(text for one in chaos for text in one.broken)]
    broken += [f"{error!r}" for error in ended if not isinstance(error, asyncio.CancelledError)]
    limit = memory_limit(seconds - warm_up)
    if trend is None:
        broken.append("memory was seen too few times after the warm-up to tell of it")
    elif trend.exceeds(limit):
        broken.append(f"memory grows by {trend.slope:.3g} MB an hour, give or take {trend.error:.2g}")
    if descriptors_after > descriptors_before:
        broken.append(f"descriptors: {descriptors_after} at the end, {descriptors_before} after the warm-up")
    if recompiles:
        broken.append(f"{recompiles} programs were compiled")
    if arguments.plot is not None:
        panels = {"MB": [(at, value / 1e6) for at, value in watched.memory], "descriptors": watched.descriptors}
        samples_over_time(arguments.plot / "soak.png", panels, counted_from, "The server's processes under chaos")
    return {
        "seed": arguments.seed,
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "done": sum((one.done for one in chaos), start=Counter()),
        "memory_mb": rounded(watched.memory[-1][1] / 1e6),
        "memory_slope_mb_per_hour": None if trend is None else rounded(trend.slope),
        "memory_slope_error": None if trend is None else rounded(trend.error),
        "memory_limit": limit,
        "steps": loads.steps,
        "descriptors_before": descriptors_before,
        "descriptors_after": descriptors_after,
        "recompiles": recompiles,
        "canaries": canary.asked,
        "broken": len(broken),
        "broken_first": broken[:20],
    }


def main() -> int:
    """Runs the soak."""
    arguments = parse_arguments()
    if arguments.plot is not None:
        require_plots()
    with ExitStack() as stack:
        if arguments.address is None:
            server = stack.enter_context(ServerProcess(engine_config(arguments)))
            address, pids = server.address, server.processes
        else:
            address, pids = arguments.address, process_tree(arguments.pid)
        result = asyncio.run(soak(arguments, address, pids))
    report(result, arguments.json)  # pyright: ignore[reportArgumentType]
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
