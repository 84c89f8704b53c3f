"""Our engine and its peers on the same work, in turn, and the ratios.

    python scripts/bench_peers.py --peer-python PYTHON [--json]

PYTHON is an interpreter that has the peers: llama-cpp-python (its low-level API, one batch for all sequences) and
transformers with torch, gguf and accelerate (continuous batching). A peer that it lacks is reported as absent. Every
engine is a process of its own that waits while another is timed; a round times each of them once, on the same token
ids; figures are medians over the rounds. A measurement during which other processes took more of the machine than
--quiet allows is repeated; a case whose `quiet` is false was measured on a busy machine all the same, and its ratios
say nothing: llama.cpp's threads spin at barriers and lose far more to a neighbour than ours.

Ratios, ours over theirs: `bf16` against llama.cpp with bf16 weights, `best` our int8 and `int4` our int4 against
llama.cpp's Q4_0 (its fastest form; the shipped Q4_1 is a slow one), `continuous_batching` our bfloat16 against
transformers.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine_arguments import add_run_arguments
from benchmarks.summary import report, rounded
from benchmarks.workers import SCRIPTS, Worker, WorkerFailed, python_module
from benchmarks.workload import random_prompts

from jaxserve.checkpoints import registry
from jaxserve.config import EngineConfig, Quantization

ATTEMPTS = 5
"""Times a measurement is made, at most, for a quiet one."""
BATCH_TOKENS = 512


@dataclass(frozen=True)
class Case:
    """Work that every engine is given."""

    name: str
    kind: str
    """As the workers know it: decode, offline or prefill."""
    requests: int
    prompt_len: int
    output_len: int


CASES = (
    Case("decode_1", "decode", 1, 224, 64),
    Case("decode_8", "decode", 8, 224, 64),
    Case("decode_32", "decode", 32, 224, 64),
    Case("offline_32", "offline", 32, 128, 64),
    Case("alone", "offline", 1, 128, 64),
    Case("prompts", "prefill", 8, 512, 1),
)
"""Decoding is at 256 tokens of context on average."""

OURS_BF16, OURS_INT8, OURS_INT4 = "jaxserve bfloat16", "jaxserve int8", "jaxserve int4"
OURS = (OURS_BF16, OURS_INT8, OURS_INT4)
LLAMA_BF16, LLAMA_Q4_0, TRANSFORMERS = "llama.cpp bf16", "llama.cpp q4_0", "transformers"
PAIRS = {
    "bf16": (OURS_BF16, LLAMA_BF16),
    "best": (OURS_INT8, LLAMA_Q4_0),
    "int4": (OURS_INT4, LLAMA_Q4_0),
    "continuous_batching": (OURS_BF16, TRANSFORMERS),
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--model", default="smollm2-135m", help="a name from the registry, or a .gguf file")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=None, help="all if unset")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--threads", type=int, default=2, help="of the peers; ours takes what XLA takes")
    parser.add_argument(
        "--llama-kv",
        choices=("unified", "split"),
        default="split",
        help="one KV buffer for all sequences, or one for each: the faster, by 40 %% and more at 32 of them",
    )
    parser.add_argument("--quiet", type=float, default=0.05, help="share of the machine that others may take")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "jaxserve-peers", help="folder of converted models"
    )
    add_run_arguments(parser, rounds=5)
    return parser.parse_args()


def commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """How each system's worker is started."""
    model = Path(arguments.model)
    gguf = model if model.suffix == ".gguf" else registry.find(arguments.model)
    slots = max(case.requests for case in CASES)
    context = max(case.prompt_len + case.output_len for case in CASES)

    def ours(quantization: Quantization) -> list[str]:
        config = EngineConfig(model=arguments.model, quantization=quantization, slots=slots, max_context=2 * context)
        return python_module("benchmarks.engine_worker", json.dumps(asdict(config)))

    def peer(worker: str, *options: str) -> list[str]:
        script = str(SCRIPTS / "peers" / worker)
        return [arguments.peer_python, script, "--gguf", str(gguf), "--threads", str(arguments.threads), *options]

    def llama(form: str) -> list[str]:
        sizes = ["--sequences", str(slots), "--cells", str(slots * context), "--batch-tokens", str(BATCH_TOKENS)]
        files = ["--form", form, "--cache", str(arguments.cache), "--kv", arguments.llama_kv]
        return peer("llama_cpp_worker.py", *sizes, *files)

    return {
        OURS_BF16: ours("none"),
        LLAMA_BF16: llama("bf16"),
        OURS_INT8: ours("int8"),
        OURS_INT4: ours("int4"),
        LLAMA_Q4_0: llama("q4_0"),
        TRANSFORMERS: peer("transformers_worker.py", "--sequences", str(slots), "--context", str(context)),
    }


def missing_module(arguments: argparse.Namespace, system: str) -> str | None:
    """Why a peer cannot be run; None if its interpreter has it."""
    module = {LLAMA_BF16: "llama_cpp", LLAMA_Q4_0: "llama_cpp", TRANSFORMERS: "transformers"}.get(system)
    if module is None:
        return None
    try:
        found = subprocess.run([arguments.peer_python, "-c", f"import {module}"], capture_output=True, text=True)
    except FileNotFoundError:
        return f"there is no interpreter {arguments.peer_python}"
    return None if found.returncode == 0 else f"{module} cannot be imported by the --peer-python"


def start_workers(arguments: argparse.Namespace, stack: ExitStack) -> tuple[dict[str, Worker], dict[str, str]]:
    """The workers of the pairs asked for, and why others are absent. Ours must start: WorkerFailed is raised else."""
    wanted = {system for pair in arguments.pairs for system in PAIRS[pair]}
    workers: dict[str, Worker] = {}
    absent: dict[str, str] = {}
    for system, command in commands(arguments).items():
        if system not in wanted:
            continue
        reason = missing_module(arguments, system)
        if reason is not None:
            absent[system] = reason
            continue
        print(f"starting {system}", file=sys.stderr)
        try:
            workers[system] = stack.enter_context(Worker(command))
        except WorkerFailed as failure:
            if system in OURS:
                raise
            absent[system] = f"it did not start: {failure}"
    return workers, absent


def measure_quietly(worker: Worker, message: dict[str, object], quiet: float) -> dict:
    """The quietest of up to ATTEMPTS measurements; the first that is quiet enough ends them."""
    best: dict | None = None
    for _ in range(ATTEMPTS):
        measured = worker.measure(message)
        if measured["other_load"] is None:
            return measured
        if best is None or measured["other_load"] < best["other_load"]:
            best = measured
        if best["other_load"] <= quiet:
            break
    assert best is not None
    return best


def run_case(case: Case, workers: dict[str, Worker], vocab_size: int, arguments: argparse.Namespace) -> dict:
    """All rounds of a case: medians, how quiet the machine was, ratios, and the least and most of a round's ratio."""
    takers = {name: worker for name, worker in workers.items() if name != TRANSFORMERS or case.kind == "offline"}
    rates: dict[str, list[float]] = {name: [] for name in takers}
    loads: dict[str, list[float]] = {name: [] for name in takers}
    for number in range(arguments.rounds):
        prompts = random_prompts(case.requests, case.prompt_len, vocab_size, seed=number)
        message = {"case": case.kind, "prompts": prompts, "output_len": case.output_len}
        for name, worker in takers.items():
            measured = measure_quietly(worker, message, arguments.quiet)
            rates[name].append(measured["tokens_per_s"])
            loads[name].append(measured["other_load"] or 0.0)
            line = f"{measured['tokens_per_s']:9.1f} tokens/s, others took {loads[name][-1]:.0%}"
            print(f"{case.name:12} round {number + 1}  {name:18} {line}", file=sys.stderr)
    ratios = {}
    for pair in arguments.pairs:
        ours, theirs = PAIRS[pair]
        if ours in rates and theirs in rates:
            by_round = [a / b for a, b in zip(rates[ours], rates[theirs], strict=True)]
            ratios[pair] = {
                "ratio": rounded(statistics.median(rates[ours]) / statistics.median(rates[theirs])),
                "least": rounded(min(by_round)),
                "most": rounded(max(by_round)),
            }
    most = max(load for values in loads.values() for load in values)
    return {
        "quiet": most <= arguments.quiet,
        "tokens_per_s": {name: rounded(statistics.median(values)) for name, values in rates.items()},
        "other_load": {name: rounded(max(values)) for name, values in loads.items()},
        "ratios": ratios,
    }


def main() -> int:
    """Runs the benchmark."""
    arguments = parse_arguments()
    cases = [case for case in CASES if arguments.cases is None or case.name in arguments.cases]
    with ExitStack() as stack:
        workers, absent = start_workers(arguments, stack)
        ours = next(workers[name] for name in OURS if name in workers)
        vocab_size = ours.ready["vocab_size"]
        result = {
            "model": arguments.model,
            "rounds": arguments.rounds,
            "systems": {name: worker.ready for name, worker in workers.items()},
            "absent": absent,
            "cases": {case.name: run_case(case, workers, vocab_size, arguments) for case in cases},
        }
    busy = [name for name, case in result["cases"].items() if not case["quiet"]]
    if busy:
        print(f"the machine was busy: the ratios of {', '.join(busy)} say nothing", file=sys.stderr)
    report(result, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
