"""A program run in a process of its own, under limits that it sets for itself, that answers lines of JSON."""

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.python_process import python_command, python_environment
from jaxserve.request_errors import EngineUnavailable

_PATIENCE = 30.0
"""Seconds, beside its limit, in which a program must answer: more than it needs on a busy machine."""

STOP_SECONDS = 1.0
"""Seconds for which who stops a program waits for the answer that it is about to give."""


class LimitReached(Exception):
    """The program ended instead of answering; the message says why."""


class LimitedProcess:
    """Runs a program that is told its settings in one line, and gives a line when it is ready and one for each that it
    reads then.

    A loop without end, one operation that fills the memory or a crash in a library cannot be stopped in this process;
    there the kernel ends it (SIGPROF when the processor time is used up), and the next question starts it again.
    Thread-safe; one question at a time.

    Args:
        program: Python's arguments that run it.
        settings: its first line; `cpu_seconds` among them is the limit for an answer.
    """

    def __init__(self, program: Sequence[str], settings: Mapping[str, Any]):
        self._program = program
        self._settings = json.dumps(settings).encode() + b"\n"
        self._cpu_seconds: float = settings["cpu_seconds"]
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        """The process, once it has been asked; it ends with this object."""
        self._end: Callable[[], object] = lambda: None

    def ask(self, question: str) -> Any:
        """The answer to a line of JSON.

        Raises:
            LimitReached: the program ended over it.
            EngineUnavailable: it cannot be started, or was ended from outside, or for want of an answer on a machine
                that stood still: it may answer next time.
        """
        with self._lock:
            process = self._running()
            _write(process, question.encode() + b"\n")
            patience = self._cpu_seconds + _PATIENCE
            answer = _read_line(process, time.monotonic() + patience)
            if answer is not None:
                return json.loads(answer)
            self._end()
        match -process.returncode:
            case signal.SIGPROF:
                raise LimitReached(f"takes more than {self._cpu_seconds:g} s of processor time")
            case signal.SIGKILL:
                raise EngineUnavailable(
                    f"the process to ask did not answer within {patience:g} s, or the machine ran out of memory"
                )
            case _:
                raise LimitReached(f"ended its process with exit code {process.returncode}")

    def stop(self) -> None:
        """Ends the process, unless it is busy for longer than STOP_SECONDS; the next question starts it again."""
        if self._lock.acquire(timeout=STOP_SECONDS):
            try:
                self._end()
            finally:
                self._lock.release()

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self._end()
        try:
            process = subprocess.Popen(
                python_command(self._program),
                env=python_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        except OSError as error:  # no descriptor or process is left
            raise EngineUnavailable(f"no process can be started to ask: {error}") from error
        self.process = process
        self._end = weakref.finalize(self, _end, process)
        _write(process, self._settings)
        if _read_line(process, time.monotonic() + _PATIENCE) is None:
            self._end()
            raise EngineUnavailable(f"the process to ask ended with exit code {process.returncode} as it started")
        return process


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, as reading its answer will show


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """A line without its end; None where the process ended, or did not answer before the deadline."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    line = bytearray()
    while not line.endswith(b"\n"):
        if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        data = os.read(descriptor, 1 << 20)
        if not data:
            return None
        line += data
    return bytes(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # of what it has not read
                pipe.close()
