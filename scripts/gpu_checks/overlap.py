"""Whether the device waits for the host: `bench_overlap` with a profiler's trace, on random weights."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
from benchmarks.workers import SCRIPTS, module_environment

from gpu_checks.random_model import Sizes, random_folder


def run(rehearse: bool) -> Iterator[dict]:
    """What the benchmark prints."""
    # Of Llama-3.1-8B: with a smaller model a card waits for any host.
    sizes = Sizes(2, 128, 2, 1, 256) if rehearse else Sizes(32, 4096, 32, 8, 14336)
    slots = "4" if rehearse else "64"
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_folder(Path(temporary) / "random", sizes, jnp.bfloat16, alike=True)
        command = [sys.executable, str(SCRIPTS / "bench_overlap.py"), "--model", str(folder), "--slots", slots]
        command += ["--trace", "--json", "--rounds", "1", "--probes", "0", "--max-context", "512"]
        # As few programs as can be: each takes long to compile.
        command += ["--dtype", "bfloat16", "--prefill-chunks", "128"]
        done = subprocess.run(command, env=module_environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        yield json.loads(done.stdout.splitlines()[-1])
