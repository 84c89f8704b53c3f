"""`scripts/gpu_check` rehearsed on the CPU, and that it can fail."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_check  # noqa: E402
from gpu_checks import engine_tokens, kernels, steps, timing  # noqa: E402
from gpu_checks.cases import Options, merge  # noqa: E402
from gpu_checks.process_group import run_group  # noqa: E402
from gpu_checks.random_model import LLAMA_8B, TINY  # noqa: E402
from paged_sequences import PagedSequences  # noqa: E402


def rehearse(*arguments: str) -> tuple[int, dict]:
    command = [str(SCRIPTS / "gpu_check"), "--rehearse", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_section_runs_and_gives_its_figures(tmp_path: Path):
    code, results = rehearse("--budget-s", "880", "--section-s", "600", "--json", str(tmp_path / "result.json"))
    assert code == 0, results
    assert json.loads((tmp_path / "result.json").read_text()) == results
    assert list(results) == list(gpu_check.SECTIONS)
    assert all(result["device"] == "cpu" and result["jax"] for result in results.values())
    assert results["kernels"]["passed"] and results["engine"]["passed"]
    assert results["attention"]["decode"][0]["of_read"] > 0 and results["steps"]["decode"][0]["mbu"] > 0
    profile = results["steps"]["profile"]
    assert {line["step"] for line in profile} == {"2 rows", "prompt of 64"} and profile[1]["us"] > 0
    assert all(line["us"] > 0 for line in results["attention"]["profile"] if line["operation"] == "(all)")
    overlap = results["overlap"]
    assert 0 <= overlap["device_idle_in_long_gaps"] <= overlap["device_idle_ratio"] <= 1
    assert 0 <= overlap["device_idle_ratio_untraced"] <= 1 and overlap["untraced_step_ms"] > 0


def test_a_section_without_time_is_ended_and_fails():
    code, results = rehearse("--sections", "kernels", "--section-s", "0.2")
    assert code == 1
    assert results["kernels"]["failed"] == "before its first case: stopped after 0 s"


def test_a_kernel_error_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    name = "d64 page16 kv3"
    monkeypatch.setattr(kernels, "REHEARSED", (name,))
    monkeypatch.setattr(kernels, "LIMITS", {"bfloat16": 1e-9})
    ((_, case),) = kernels.cases(Options(rehearse=True))
    figures = case()
    assert figures["passed"] is False
    assert figures["cases"][name]["same_bits"] and figures["cases"][name]["other_bits"] == 0


def test_a_call_that_gives_other_bits_once_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    shape = kernels.CASES["d64 page16 kv3"]
    calls, call = [], PagedSequences.call

    def racing(self: PagedSequences, *ranges, rows: int | None = None) -> list[np.ndarray]:
        calls.append(ranges)
        given = call(self, *ranges, rows=rows)
        if len(calls) == 4:
            # In the last bit of one number of the chunk's last piece.
            given[-1] = given[-1].copy()
            given[-1].view(np.uint16)[0, 0, 0] ^= 1
        return given

    monkeypatch.setattr(PagedSequences, "call", racing)
    outcome = kernels.check(kernels.chosen_attention("bfloat16"), shape, 90, seed=0)
    assert outcome.other_bits == 1 and outcome.repeats > 4
    assert outcome.same_bits and not outcome.passes("bfloat16")


def test_an_error_is_a_part_of_its_own_token():
    expected = np.ones((2, 3, 4))
    expected[1] *= 1e-3
    got = expected.copy()
    got[1] *= 1.5
    assert kernels.token_error(got, expected) == pytest.approx(0.5)
    got[0, 0, 0] = np.nan
    outcome = kernels.Outcome({"chunk": kernels.token_error(got, expected)}, True, 1, 0)
    assert not outcome.passes("bfloat16")


def test_operations_of_a_prompt_are_those_of_its_layers_and_of_one_row_of_the_head():
    # Llama-3.1-8B: q and o, k and v, gate and up and down.
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    # Of each token, with the keys up to itself: scores and values, 32 heads of 128.
    attention = 2 * 2 * 32 * 128 * sum(range(1, 513))
    by_hand = 2 * 512 * 32 * layer + 32 * attention + 2 * 128256 * 4096
    assert steps.prompt_operations(LLAMA_8B, 512) == by_hand == 7_216_729_948_160


def test_a_profiler_that_fails_costs_no_figure(monkeypatch: pytest.MonkeyPatch):
    def fails():
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(timing, "trace_device", fails)
    names = [name for name, _ in steps.cases(Options(rehearse=True))]
    assert names == ["weights", "2 rows", "prompt of 64", "profile of 2 rows", "profile of prompt of 64"]
    step = steps.Step(TINY, None, 2, 0, 128)
    monkeypatch.setattr(steps, "_prepared", lambda step: (lambda carry: carry, lambda: 0))
    (line,) = steps._profile(step)["profile"]
    assert line == {"step": "2 rows", "failed": "RuntimeError: no CUPTI"}


def test_whole_steps_are_measured_with_xla_first_where_a_kernel_failed():
    names = [name for name, _ in steps.cases(Options(rehearse=True, beside_xla=True))]
    assert names[1] == "2 rows xla" and "2 rows" in names


def test_the_engine_is_compared_in_bfloat16_first_and_with_fewer_models_in_little_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_tokens, "python_module", lambda *arguments: [sys.executable, "-c", "pass"])
    monkeypatch.setattr(engine_tokens, "random_folder", lambda folder, sizes: folder)
    names = [name for name, _ in engine_tokens.cases(Options())]
    assert names[:4] == ["random bfloat16", "llama3 bfloat16", "mistral bfloat16", "qwen3 bfloat16"]
    few = [name for name, _ in engine_tokens.cases(Options(seconds=60))]
    assert few == ["random bfloat16", "llama3 bfloat16", "random float32", "llama3 float32"]
    skipped = [name for name, _ in engine_tokens.cases(Options(seconds=60, skip=("random bfloat16",)))]
    assert skipped == few[1:]


def test_what_a_worker_of_an_engine_lacks_to_say_is_its_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_tokens, "python_module", lambda *arguments: [sys.executable, "-c", "print('stray')"])
    monkeypatch.setattr(engine_tokens, "random_folder", lambda folder, sizes: folder)
    cases = engine_tokens.cases(Options(rehearse=True))
    _, case = next(cases)
    with pytest.raises(RuntimeError, match="a worker ended with 0"):
        case()


FAKE = """
import json, os, subprocess, sys, tempfile
from pathlib import Path
from gpu_checks.cases import Options

def cases(options):
    yield "good", lambda: {"passed": True, "done": ["good"]}
    yield "stray", stray
    yield "hangs", hangs
    yield "fails", fails
    yield "last", lambda: {"passed": True, "done": ["last"]}

def stray():
    print("not JSON"); print("[1]"); print('{"half":')
    return {"done": ["stray"]}

def fails():
    raise ValueError("no such shape")

def hangs():
    worker = subprocess.Popen([sys.executable, "-c", "import sys, time; print('at work', file=sys.stderr); time.sleep(600)"])
    folder = tempfile.mkdtemp()
    Path(os.environ["FAKE_NOTES"]).write_text(json.dumps([worker.pid, folder]))
    worker.wait()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`gpu_check.py` with the section above in place of `kernels`; the hung worker's number and its folder go to
    `notes.json` beside it."""
    script = tmp_path / "gpu_check.py"
    (tmp_path / "gpu_checks_fake.py").write_text(FAKE)
    script.write_text(
        f"import sys; sys.path[:0] = [{str(SCRIPTS)!r}, {str(tmp_path)!r}]\n"
        "import importlib.util, gpu_checks_fake; sys.modules['gpu_checks.fake'] = gpu_checks_fake\n"
        f"spec = importlib.util.spec_from_file_location('gpu_check', {str(SCRIPTS / 'gpu_check.py')!r})\n"
        "check = importlib.util.module_from_spec(spec); sys.modules['gpu_check'] = check\n"
        "spec.loader.exec_module(check); check.__file__ = __file__\n"
        "check.SECTIONS['kernels'] = check.Section('fake', (), has_device=False)\n"
        "sys.exit(check.main())\n"
    )
    monkeypatch.setenv("FAKE_NOTES", str(tmp_path / "notes.json"))
    return script


def test_a_hang_ends_its_workers_and_costs_its_own_case_alone(fake: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check, "__file__", str(fake))
    result, saves = {}, []
    gpu_check.run_section("kernels", Options(rehearse=True, seconds=300), 20, result, lambda: saves.append(1))
    worker, folder = json.loads(fake.with_name("notes.json").read_text())
    assert result["done"] == ["good", "stray", "last"] and result["passed"] is True
    assert result["failed"] == "hangs: gave nothing for 20 s; fails: ended with 1"
    assert "at work" in result["said"]["hangs"] and "no such shape" in result["said"]["fails"]
    assert len(saves) == 5
    assert not running(worker) and not Path(folder).exists()


def test_what_there_was_is_kept_and_all_is_ended_where_the_check_itself_is(fake: Path):
    kept, notes = fake.with_name("kept.json"), fake.with_name("notes.json")
    command = [sys.executable, str(fake), "--rehearse", "--sections", "kernels", "--json", str(kept)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as check:
        end = time.monotonic() + 120
        while not (notes.exists() and notes.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        check.terminate()
        assert check.wait(timeout=60) == 128 + signal.SIGTERM
    worker, folder = json.loads(notes.read_text())
    assert not running(worker) and not Path(folder).exists()
    assert json.loads(kept.read_text())["kernels"]["done"] == ["good", "stray"]


def running(pid: int) -> bool:
    """Whether there is such a process, and it is not merely waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_worker_that_outlives_its_section_is_ended_and_waited_for_by_none(tmp_path: Path):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    lines: list[bytes] = []
    start = time.monotonic()
    # The worker holds stdout open.
    ending = run_group([sys.executable, "-c", code], os.environ, lines.append, seconds=500, quiet_seconds=500)
    assert ending.failure is None
    assert time.monotonic() - start < 300
    assert not running(int(lines[0]))


def test_a_line_that_is_cut_off_is_not_taken():
    code = "print('whole', flush=True); print('half', end='', flush=True); import sys; sys.exit(3)"
    lines: list[bytes] = []
    ending = run_group([sys.executable, "-c", code], os.environ, lines.append, seconds=60, quiet_seconds=60)
    assert lines == [b"whole\n"] and ending.failure == "ended with 3"


def test_figures_of_cases_are_joined():
    result: dict = {}
    merge(result, {"rate": 1, "decode": [1], "cases": {"a": 1}, "passed": True})
    merge(result, {"rate": 2, "decode": [2], "cases": {"b": 2}, "passed": False})
    merge(result, {"passed": True})
    assert result == {"rate": 2, "decode": [1, 2], "cases": {"a": 1, "b": 2}, "passed": False}


def test_a_missing_package_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jaxtyping" else find(name))
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--sections", "roofline", "kernels", "steps"])
    monkeypatch.setattr(gpu_check, "run_all", None)
    assert gpu_check.main() == 2
    said = capsys.readouterr().err
    assert "missing Python packages: jaxtyping (for kernels, steps). Put" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("section", gpu_check.SECTIONS)
def test_the_packages_of_a_section_are_those_that_it_imports(section: str):
    code = f"import sys, jax; before = set(sys.modules); import gpu_checks.{gpu_check.SECTIONS[section].module}\n"
    code += "import jaxserve; jaxserve.Engine\n" * (section in ("engine", "overlap"))
    code += "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    environment = gpu_check.section_environment(gpu_check.SECTIONS[section], rehearse=True)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    # What the project names, not what those packages import in turn.
    named = {"jaxtyping", "flax", "msgpack", "safetensors", "tokenizers", "gguf", "jinja2", "llguidance", "orbax"}
    assert set(done.stdout.split()) & named == set(gpu_check.SECTIONS[section].packages) - {"wadler_lindig"}
