"""The process in which constraints are compiled: what becomes of it harms no one, and each verdict is found out once."""

import errno
import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxserve.constraints.check import ConstraintChecker, ConstraintLimits
from jaxserve.core.messages import Vocabulary
from jaxserve.request import Constraint
from jaxserve.request_errors import EngineUnavailable, InvalidRequest

BYTES = Vocabulary([bytes([value]) for value in range(256)] + [b"<eos>"], [256], [256])
LIMITS = ConstraintLimits(max_bytes=1 << 16, cpu_seconds=1.0)


@pytest.fixture(scope="module")
def checker() -> ConstraintChecker:
    return ConstraintChecker(BYTES, LIMITS)


def process_of(checker: ConstraintChecker) -> int:
    assert checker._process.process is not None
    return checker._process.process.pid


def test_a_hundred_schemas_at_once_are_all_compiled_and_wrong_ones_refused(checker: ConstraintChecker):
    def refusal(number: int) -> str | None:
        least, most = (number, number + 1) if number % 4 else (number + 1, number)
        try:
            checker.grammar(Constraint(json_schema={"type": "integer", "minimum": least, "maximum": most}))
        except InvalidRequest as error:
            return error.field
        return None

    with ThreadPoolExecutor(16) as pool:
        refusals = list(pool.map(refusal, range(100)))
    assert refusals == [None if number % 4 else "json_schema" for number in range(100)]


def test_a_choice_may_have_any_character(checker: ConstraintChecker):
    for first in range(0, 0x300, 64):
        characters = "".join(map(chr, range(first, first + 64)))
        assert checker.grammar(Constraint(choice=(characters, characters[::-1], "\\" + characters)))


def test_a_verdict_is_found_out_once(checker: ConstraintChecker):
    known, refused = Constraint(regex="known"), Constraint(regex=r"[^\s\S]")
    grammar = checker.grammar(known)
    with pytest.raises(InvalidRequest, match="no output matches"):
        checker.grammar(refused)
    os.kill(process_of(checker), signal.SIGSTOP)  # who asked it now would wait
    try:
        assert checker.grammar(known) == grammar
        with pytest.raises(InvalidRequest, match="no output matches"):
            checker.grammar(refused)
    finally:
        os.kill(process_of(checker), signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_for_the_whole_server_ends_no_check(checker: ConstraintChecker, number: signal.Signals):
    checker.grammar(Constraint(regex=f"before {number}"))
    process = process_of(checker)
    os.kill(process, number)
    checker.grammar(Constraint(regex=f"after {number}"))
    assert process_of(checker) == process


def test_after_its_process_has_died_the_next_is_compiled_in_a_new_one(checker: ConstraintChecker):
    checker.grammar(Constraint(regex="before"))
    dead = process_of(checker)
    os.kill(dead, signal.SIGKILL)
    assert "after" in checker.grammar(Constraint(regex="after"))
    assert process_of(checker) != dead


def test_a_process_killed_while_it_compiles_refuses_nothing(checker: ConstraintChecker):
    checker.grammar(Constraint(regex="first"))
    stopped = process_of(checker)
    os.kill(stopped, signal.SIGSTOP)
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(checker.grammar(Constraint(regex="second"))))
    asking.start()
    asking.join(0.1)  # most often it has asked by now
    assert not answers
    os.kill(stopped, signal.SIGKILL)
    asking.join()
    assert len(answers) == 1 and process_of(checker) != stopped


def test_what_takes_too_long_is_refused_and_stays_refused():
    checker = ConstraintChecker(BYTES, ConstraintLimits(max_bytes=1 << 16, cpu_seconds=0.2))
    slow = Constraint(grammar="start: BOTH\nBOTH: /(.*a.{18}b.*)/ & /(.*c.{17}d.*)/ & ~/(.*e.{15}f.*)/")
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"0\.2 s of processor time|fuel|too large|states"):
            checker.grammar(slow)
    assert checker.grammar(Constraint(choice=("yes",)))


def test_a_machine_that_has_no_process_to_spare_refuses_no_constraint_for_good(monkeypatch: pytest.MonkeyPatch):
    checker = ConstraintChecker(BYTES, LIMITS)

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with monkeypatch.context() as scarce:
        scarce.setattr(subprocess, "Popen", refuse)
        with pytest.raises(EngineUnavailable, match="Resource temporarily unavailable"):
            checker.grammar(Constraint(regex="asked again"))
    with monkeypatch.context() as scarce:
        scarce.setattr("jaxserve.python_process.sys.executable", "/bin/false")
        with pytest.raises(EngineUnavailable, match="ended with exit code 1 as it started"):
            checker.grammar(Constraint(regex="asked again"))
    assert "asked again" in checker.grammar(Constraint(regex="asked again"))


def test_a_process_that_dies_with_a_question_unread_leaves_no_error_of_its_pipe(checker: ConstraintChecker):
    checker.grammar(Constraint(regex="before"))
    process = checker._process.process
    assert process is not None and process.stdin is not None
    process.stdin.write(b"a question")  # which stays in the buffer, as after a write that failed
    process.kill()
    process.wait()
    assert "after it" in checker.grammar(Constraint(regex="after it"))


def test_a_process_that_is_killed_twice_over_a_constraint_refuses_it_for_now_alone(monkeypatch: pytest.MonkeyPatch):
    checker = ConstraintChecker(BYTES, LIMITS)
    with monkeypatch.context() as killing:
        killing.setattr("jaxserve.limited_process._write", lambda process, line: os.kill(process.pid, signal.SIGKILL))
        with pytest.raises(EngineUnavailable):
            checker.grammar(Constraint(regex="asked again"))
    assert "asked again" in checker.grammar(Constraint(regex="asked again"))
