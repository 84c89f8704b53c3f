"""Kernels, engine and speed on whatever device is here: see scripts/gpu_check.

    roofline   copy bandwidth and bfloat16 matmul rate
    kernels    attention over fresh random inputs against float64, and bits among neighbours
    attention  decode and chunk attention alone, as parts of those rates
    steps      whole steps of a Llama-3.1-8B of random weights: MBU, and prompts as a part of the matmul rate
    engine     greedy tokens against the CPU
    overlap    device idle time under load, in a profiler's trace and without it

The engine's sections need the packages of pyproject.toml; what the machine lacks can lie in a folder on PYTHONPATH.
Each section is a process of its own, ended when its time is up, so that one that hangs costs no other. Prints a table,
then one JSON object; ends with 1 where a section failed or a check did not pass.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmarks.workers import module_environment

SECTIONS = {
    "roofline": "roofline",
    "kernels": "kernels",
    "attention": "attention_speed",
    "steps": "steps",
    "engine": "engine_tokens",
    "overlap": "overlap",
}
"""In the order in which they run, the ones that others rest on first; of each, its module."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--budget-s", type=float, default=600.0, help="seconds for all sections together")
    parser.add_argument("--section-s", type=float, default=240.0, help="seconds for one section at most")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, to see that all of it runs")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the result here as well")
    parser.add_argument("--run-one", choices=SECTIONS, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_here(section: str, rehearse: bool) -> None:
    """The section's process: prints what it has, as one line of JSON, whenever there is more; the last has all."""
    import jax

    device = jax.devices()[0]
    for result in importlib.import_module(f"gpu_checks.{SECTIONS[section]}").run(rehearse):
        print(json.dumps({"device": device.device_kind, "jax": jax.__version__, **result}), flush=True)


def run_section(section: str, rehearse: bool, seconds: float) -> dict:
    """The section's result, or what it had when it went wrong, and what went wrong."""
    command = [sys.executable, str(Path(__file__).resolve()), "--run-one", section, *(["--rehearse"] * rehearse)]
    environment = {**module_environment(), **({"JAX_PLATFORMS": "cpu"} if rehearse else {})}
    if not rehearse:
        # A second try finds what the first one compiled and tuned.
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxserve" / "gpu_check"))
    start = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=seconds)
        printed, said = done.stdout, done.stderr
        failure = {"failed": f"ended with {done.returncode}"} if done.returncode else {}
    except subprocess.TimeoutExpired as expired:
        printed, said = expired.stdout or b"", expired.stderr or b""
        failure = {"failed": f"stopped after {seconds:.0f} s"}
    # A line that is cut off has no end.
    whole = printed.rpartition(b"\n")[0].splitlines()
    result = {**(json.loads(whole[-1]) if whole else {}), "seconds": round(time.monotonic() - start, 1)}
    return result | failure | ({"said": said.decode(errors="replace")[-2000:]} if failure else {})


def table(results: dict) -> list[str]:
    """A line for each figure: numbers, and lists of cases as one line a case."""
    lines = []
    for section, result in results.items():
        for name, value in result.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                lines += [f"{section:10} {name:18} {_short(case)}" for case in value]
            elif isinstance(value, dict):
                lines += [f"{section:10} {key:34} {_short(case)}" for key, case in value.items()]
            else:
                lines.append(f"{section:10} {name:18} {_short(value)}")
    return lines


def _short(value) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_short(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Runs the sections in turn."""
    arguments = parse_arguments()
    if arguments.run_one:
        run_here(arguments.run_one, arguments.rehearse)
        return 0
    end = time.monotonic() + arguments.budget_s
    results: dict = {}
    for section in arguments.sections:
        left = end - time.monotonic()
        if left < 5:
            results[section] = {"failed": "no time left"}
            continue
        results[section] = run_section(section, arguments.rehearse, min(left, arguments.section_s))
        print("\n".join(table({section: results[section]})), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    print(json.dumps(results))
    return int(any("failed" in result or result.get("passed") is False for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
