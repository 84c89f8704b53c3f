"""Whether the device waits for the host: `bench_overlap` with a profiler's trace, on random weights."""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
from benchmarks.workers import SCRIPTS, module_environment

from gpu_checks.cases import Case, Options, json_object
from gpu_checks.random_model import Sizes, random_folder
from jaxserve.config import EngineConfig


def cases(options: Options) -> Iterator[Case]:
    """What the benchmark prints."""
    yield "bench_overlap", functools.partial(_figures, options.rehearse)


def _figures(rehearse: bool) -> dict:
    # Of Llama-3.1-8B: with a smaller model a card waits for any host.
    sizes = Sizes(2, 128, 2, 1, 256) if rehearse else Sizes(32, 4096, 32, 8, 14336)
    slots = "4" if rehearse else "64"
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_folder(Path(temporary) / "random", sizes, jnp.bfloat16, alike=True)
        command = [sys.executable, str(SCRIPTS / "bench_overlap.py"), "--model", str(folder), "--slots", slots]
        command += ["--trace", "--json", "--rounds", "1", "--probes", "0", "--max-context", "512"]
        # As few programs as can be: each takes long to compile.
        command += ["--dtype", "bfloat16", "--prefill-chunks", "128"]
        # What it says on stderr is said here, also where it is killed.
        done = subprocess.run(command, env=module_environment(), stdout=subprocess.PIPE)
    found = [figures for line in done.stdout.splitlines() if (figures := json_object(line)) is not None]
    if done.returncode or not found:
        raise RuntimeError(f"{' '.join(command)}: ended with {done.returncode}")
    return {"compile_cache": EngineConfig.compilation_cache, **found[-1]}
