"""Runs NVIDIA's aiperf against our HTTP front end and holds its figures against those of /metrics.

    python scripts/check_aiperf.py --environment FOLDER --simulated-step-ms 20

aiperf pulls in too much for the development environment: it lives in a virtual environment of its own, FOLDER, which
is made if it is not there. It counts tokens as the answers' usage does and has the model's tokenizer in a folder, so
that nothing is fetched but the packages. Prints one JSON object; exit status 1 where a request failed, a token count
differs, or mean latencies are further apart than the client's own part explains (--tolerance-ms).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine_arguments import add_engine_arguments, engine_config
from benchmarks.server import ServerProcess

from jaxserve.checkpoints.description import describe_model
from jaxserve.tokenizing.tokenizer import Tokenizer


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser, core="process")
    parser.add_argument("--environment", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--endpoint-type", choices=("chat", "completions"), default="chat")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=100, help="tokens")
    parser.add_argument("--output-len", type=int, default=48, help="tokens")
    parser.add_argument("--tolerance-ms", type=float, default=50.0)
    return parser.parse_args()


def aiperf_program(environment: Path) -> Path:
    """aiperf in its own environment, which is made if need be."""
    program = environment / "bin/aiperf"
    if not program.exists():
        venv.create(environment, with_pip=True)
        subprocess.run([environment / "bin/pip", "install", "--quiet", "aiperf"], check=True, stdout=sys.stderr)
    return program


def server_figures(address: str) -> dict[str, float]:
    """Samples of /metrics by name; those of several labels are added up."""
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("jaxserve:")
            found[name] = found.get(name, 0.0) + sample.value
    return found


def run_aiperf(program: Path, server: ServerProcess, arguments: argparse.Namespace, folder: Path) -> dict:
    """What aiperf exports."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    for name, content in Tokenizer.from_source(describe_model(arguments.model)[1]).to_files().items():
        (tokenizer / name).write_text(content, encoding="utf-8")
    options = {
        "model": server.model,
        "url": f"http://{server.http_address}",
        "endpoint-type": arguments.endpoint_type,
        "tokenizer": tokenizer,
        "concurrency": arguments.concurrency,
        "request-count": arguments.requests,
        "isl": arguments.prompt_len,
        "isl-stddev": 0,
        "osl": arguments.output_len,
        "osl-stddev": 0,
        "extra-inputs": "ignore_eos:true",
        "ui": "none",
        "output-artifact-dir": folder / "artifacts",
        "random-seed": 1,
    }
    command = [program, "profile", "--streaming", "--use-server-token-count"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((folder / "artifacts/profile_export_aiperf.json").read_text())


def compare(seen: dict, before: dict[str, float], after: dict[str, float]) -> dict[str, list[float]]:
    """What aiperf saw and what the server counted, by figure; times in ms."""
    counted = {name: value - before.get(name, 0.0) for name, value in after.items()}

    def mean_ms(name: str) -> float:
        return 1e3 * counted[f"{name}_sum"] / counted[f"{name}_count"]

    return {
        "requests": [seen["request_count"]["avg"], counted["request_success_total"]],
        "prompt_tokens": [seen["total_usage_prompt_tokens"]["avg"], counted["prompt_tokens_total"]],
        "completion_tokens": [seen["total_usage_completion_tokens"]["avg"], counted["generation_tokens_total"]],
        "time_to_first_token_ms": [seen["time_to_first_token"]["avg"], mean_ms("time_to_first_token_seconds")],
        "inter_token_latency_ms": [seen["inter_token_latency"]["avg"], mean_ms("inter_token_latency_seconds")],
    }


def main() -> int:
    """Runs the comparison."""
    arguments = parse_arguments()
    program = aiperf_program(arguments.environment)
    with tempfile.TemporaryDirectory() as folder, ServerProcess(engine_config(arguments, max_waiting=256)) as server:
        before = server_figures(server.http_address)
        seen = run_aiperf(program, server, arguments, Path(folder))
        figures = compare(seen, before, server_figures(server.http_address))
    agrees = {
        name: ours == theirs if not name.endswith("_ms") else abs(theirs - ours) <= arguments.tolerance_ms
        for name, (theirs, ours) in figures.items()
    }
    errors = seen["error_summary"]
    print(json.dumps({"aiperf_and_server": figures, "agrees": agrees, "errors": errors}))
    return 0 if all(agrees.values()) and not errors else 1


if __name__ == "__main__":
    sys.exit(main())
