"""The commands, run in this process with the session's engine; servers and pipes in processes of their own."""

import asyncio
import gc
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from command_failure import failure

from jaxserve.checkpoints.registry import find
from jaxserve.cli import main
from jaxserve.commands.generate import run_batch
from jaxserve.engine import Engine

pytestmark = pytest.mark.usefixtures("logging_unchanged")

FAMILY = Path(__file__).parent / "fixtures" / "families" / "qwen2"
PATIENCE = 300.0
"""Seconds after which a process hangs; nothing is asserted to be fast by it."""


def generate(engine: Engine, lines: Iterator[bytes] | list[bytes]) -> tuple[int, list[dict]]:
    """Exit status and output lines of a batch."""
    output = io.BytesIO()
    status = run_batch(engine, lines, output)
    return status, [json.loads(line) for line in output.getvalue().splitlines()]


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def greedy(**fields: object) -> bytes:
    return line(**{"temperature": 0, "ignore_eos": True, "max_tokens": 4, **fields})


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for a condition that must come true. Counts looks, not seconds: a machine may pause for minutes."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came true")


def test_generate_writes_each_request_as_it_finishes_with_what_the_engine_gives(engine: Engine):
    prompts = {"long": ("Once upon a time", 40), "short": ("The sea", 2), "middle": ("One, two,", 12)}
    status, results = generate(engine, [greedy(id=id, prompt=p, max_tokens=n) for id, (p, n) in prompts.items()])
    assert status == 0
    assert [result["id"] for result in results] == ["short", "middle", "long"]
    for result in results:
        prompt, tokens = prompts[result["id"]]
        (whole,) = engine.generate([prompt], temperature=0, ignore_eos=True, max_tokens=tokens)
        assert result["token_ids"] == list(whole.token_ids)
        assert (result["text"], result["finish_reason"]) == (whole.text, "length")
        assert result["usage"]["completion_tokens"] == tokens
        assert set(result["timings"]) == {"queue", "prefill", "decode", "first_token", "total"}
        assert "logprobs" not in result


def test_generate_takes_every_kind_of_prompt_and_gives_what_is_asked_for(engine: Engine):
    lines = [
        greedy(id="ids", token_ids=[504, 2988], logprobs=2),
        greedy(id="chat", messages=[{"role": "user", "content": "Hi"}], return_token_ids=False),
        greedy(id="quiet", prompt="a", return_text=False),
        b"\n",
        greedy(prompt="nameless"),
    ]
    status, results = generate(engine, lines)
    by_id = {result["id"]: result for result in results}
    assert status == 0
    assert set(by_id) == {"ids", "chat", "quiet", "line-5"}
    for token_id, entry in zip(by_id["ids"]["token_ids"], by_id["ids"]["logprobs"], strict=True):
        assert entry["token_id"] == token_id
        assert [top["logprob"] for top in entry["top"]] == sorted((t["logprob"] for t in entry["top"]), reverse=True)
        assert entry["top"][0] == {"token_id": token_id, "logprob": entry["logprob"]}
        assert len(entry["top"]) == 2
    assert "token_ids" not in by_id["chat"]
    assert "text" not in by_id["quiet"]


def test_generate_gives_every_sequence_of_a_request(engine: Engine):
    fields = {"prompt": "One, two,", "max_tokens": 6, "ignore_eos": True, "seed": 3, "n": 3}
    many = [line(id=str(number), **fields) for number in range(40)]  # more sequences than the engine takes at once
    status, results = generate(engine, many)
    (whole,) = engine.generate([fields])
    assert status == 0
    assert len(results) == 40
    for result in results:
        assert [output["index"] for output in result["outputs"]] == [0, 1, 2]
        assert [output["text"] for output in result["outputs"]] == [output.text for output in whole.outputs]
        assert result["usage"]["completion_tokens"] == 18
        assert "text" not in result


BAD = [
    (line(id="x", prompt="a", temperature=-1), "temperature", "[0, 100], got -1"),
    (line(id="x", prompt="a", temperature=10**400), "temperature", "[0, 100], got 1000"),
    (b'{"id": "x", "prompt": "a", "cache_salt": "\xed\xa0\x80"}\n', "request", "is not JSON"),
    (line(id="x", prompt="a", max_tokens=10**6), "max_tokens", "in a context of 2048"),
    (line(id="x", prompt="a", n=97), "n", "[1, 96], got 97"),
    (line(id="x", prompt="a", token_ids=[1]), "prompt", "prompt and token_ids are set"),
    (line(id="x", prompt="a", top_q=1), "top_q", "is not a field of a request"),
    (line(id="x", prompt="word " * 3000), "prompt", "2047"),
    (line(id=["x"], prompt="a"), "id", "1 to 128 characters"),
    (line(request_id="", prompt="a"), "request_id", "1 to 128 characters"),
    (line(id="good", prompt="a"), "id", "line 1"),
    (b'{"id": "x", \n', "request", "is not JSON"),
    (b'["a"]\n', "request", "must be a JSON object"),
    (b"[" * 100_000 + b"\n", "request", "is not JSON"),
    (b'{"prompt": "\xff"}\n', "request", "is not JSON"),
    (line(id="x", prompt="a", seed=int("9" * 400)), "seed", "4294967295"),
    (line(id="\ud800", prompt="a", stop=[""]), "stop", "1 to 256 characters"),
    (line(id="x", prompt="a", model="gpt-9"), None, "gpt-9"),
]


@pytest.mark.parametrize(
    ("bad", "field", "says"), BAD, ids=[f"{field}-{number}" for number, (_, field, _) in enumerate(BAD)]
)
def test_a_bad_line_names_line_field_and_limit_and_the_others_run(engine: Engine, bad: bytes, field: str, says: str):
    status, results = generate(engine, [greedy(id="good", prompt="a"), bad, greedy(id="last", prompt="b")])
    assert status == 1
    errors = [result for result in results if "error" in result]
    (error,) = errors
    assert (error["line"], error["error"]["field"]) == (2, field)
    assert says in error["error"]["message"]
    assert {result["id"] for result in results if "error" not in result} == {"good", "last"}


def test_more_lines_than_the_queue_holds_all_run(engine: Engine):
    random_ = random.Random(5)
    count = engine.capacity + 60
    lines = [greedy(id=str(n), token_ids=[random_.randrange(17, 49152)], max_tokens=1) for n in range(count)]
    status, results = generate(engine, iter(lines))
    assert status == 0
    assert {result["id"] for result in results} == {str(n) for n in range(count)}


def test_a_result_is_there_before_the_next_line_is(engine: Engine):
    output = io.BytesIO()

    def lines() -> Iterator[bytes]:
        for number in range(3):
            yield greedy(id=str(number), prompt="a")
            eventually(lambda wanted=number + 1: output.getvalue().count(b"\n") == wanted)

    assert run_batch(engine, lines(), output) == 0


def test_an_interrupt_writes_what_there_is_and_frees_every_page(engine: Engine, capsys: pytest.CaptureFixture[str]):
    never = threading.Event()

    def lines() -> Iterator[bytes]:
        for number in range(2):
            yield greedy(id=str(number), prompt="a", max_tokens=2000)
        eventually(lambda: engine.loads().running == 2)
        os.kill(os.getpid(), signal.SIGINT)
        never.wait(PATIENCE)
        yield greedy(prompt="too late")

    status, results = generate(engine, lines())
    never.set()
    assert status == 130
    assert {(result["id"], result["finish_reason"]) for result in results} == {("0", "abort"), ("1", "abort")}
    eventually(lambda: engine.loads().available_pages == engine.loads().total_pages)


def test_an_interrupt_ends_a_command_that_starts_where_an_exception_would_be_lost():
    code = """
import os, signal, sys
import jaxserve.engine
from jaxserve.cli import main

class Collected:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def engine(*_, **__):
    Collected()
    raise jaxserve.engine.EngineStartError("it went on")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are given none
jaxserve.engine.Engine = engine
sys.exit(main(["generate", "--input", os.devnull]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (130, "starting ...\n")


def test_an_interrupted_convert_leaves_nothing_of_what_it_was_writing(tmp_path: Path):
    folder = tmp_path / "native"
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from jaxserve.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "convert", "smollm2-135m", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as converting:
        eventually(lambda: any(files for _, _, files in os.walk(tmp_path)) or converting.poll() is not None)
        converting.send_signal(signal.SIGINT)
        _, errors = converting.communicate(timeout=PATIENCE)
    assert (converting.returncode, list(tmp_path.iterdir())) == (130, [])
    assert "Traceback" not in errors


def test_a_reader_that_goes_away_ends_the_batch_and_frees_every_page(engine: Engine):
    class Gone(io.BytesIO):
        def write(self, _: object) -> int:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_batch(engine, [greedy(prompt="a"), greedy(prompt="a", max_tokens=1000)], Gone())
    eventually(lambda: engine.loads().running == 0)
    eventually(lambda: engine.loads().available_pages == engine.loads().total_pages)  # the step in flight fences some


def test_a_line_that_comes_as_the_run_ends_is_dropped_in_silence(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    ending, close = threading.Event(), asyncio.BaseEventLoop.close

    class Gone(io.BytesIO):
        def write(self, _: object) -> int:
            raise BrokenPipeError

    def close_slowly(loop: asyncio.BaseEventLoop) -> None:
        ending.set()
        time.sleep(0.2)
        close(loop)

    def lines() -> Iterator[bytes]:
        yield greedy(prompt="a")
        ending.wait(PATIENCE)
        yield greedy(prompt="too late")

    monkeypatch.setattr("asyncio.BaseEventLoop.close", close_slowly)
    with warnings.catch_warnings(record=True, action="always") as warned:
        with pytest.raises(BrokenPipeError):
            run_batch(engine, lines(), Gone())
        gc.collect()
    assert [str(warning.message) for warning in warned] == []


def test_generate_reads_and_writes_files(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxserve.cli.start_engine", lambda config: nullcontext(engine))
    (tmp_path / "in").write_bytes(greedy(id="ä", prompt="a") + line(id="bad"))
    assert main(["generate", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 1
    results = [json.loads(text) for text in (tmp_path / "out").read_text(encoding="utf-8").splitlines()]
    assert {result["id"] for result in results} == {"ä", "bad"}


def test_generate_does_not_write_over_its_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Opening it to write would empty it before a line is read: no request would run, and the prompts be lost."""
    monkeypatch.setattr("jaxserve.cli.start_engine", None)
    prompts, link = tmp_path / "prompts", tmp_path / "link"
    prompts.write_bytes(greedy(prompt="a"))
    link.symlink_to(prompts)
    for output in (prompts, link):
        error = failure(capsys, "generate", "--input", str(prompts), "--output", str(output))
        assert f"{output}: is the input as well" in error
    command = [sys.executable, "-m", "jaxserve", "generate", "--input", "-", "--output", str(prompts)]
    with prompts.open("rb") as standard_input:
        done = subprocess.run(command, stdin=standard_input, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is the input as well" in done.stderr
    assert prompts.read_bytes() == greedy(prompt="a")


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


def test_convert_finds_that_a_folder_cannot_be_made_before_it_loads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxserve.checkpoints.loading.load_model", None)
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "folder" / "native"
    assert f"{place}: cannot be made: {tmp_path}/file is not a folder" in failure(
        capsys, "convert", str(FAMILY), str(place)
    )
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    place = tmp_path / "folder" / "native"
    assert f"{place}: cannot be made: {tmp_path} cannot be written" in failure(
        capsys, "convert", str(FAMILY), str(place)
    )


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
    lines.write_bytes(greedy(prompt="a") * 3)
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
    lines.write_bytes(greedy(prompt="a") * 2)
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
