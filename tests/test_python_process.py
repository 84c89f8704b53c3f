"""The package's own processes run its own modules, whatever lies where they are started."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.python_process import python_command, python_environment

ROOT = Path(__file__).parents[1]

PROGRAM = """
from jaxserve import Engine
from jaxserve.constraints.check import ConstraintChecker, ConstraintLimits
from jaxserve.core.messages import Vocabulary
from jaxserve.request import Constraint

with Engine(simulated_step_ms=1.0, slots=2, max_context=256, core="process") as engine:
    prompts = ["a", {"messages": [{"role": "user", "content": "a"}]}]
    print(*[one.finish_reason for one in engine.generate(prompts, max_tokens=4, ignore_eos=True)])
vocabulary = Vocabulary([bytes([value]) for value in range(256)] + [b"<eos>"], [256], [256])
print(ConstraintChecker(vocabulary, ConstraintLimits(1 << 16, 1.0)).grammar(Constraint(choice=("yes",))) != "")
"""


def test_modules_in_the_working_folder_are_not_taken_for_those_that_the_engine_needs(tmp_path: Path):
    for name in ("json", "socket", "jaxserve"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is no module of the engine')\n")
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "length length\nTrue\n"), done.stderr


def test_a_process_imports_from_where_its_program_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "vendored.py").write_text("print('found')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    command = python_command(("-m", "vendored"))
    done = subprocess.run(command, env=python_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr
