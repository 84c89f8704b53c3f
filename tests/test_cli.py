"""The command line: failures in one line, standard streams that are full or not there, servers' ends."""

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from running_commands import PATIENCE, failure

from jaxserve.checkpoints.registry import find
from jaxserve.cli import main
from jaxserve.engine import Engine

pytestmark = pytest.mark.usefixtures("logging_unchanged")

FAMILY = Path(__file__).parent / "fixtures" / "families" / "qwen2"
LINE = b'{"prompt": "a", "temperature": 0, "ignore_eos": true, "max_tokens": 4}\n'
"""One for `generate`."""


def test_what_is_wrong_with_configuration_or_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "slots: must be at least 1, got 0" in failure(capsys, "chat", "--slots", "0")
    assert "nowhere" in failure(capsys, "generate", "--input", str(tmp_path / "nowhere"))
    assert "no-model is neither" in failure(capsys, "info", "--model", "no-model")
    assert "no attention 'nope' on cpu" in failure(capsys, "info", "--model", str(FAMILY), "--attention", "nope")


def test_a_path_that_cannot_be_read_or_written_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(FAMILY, model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    for command in ("info", "chat"):
        assert f"Is a directory: '{model}/model.safetensors'" in failure(capsys, command, "--model", str(model))
    for command in (["info"], ["plan", "--device", "v6e-1"]):
        assert "File name too long: 'xxx" in failure(capsys, *command, "--model", "x" * 5000)


@pytest.mark.parametrize(
    "command",
    [
        "info --model ~nobody-here/x",
        "plan --device v6e-1 --model ~nobody-here/x",
        "chat --model ~nobody-here/x --core process",
        f"convert {FAMILY} ~nobody-here/x",
        "profile --api-key-file ~nobody-here/x",
        "serve --grpc-port 0 --api-keys ~nobody-here/x",
        "serve --grpc-port 0 --tls-cert ~nobody-here/x --tls-key ~nobody-here/x",
    ],
)
def test_a_home_folder_that_is_not_known_is_one_line(capsys: pytest.CaptureFixture[str], command: str):
    assert "its home folder is not known: '~nobody-here/x'" in failure(capsys, *command.split())


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("command", ["generate", "generate --output /dev/full", "chat", "plan --model llama-3.1-8b"])
def test_results_that_cannot_be_written_are_a_failure_and_no_traceback(
    command: str,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    lines = tmp_path / "lines"
    lines.write_bytes(LINE * 3)
    rest = {"generate": ["--input", str(lines)], "plan": ["--device", "v6e-1"], "chat": ["--max-tokens", "4"]}
    name, *options = command.split()
    monkeypatch.setattr("jaxserve.cli.start_engine", lambda config: nullcontext(engine))
    with FULL.open("w") as full, lines.open() as typed:
        monkeypatch.setattr("sys.stdin", typed)
        if not options or name != "generate":
            monkeypatch.setattr("sys.stdout", full)
        assert main([name, *options, *rest[name]]) == 1
    where = "/dev/full" if "--output" in options else "standard output"
    assert f"jaxserve: error: {where}: cannot be written: No space left on device\n" in capsys.readouterr().err


def closed(command: list[str], streams: str) -> subprocess.CompletedProcess[str]:
    """A command that begins without some of its standard streams."""
    line = shlex.join([sys.executable, "-m", "jaxserve", *command])
    return subprocess.run(["sh", "-c", f"{line} {streams}"], capture_output=True, text=True, timeout=120, check=False)


def test_without_standard_error_nothing_but_results_is_on_standard_output(tmp_path: Path):
    lines = tmp_path / "lines"
    lines.write_bytes(LINE * 2)
    command = ["generate", "--input", str(lines), "--simulated-step-ms", "1"]
    done = closed(command, "2>&-")
    assert (done.returncode, ["text" in json.loads(line) for line in done.stdout.splitlines()]) == (0, [True] * 2)
    done = closed([*command, "--model", "no-model"], "2>&-")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    "command", ["generate --input - --simulated-step-ms 1", "info", "serve --simulated-step-ms 1", "--version"]
)
def test_results_for_which_there_is_no_standard_output_are_a_failure(command: str):
    done = closed([*command.split(), *(["--grpc-port", "0"] if command.startswith("serve") else [])], "<&- >&-")
    if command.startswith("generate"):  # without a line there is no result
        assert done.returncode == 0 and "0 requests done" in done.stderr
    else:
        assert done.returncode == 1
        assert "jaxserve: error: standard output: cannot be written: Bad file descriptor\n" in done.stderr


@pytest.mark.parametrize("command", ["chat", "info"])
def test_a_truncated_checkpoint_is_named_with_its_tensor(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    whole = find("smollm2-135m")
    cut = tmp_path / "cut.gguf"
    with whole.open("rb") as source:
        cut.write_bytes(source.read(whole.stat().st_size // 8))
    error = failure(capsys, command, "--model", str(cut))
    assert "cut.gguf" in error
    assert "tensor" in error


@pytest.fixture
def signals_put_back() -> Iterator[None]:
    """uvloop leaves its handlers where asyncio puts the old ones back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_put_back")
def test_serve_says_that_its_port_is_taken(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port} cannot be had" in failure(capsys, "serve", "--grpc-port", port)


def test_profile_says_that_a_key_file_holds_no_key(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "key"
    file.write_bytes(b"\xff\xfe")
    error = failure(capsys, "profile", "--api-key-file", str(file))
    assert f"{file}: 'ascii' codec can't decode byte 0xff" in error
    file.write_text("one line\nand another\n")
    assert f"{file}: api_key: must be printable ASCII" in failure(capsys, "profile", "--api-key-file", str(file))


@pytest.mark.parametrize("field", ["grpc_port", "http_port", "metrics_port"])
def test_serve_refuses_a_port_that_is_none(field: str, capsys: pytest.CaptureFixture[str]):
    for port in ("99999", "-1"):
        error = failure(capsys, "serve", "--simulated-step-ms", "1", f"--{field.replace('_', '-')}", port)
        assert f"{field}: must be in [0, 65535], got {port}" in error


@pytest.mark.parametrize(
    "given", ["--grace nan", "--grace -1", "--max-connections 0", "--max-connections -5", f"--max-connections {2**31}"]
)
def test_serve_refuses_a_number_that_it_could_not_serve_by(given: str, capsys: pytest.CaptureFixture[str]):
    option, number = given.split()
    error = failure(capsys, "serve", "--grpc-port", "0", "--simulated-step-ms", "1", option, number)
    assert re.search(rf"{option[2:].replace('-', '_')}: must be .*, got {number}", error)


def test_serve_leaves_in_good_order_though_nobody_reads_its_reports_any_more():
    command = [sys.executable, "-m", "jaxserve", "serve", "--grpc-port", "0", "--simulated-step-ms", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            assert [json.loads(server.stdout.readline())["event"] for _ in range(2)] == ["listening", "ready"]
            server.stdout.close()
            server.send_signal(signal.SIGTERM)
            errors = server.stderr.read()
            assert server.wait(timeout=PATIENCE) == 0, errors
        finally:
            server.kill()
    assert "draining is not told: BrokenPipeError" in errors


def test_serve_reports_its_states_and_leaves_in_good_order_at_sigterm():
    command = [sys.executable, "-m", "jaxserve", "serve", "--grpc-port", "0", "--simulated-step-ms", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            reports = [json.loads(server.stdout.readline()) for _ in range(2)]
            assert [report["event"] for report in reports] == ["listening", "ready"]
            server.send_signal(signal.SIGTERM)
            output, errors = server.communicate(timeout=PATIENCE)
        finally:
            server.kill()
    assert server.returncode == 0, errors
    assert [json.loads(text)["event"] for text in output.splitlines()] == ["draining", "stopped"]
    assert "is ready on simulated" in errors
