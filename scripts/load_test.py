"""Loads a running server by gRPC or HTTP, and checks what it promises while it does.

    jaxserve serve --http-port 8000 &
    python scripts/load_test.py --url grpc://127.0.0.1:50051 --load closed:1 closed:8 closed:32 --plot plots --json
    python scripts/load_test.py --url http://127.0.0.1:8000 --load poisson:2 --cancel-share 0.1 --slow-share 0.05
    python scripts/load_test.py --sweep 0.5:8 --limit ttft=0.5 --limit itl=0.1 --duration 60

Loads, one after another:  closed:STREAMS  poisson:RATE  burst:REQUESTS/SECONDS  ramp:FROM-TO  trace:FILE
Lengths in tokens:         128  uniform:16-256  lognormal:MEDIAN,SIGMA

Latencies count from when a request should have been sent, so a client that is late does not flatter the server; where
the client may be what was measured, `client_bound` says so. Checked: every accepted request has exactly one terminal
message, its messages have as many tokens as its usage says and as were asked for, those that are cancelled end, and
the server's gauges are back at their baseline afterwards. Exit status 1 where anything of it was broken.
"""

import argparse
import asyncio
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.load.client import Part
from benchmarks.load.clients import Clients, Run, processes_for
from benchmarks.load.drawing import draw
from benchmarks.load.figures import LIMITS, Limits, figures_of
from benchmarks.load.gauges import Gauges, Sample, open_gauges
from benchmarks.load.plan import Load, Mix
from benchmarks.load.sweep import Trial, highest_rate, parse_range
from benchmarks.load.targets import Address
from benchmarks.plots import require_plots
from benchmarks.summary import Figure, report

from jaxserve.request_errors import EngineUnavailable

DEFAULT_URL = "grpc://127.0.0.1:50051"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=DEFAULT_URL, help="grpc:// grpcs:// http:// https:// (default: %(default)s)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with the key to send")
    parser.add_argument("--root-certificates", metavar="FILE", help="PEM file of the authorities to trust")
    what = parser.add_argument_group("load")
    what.add_argument("--load", nargs="+", default=[], metavar="LOAD", help="see above (default: closed:8)")
    what.add_argument("--sweep", metavar="LOW:HIGH", help="find the highest Poisson rate that keeps the limits")
    what.add_argument("--duration", type=float, default=30.0, help="seconds of a load, but of a trace (%(default)s)")
    what.add_argument("--requests", type=int, help="most requests of a load (default: as many as the duration gives)")
    what.add_argument("--prompt-len", default="128", metavar="LENGTHS", help="(default: %(default)s)")
    what.add_argument("--output-len", default="64", metavar="LENGTHS", help="(default: %(default)s)")
    what.add_argument(
        "--longest",
        type=int,
        default=2048,
        help="tokens of prompt and output together, whereat what was drawn is cut (default: %(default)s)",
    )
    what.add_argument("--text", metavar="FILE", help="cut prompts from this text (default: random token ids)")
    what.add_argument("--vocab-size", type=int, default=32000, help="of random ids (default: %(default)s)")
    what.add_argument(
        "--seed", type=int, help="(default: another each time, as a server that has seen a prompt may remember it)"
    )
    what.add_argument("--processes", type=int, help="clients (default: one for 256 streams, at most one a core)")
    mix = parser.add_argument_group("requests that do not behave, as shares of all")
    mix.add_argument("--cancel-share", type=float, default=0.0, help="the client leaves after some of the tokens")
    mix.add_argument("--deadline-share", type=float, default=0.0, help="with a deadline of --deadline seconds")
    mix.add_argument("--slow-share", type=float, default=0.0, help="waits --slow-pace seconds after each message")
    mix.add_argument("--deadline", type=float, default=Mix.deadline_seconds)
    mix.add_argument("--slow-pace", type=float, default=Mix.slow_seconds)
    out = parser.add_argument_group("what is reported")
    out.add_argument("--limit", action="append", default=[], metavar="NAME=SECONDS", help=f"of {', '.join(LIMITS)}")
    out.add_argument("--good-share", type=float, default=0.99, help="of a sweep's requests (default: %(default)s)")
    out.add_argument("--plot", type=Path, metavar="DIR", help="draw into this folder")
    out.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    if not arguments.load and not arguments.sweep:
        arguments.load = ["closed:8"]
    return arguments


@dataclass(frozen=True)
class Result:
    """One load that was run."""

    load: Load
    run: Run
    samples: list[Sample]
    figures: dict[str, Figure | list[str]]


class LoadTest:
    """Runs loads on one server. Raises ValueError for options that make no sense."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        key = arguments.api_key_file and arguments.api_key_file.read_text(encoding="utf-8").split()[0]
        self.address = Address(arguments.url, key, arguments.root_certificates)
        self.address.check()
        self.limits = Limits.parse(arguments.limit)
        self.mix = Mix(
            arguments.cancel_share,
            arguments.deadline_share,
            arguments.slow_share,
            arguments.deadline,
            arguments.slow_pace,
        )
        if not arguments.duration > 0:
            raise ValueError(f"--duration: must be more than 0, got {arguments.duration}")
        self.loads = [Load.parse(word) for word in arguments.load]
        self.sweep = None if arguments.sweep is None else parse_range(arguments.sweep)
        self.seed: int = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
        self.results: list[Result] = []
        # What the clients would fail at: the text, lengths and traces.
        if arguments.text is not None:
            Path(arguments.text).read_text(encoding="utf-8")
        for load in self.loads or [Load.parse("closed:1")]:
            next(self._part(load).plan(), None)

    async def run(self) -> dict[str, object]:
        """Runs everything; the report."""
        streams = max((load.amount for load in self.loads if load.kind in ("closed", "burst")), default=0.0)
        count = self.arguments.processes or processes_for(streams)
        async with open_gauges(self.address) as gauges, Clients(self.address, count) as clients:
            for load in self.loads:
                await self._run_load(load, clients, gauges)
            loads = [{"load": result.load.word, **result.figures} for result in self.results]
            done = {"url": self.address.url, "processes": count, "seed": self.seed, "loads": loads}
            if self.sweep is None:
                return done
            rate, trials = await self._sweep(*self.sweep, clients, gauges)
            swept = [{"rate": trial.rate, "kept": trial.kept, **trial.figures} for trial in trials]
            return {**done, "highest_rate": rate, "trials": swept}

    def _part(self, load: Load) -> Part:
        """The whole of a load, with prompts that no load before it had."""
        options = self.arguments
        return Part(
            load=load.word,
            start=0.0,
            duration=options.duration,
            requests=options.requests,
            prompt_len=options.prompt_len,
            output_len=options.output_len,
            longest=options.longest,
            mix=vars(self.mix),
            seed=self.seed + len(self.results),
            vocab_size=options.vocab_size,
            text=options.text,
            part=0,
            parts=1,
        )

    async def _run_load(self, load: Load, clients: Clients, gauges: Gauges | None) -> Result:
        run, leaked = Run(), []
        try:
            if gauges is not None:
                await gauges.start()
            run = await clients.run(self._part(load))
            if gauges is not None:
                await gauges.stop()
                leaked = await gauges.await_baseline()
        except EngineUnavailable as error:
            leaked = [f"the server no longer tells its gauges: {error}"]
        samples = [] if gauges is None else gauges.samples
        figures = {**figures_of(run, self.limits, leaked), "gauges_read": gauges is not None}
        result = Result(load, run, samples, figures)
        self.results.append(result)
        return result

    async def _sweep(
        self, low: float, high: float, clients: Clients, gauges: Gauges | None
    ) -> tuple[float | None, list[Trial]]:
        async def attempt(rate: float) -> Trial:
            figures = (await self._run_load(Load.parse(f"poisson:{rate:.4g}"), clients, gauges)).figures
            share = figures["good_share"]
            kept = isinstance(share, float | int) and share >= self.arguments.good_share and not figures["refused"]
            print(f"rate {rate:.4g}: good share {share}, {'kept' if kept else 'not kept'}", file=sys.stderr)
            return Trial(rate, kept, figures)

        return await highest_rate(attempt, low, high)


def main() -> int:
    """Runs the test."""
    arguments = parse_arguments()
    if arguments.plot is not None:
        require_plots()
    try:
        test = LoadTest(arguments)
    except (ValueError, OSError) as error:
        print(f"load_test: {error}", file=sys.stderr)
        return 2
    try:
        result = asyncio.run(test.run())
    except OSError as error:
        print(f"load_test: {test.address.url}: {str(error) or 'was not ready in time'}", file=sys.stderr)
        return 2
    if arguments.plot is not None:
        draw(arguments.plot, [(one.load, one.run, one.samples) for one in test.results])
    report(result, arguments.json)  # pyright: ignore[reportArgumentType]
    for one in test.results:
        if one.run.client_bound:
            print(f"{one.load.word}: the client may be what was measured: {one.run.client_bound}", file=sys.stderr)
    return 1 if any(one.figures["broken"] for one in test.results) else 0


if __name__ == "__main__":
    sys.exit(main())
