"""`jaxserve generate`, run in this process with the session's engine: lines in, a line for each request out."""

import asyncio
import gc
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from running_commands import PATIENCE, failure

from jaxserve.cli import main
from jaxserve.commands.generate import run_batch
from jaxserve.engine import Engine

pytestmark = pytest.mark.usefixtures("logging_unchanged")


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
