"""A host with JAX and little else: what is not asked for is not needed."""

import subprocess
import sys
from pathlib import Path

from jaxserve.checkpoints.loading import convert

MODEL = Path(__file__).parent / "fixtures" / "families" / "smollm2"

PROGRAM = """
import sys

for name in ("llguidance", "starlette", "uvicorn", "prometheus_client", "smg_grpc_proto", "gguf"):
    sys.modules[name] = None  # as if it were not installed

from jaxserve import Engine
from jaxserve.request_errors import InvalidRequest

with Engine(model=sys.argv[1], slots=2, max_context=64) as engine:
    print(engine.generate([{"token_ids": [5, 6], "max_tokens": 4, "ignore_eos": True}])[0].finish_reason)
    try:
        engine.generate([{"token_ids": [5, 6], "regex": "a+"}])
    except InvalidRequest as error:
        print(error)
"""

FRONT = """
import sys

for name in ("jax", "jaxlib", "flax", "orbax"):
    sys.modules[name] = None

import rpc.serve
from jaxserve import Engine
from jaxserve.commands.start import model_errors

with model_errors(), Engine(model=sys.argv[1], slots=2, max_context=64, core="process") as engine:
    print(engine.generate(["a"], max_tokens=4, ignore_eos=True)[0].finish_reason)
"""


def test_the_engine_runs_without_the_packages_of_servers_and_constraints():
    command = [sys.executable, "-c", PROGRAM, str(MODEL)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    reason, refusal = done.stdout.splitlines()
    assert reason == "length"
    assert refusal == "regex: constraints need the package llguidance, which this host lacks"


def test_the_front_of_a_core_in_another_process_imports_no_jax(tmp_path: Path):
    native = tmp_path / "native"
    convert(str(MODEL), native, "float32")
    for model in ("smollm2-135m", str(MODEL), str(native)):
        command = [sys.executable, "-c", FRONT, model]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode, done.stdout) == (0, "length\n"), done.stderr
