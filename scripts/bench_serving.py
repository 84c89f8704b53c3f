"""Latency and throughput of a served engine, on loopback.

    python scripts/bench_serving.py --concurrency 1 8 32 --rate 2 --compare-offline --json
    python scripts/bench_serving.py --simulated-step-ms 20 --slots 128 --concurrency 128 --prompt-len 16

The server is `jaxserve serve` and the client a process of its own; both share the machine's cores, so the CPU time of
each is reported. --concurrency is a closed loop: so many streams are open, and where one ends the next begins. --rate
is an open one: requests a second at random times, however slow the server is; latencies count from when a request
should have been sent. Figures are medians over the rounds:

    ttft_ms_*   from sending to the first token            tpot_ms_*  mean time of a token after the first
    itl_ms_*    between messages, as they come             e2e_ms_*   from sending to the last token
    goodput_rps  requests a second that keep within every limit given (--ttft-limit-ms, --tpot-limit-ms)

--protocol is the native one (grpc), that of smg's workers (vllm) or OpenAI's completions (http). --through-smg puts the
gateway smg between: the client speaks OpenAI HTTP to it, and it vllm to the server; its CPU time is reported apart. It
takes text alone, so prompts are then words of one token each.

--compare-offline does the work of the closed loops, as many requests at a time, in a process without a server as well,
in turn with the server, and reports served over offline output tokens a second.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine_arguments import add_engine_arguments, add_run_arguments, engine_config
from benchmarks.gateway import Gateway
from benchmarks.latency import StreamTimes, latency_figures
from benchmarks.machine import OtherLoad, cpu_seconds, process_tree
from benchmarks.plots import distributions, lines, require_plots
from benchmarks.server import ServerProcess
from benchmarks.summary import Figure, median_of, report
from benchmarks.workers import Worker, python_module
from benchmarks.workload import random_prompts, random_texts

from jaxserve.checkpoints.description import describe_model
from jaxserve.tokenizing.tokenizer import Tokenizer


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser, core="process")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[], help="streams of a closed loop")
    parser.add_argument("--rate", type=float, nargs="+", default=[], help="requests a second of an open loop")
    parser.add_argument(
        "--requests", type=int, default=None, help="of a round; by default twice the concurrency, or 64"
    )
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--protocol", choices=("grpc", "vllm", "http"), default="grpc", help="of the client")
    parser.add_argument("--through-smg", action="store_true", help="put the gateway smg before the server")
    parser.add_argument("--ttft-limit-ms", type=float, default=None)
    parser.add_argument("--tpot-limit-ms", type=float, default=None)
    parser.add_argument("--no-text", action="store_true", help="ask for token ids alone")
    parser.add_argument("--compare-offline", action="store_true")
    parser.add_argument("--plot", type=Path, default=None, metavar="DIR", help="draw into this folder")
    add_run_arguments(parser, rounds=3)
    arguments = parser.parse_args()
    if not arguments.concurrency and not arguments.rate:
        arguments.concurrency = [arguments.slots]
    return arguments


@dataclass(frozen=True)
class Load:
    """How requests are sent."""

    kind: str
    """`concurrency` or `rate`."""
    amount: float
    requests: int

    @property
    def name(self) -> str:
        """For a line of output or a drawing's legend."""
        return f"{self.kind} {self.amount:g}"

    def message(self, prompts: Sequence[tuple[int, ...] | str], arguments: argparse.Namespace, seed: int) -> dict:
        """What the client is told."""
        work = {"prompts": prompts, "output_len": arguments.output_len, "return_text": not arguments.no_text}
        return {**work, self.kind: self.amount, "seed": seed}


def loads_of(arguments: argparse.Namespace) -> list[Load]:
    """The loads that the command line asks for."""
    closed = [Load("concurrency", amount, arguments.requests or 2 * amount) for amount in arguments.concurrency]
    return closed + [Load("rate", amount, arguments.requests or 64) for amount in arguments.rate]


def within_limits(stream: StreamTimes, arguments: argparse.Namespace) -> bool:
    """Whether a request kept within every limit that is given."""
    ttft, tpot = arguments.ttft_limit_ms, arguments.tpot_limit_ms
    return (ttft is None or 1e3 * stream.first_token <= ttft) and (
        tpot is None or 1e3 * (stream.per_token or 0.0) <= tpot
    )


class Bench:
    """A server, its client, and if wanted an engine without a server."""

    def __init__(self, arguments: argparse.Namespace, stack: ExitStack):
        self._arguments = arguments
        loads = loads_of(arguments)
        config = engine_config(arguments, max_waiting=max(load.requests for load in loads))
        model, tokenizer = describe_model(arguments.model)
        self._vocab_size = model.vocab_size
        self.server = stack.enter_context(ServerProcess(config))
        self._gateway: Gateway | None = None
        self._tokenizer: Tokenizer | None = None
        if arguments.through_smg:
            self._gateway = stack.enter_context(Gateway([self.server.address]))
            self._tokenizer = Tokenizer.from_source(tokenizer)
        self._client = stack.enter_context(Worker(python_module("benchmarks.serving_client", self._url())))
        self._offline: Worker | None = None
        if arguments.compare_offline:
            alone = json.dumps(asdict(replace(config, core="thread")))
            self._offline = stack.enter_context(Worker(python_module("benchmarks.engine_worker", alone)))
        self._seed = 0
        self.streams: dict[str, list[StreamTimes]] = {}
        """All streams of each load, by its name."""

    def _url(self) -> str:
        """Where the client sends requests."""
        if self._gateway is not None:
            return self._gateway.url
        protocol = self._arguments.protocol
        return f"{protocol}://{self.server.http_address if protocol == 'http' else self.server.address}"

    def _prompts(self, count: int) -> Sequence[tuple[int, ...] | str]:
        self._seed += 1
        if self._tokenizer is not None:
            return random_texts(count, self._arguments.prompt_len, self._tokenizer, self._seed)
        return random_prompts(count, self._arguments.prompt_len, self._vocab_size, self._seed)

    def run_load(self, load: Load) -> dict[str, Figure]:
        """All rounds of a load, after one that does not count."""
        self._client.measure(self._message(load, self._prompts(min(load.requests, 8))))
        rounds = [self._run_round(load) for _ in range(self._arguments.rounds)]
        return {load.kind: load.amount, "requests": load.requests, **median_of(rounds)}

    def _run_round(self, load: Load) -> dict[str, Figure]:
        prompts = self._prompts(load.requests)
        gateway = [] if self._gateway is None else [self._gateway.pid]
        processes = [*self.server.processes, *process_tree(self._client.pid), *gateway]
        others, cpu, gateway_cpu = OtherLoad(processes), self.server.cpu_seconds(), cpu_seconds(gateway)
        answer = self._client.measure(self._message(load, prompts))
        cpu, other_load = self.server.cpu_seconds() - cpu, others.share()
        gateway_cpu = cpu_seconds(gateway) - gateway_cpu
        streams = [StreamTimes(**stream) for stream in answer["streams"]]
        self._check(streams, load)
        self.streams.setdefault(load.name, []).extend(streams)
        seconds = max(stream.ended for stream in streams) - min(stream.sent for stream in streams)
        good = sum(within_limits(stream, self._arguments) for stream in streams)
        latencies = latency_figures(streams)
        served, offline = sum(stream.tokens for stream in streams) / seconds, self._run_offline(load)
        return {
            "output_tokens_per_s": served,
            "requests_per_s": len(streams) / seconds,
            **latencies,
            "itl_p99_steps": self._in_steps(latencies["itl_ms_p99"]),
            "goodput_rps": good / seconds,
            "good_share": good / len(streams),
            "client_late_ms": 1e3 * answer["late"],
            "server_cpu_s": cpu,
            "client_cpu_s": answer["cpu_seconds"],
            "gateway_cpu_s": gateway_cpu if gateway else None,
            "wall_s": seconds,
            "other_load": other_load,
            "offline_tokens_per_s": offline,
            "served_over_offline": None if offline is None else served / offline,
        }

    def _message(self, load: Load, prompts: Sequence[tuple[int, ...] | str]) -> dict:
        """What the client is told; the gateway must be told which model is meant."""
        return {**load.message(prompts, self._arguments, self._seed), "model": self.server.model}

    def _in_steps(self, milliseconds: float | None) -> float | None:
        step = self._arguments.simulated_step_ms
        return None if step is None or milliseconds is None else milliseconds / step

    def _check(self, streams: list[StreamTimes], load: Load) -> None:
        told, wanted = sum(stream.tokens for stream in streams), load.requests * self._arguments.output_len
        made = told if self._gateway is not None else sum(len(stream.token_ids) for stream in streams)
        if made != wanted or told != wanted:
            raise RuntimeError(f"{made} of {wanted} tokens were delivered, and usage says {told}")

    def _run_offline(self, load: Load) -> float | None:
        """Output tokens a second of the same amount of work without a server."""
        if self._offline is None or load.kind != "concurrency":
            return None
        self._seed += 1
        prompts = random_prompts(load.requests, self._arguments.prompt_len, self._vocab_size, self._seed)
        message = load.message(prompts, self._arguments, self._seed)
        del message["seed"]
        return self._offline.measure({"case": "offline", **message})["tokens_per_s"]


def draw(folder: Path, bench: Bench, results: list[dict[str, Figure]]) -> None:
    """Draws the distributions of latencies, and throughput over concurrency."""
    streams = bench.streams
    panels = {
        "time to first token, ms": {k: [1e3 * one.first_token for one in v] for k, v in streams.items()},
        "time a token after the first, ms": {k: [1e3 * (one.per_token or 0) for one in v] for k, v in streams.items()},
        "between messages, ms": {k: [1e3 * gap for one in v for gap in one.gaps] for k, v in streams.items()},
    }
    distributions(folder / "serving_latency.png", panels, "Latency of a served engine")
    closed = [one for one in results if "concurrency" in one]
    if len(closed) > 1:
        series = {}
        for name, figure in (("served", "output_tokens_per_s"), ("offline", "offline_tokens_per_s")):
            points = [(float(one["concurrency"] or 0), float(one[figure] or 0)) for one in closed if one[figure]]
            if points:
                series[name] = points
        lines(folder / "throughput_over_concurrency.png", series, "concurrency", "output tokens/s")


def main() -> int:
    """Runs the benchmark."""
    arguments = parse_arguments()
    if arguments.plot is not None:
        require_plots()
    with ExitStack() as stack:
        bench = Bench(arguments, stack)
        results: list[dict[str, Figure]] = []
        for load in loads_of(arguments):
            print(f"measuring {load.name}", file=sys.stderr)
            results.append(bench.run_load(load))
        settings = {
            "model": arguments.model if arguments.simulated_step_ms is None else "simulated",
            "simulated_step_ms": arguments.simulated_step_ms,
            "dtype": arguments.dtype,
            "quantization": arguments.quantization,
            "slots": arguments.slots,
            "core": arguments.core,
            "protocol": "http through smg" if arguments.through_smg else arguments.protocol,
            "prompt_len": arguments.prompt_len,
            "output_len": arguments.output_len,
            "rounds": arguments.rounds,
            "server_ready_s": bench.server.ready_seconds,
        }
    if arguments.plot is not None:
        draw(arguments.plot, bench, results)
    if len(results) == 1:
        report({**settings, **results[0]}, arguments.json)
    else:
        # In JSON the first load's figures stand at the top as well, where those of a single load are.
        report({**settings, "loads": results}, arguments.json, also=results[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
