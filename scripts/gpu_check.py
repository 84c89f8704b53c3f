"""Kernels, engine and speed on whatever device is here: see scripts/gpu_check.

    roofline   copy and read bandwidth and bfloat16 matmul rate
    kernels    attention over fresh random inputs against float64, and bits among neighbours and in repeats
    attention  decode and chunk attention alone, as parts of those rates
    steps      whole steps of a Llama-3.1-8B of random weights: MBU, and prompts as a part of the matmul rate
    engine     greedy tokens against the CPU
    overlap    device idle time under load, in a profiler's trace and without it

The engine's sections need the packages of pyproject.toml; what the machine lacks can lie in a folder on PYTHONPATH.
Each section is a process of its own, ended with its workers when its time is up or when it gives nothing for long; its
next cases then go on in a fresh one. Prints a table, then one JSON object, and keeps --json up to date all along; ends
with 1 where a section failed or a check did not pass, with 2 where a package is missing.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmarks.workers import module_environment
from gpu_checks.cases import Options, json_object, merge
from gpu_checks.process_group import run_group

COMPILE_CACHE = Path.home() / ".cache" / "jaxserve" / "gpu_check"
"""What a first try compiled and tuned, for a second one; the engine has a folder of its own."""
MOST_PROCESSES = 4
"""Of a section. Each of its cases may hang for a reason that they share."""
LEAST_SECONDS = 5.0
"""That a section is started with."""


@dataclass(frozen=True)
class Section:
    """How a section is run."""

    module: str
    packages: tuple[str, ...]
    """That it imports, JAX and what comes with JAX apart."""
    has_device: bool = True
    """Its process itself uses the device; otherwise its workers do, one at a time, and it must not hold any memory."""
    patience: float = 1.0
    """As a part of --quiet-s, for how long it may give nothing."""
    xla_flags: str = ""


KERNELS = ("jaxtyping", "wadler_lindig")
MODEL = (*KERNELS, "flax", "msgpack", "safetensors")
SECTIONS = {
    "roofline": Section("roofline", ("msgpack",)),
    "kernels": Section("kernels", KERNELS),
    "attention": Section("attention_speed", (*KERNELS, "msgpack")),
    # A case compiles all layers of a model.
    "steps": Section("steps", MODEL, patience=1.5),
    # Its values count and not its speed: tuning every product of every folder would take most of its time.
    # The first case may build the CPU's kernels as well.
    "engine": Section(
        "engine_tokens",
        (*MODEL, "tokenizers"),
        has_device=False,
        patience=1.5,
        xla_flags="--xla_gpu_autotune_level=0",
    ),
    # One benchmark, which compiles two engines before it has a figure.
    "overlap": Section("overlap", (*MODEL, "tokenizers"), has_device=False, patience=float("inf")),
}
"""In the order in which they run: those that others rest on and whose figures tell most first."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--budget-s", type=float, default=600.0, help="seconds for all sections together")
    parser.add_argument("--section-s", type=float, default=240.0, help="seconds for one section at most")
    parser.add_argument(
        "--quiet-s",
        type=float,
        default=90.0,
        help="seconds for one case, compiling included; some sections take longer",
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, to see that all of it runs")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the result here as well")
    parser.add_argument("--run-one", choices=SECTIONS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


def missing_packages(sections: Sequence[str]) -> str | None:
    """One sentence about what cannot be imported, or None."""
    needed: dict[str, list[str]] = {}
    for name in sections:
        for package in ("jax", *SECTIONS[name].packages):
            if importlib.util.find_spec(package) is None:
                needed.setdefault(package, []).append(name)
    if not needed:
        return None
    listed = "; ".join(f"{package} (for {', '.join(names)})" for package, names in needed.items())
    return (
        f"missing Python packages: {listed}. Put their unpacked wheels into a folder on PYTHONPATH (those of jaxtyping "
        "and wadler-lindig are pure Python), or leave sections out with --sections."
    )


def run_here(section: str, options: Options) -> None:
    """The section's process: a line of JSON when a case begins, and one with its figures when it is done."""
    shared = {"jax": importlib.metadata.version("jax"), "compile_cache": os.environ.get("JAX_COMPILATION_CACHE_DIR")}
    for name, case in importlib.import_module(f"gpu_checks.{SECTIONS[section].module}").cases(options):
        if name in options.skip:
            continue
        print(json.dumps({"case": name}), flush=True)
        gives = shared | case()
        if SECTIONS[section].has_device:
            import jax

            gives["device"] = jax.devices()[0].device_kind
        print(json.dumps({"case": name, "gives": gives}), flush=True)


class Progress:
    """What a section's process has printed.

    Args:
        result: of the section, to which each case's figures are added.
        save: called after that.
    """

    def __init__(self, result: dict, save: Callable[[], None]):
        self._result, self._save = result, save
        self.begun: list[str] = []
        """Names of cases."""
        self.current: str | None = None
        """The case that has not given its figures yet."""

    def take(self, line: bytes) -> None:
        """A line of stdout; one that is not of `run_here` goes to stderr."""
        said = json_object(line)
        if said is None or "case" not in said:
            print(line.decode(errors="replace").rstrip(), file=sys.stderr, flush=True)
        elif "gives" in said:
            merge(self._result, said["gives"])
            self.current = None
            self._save()
        else:
            self.current = said["case"]
            self.begun.append(said["case"])


def section_environment(section: Section, rehearse: bool) -> dict[str, str]:
    """What the section's processes run with."""
    environment = module_environment()
    if section.xla_flags:
        environment["XLA_FLAGS"] = " ".join([*filter(None, [environment.get("XLA_FLAGS")]), section.xla_flags])
    if rehearse:
        return {**environment, "JAX_PLATFORMS": "cpu"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILE_CACHE))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    return environment


def run_section(name: str, options: Options, quiet_seconds: float, result: dict, save: Callable[[], None]) -> None:
    """Fills `result` with the section's figures as they come, and with what went wrong and was said then.

    After a case that hangs or fails, the next ones go on in a fresh process, which finds the device as at first.
    """
    section, start = SECTIONS[name], time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--run-one", name, "--options"]
    environment = section_environment(section, options.rehearse)
    skip: list[str] = []
    for _ in range(MOST_PROCESSES):
        left = options.seconds - (time.monotonic() - start)
        if left <= 0:
            break
        progress = Progress(result, save)
        told = json.dumps({**asdict(options), "skip": skip})
        quiet = quiet_seconds * section.patience
        ending = run_group([*command, told], environment, progress.take, seconds=left, quiet_seconds=quiet)
        result["seconds"] = round(time.monotonic() - start, 1)
        if ending.failure is None:
            break
        case = progress.current or ("before its first case" if not progress.begun else "after its last case")
        failure = f"{case}: {ending.failure}"
        result["failed"] = "; ".join(filter(None, [result.get("failed"), failure]))
        result["said"] = {**result.get("said", {}), case: ending.said}
        save()
        if progress.current is None:
            break
        skip += progress.begun


def table(results: dict) -> list[str]:
    """A line for each figure: numbers, and lists of cases as one line a case."""
    lines = []
    for section, result in results.items():
        for name, value in result.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                lines += [f"{section:10} {name:18} {_short(case)}" for case in value]
            elif isinstance(value, dict) and all(isinstance(one, dict) for one in value.values()):
                lines += [f"{section:10} {key:34} {_short(case)}" for key, case in value.items()]
            else:
                lines.append(f"{section:10} {name:18} {_short(value)}")
    return lines


def _short(value) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_short(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_all(arguments: argparse.Namespace) -> dict[str, dict]:
    """Runs the sections in turn."""
    end = time.monotonic() + arguments.budget_s
    results: dict[str, dict] = {}

    def save() -> None:
        if arguments.json:
            # In one go: who ends this process may want what there is.
            beside = arguments.json.with_name(arguments.json.name + ".new")
            beside.write_text(json.dumps(results, indent=1))
            beside.replace(arguments.json)

    for section in arguments.sections:
        result = results[section] = {}
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            result["failed"] = "no time left"
        else:
            beside_xla = "failed" in results.get("kernels", {})
            options = Options(arguments.rehearse, min(left, arguments.section_s), beside_xla=beside_xla)
            run_section(section, options, arguments.quiet_s, result, save)
        save()
        print("\n".join(table({section: result})), flush=True)
    return results


def main() -> int:
    """Runs what the command line asks for."""
    arguments = parse_arguments()
    if arguments.run_one:
        options, code = json.loads(arguments.options), 0
        try:
            run_here(arguments.run_one, Options(**{**options, "skip": tuple(options.get("skip", ()))}))
        except Exception:
            traceback.print_exc()
            code = 1
        # Without what is done at the end of a process: on a device that has failed that may take for ever.
        sys.stderr.flush()
        os._exit(code)
    if (missing := missing_packages(arguments.sections)) is not None:
        print(f"gpu_check: {missing}", file=sys.stderr)
        return 2
    # So that a section's processes end with this one.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    results = run_all(arguments)
    print(json.dumps(results))
    return int(any("failed" in result or result.get("passed") is False for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
