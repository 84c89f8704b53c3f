"""A program run in a process of its own, under limits that it sets for itself, that answers lines of JSON."""

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

_PATIENCE = 30.0
"""Seconds after which a program that did not answer is ended: more than it needs on the busiest machine."""


class LimitReached(Exception):
    """The program ended instead of answering; the message says why."""


class Killed(LimitReached):
    """It was ended from outside, or for want of an answer on a machine that stood still: it may answer next time."""


class LimitedProcess:
    """Runs a program that is told its settings in one line, then gives one line for each that it reads.

    A loop without end, one operation that fills the memory or a crash in a library cannot be stopped in this process;
    there the kernel ends it (SIGPROF when the processor time is used up), and the next question starts it again.
    Thread-safe; one question at a time.

    Args:
        program: Python's arguments that run it.
        settings: its first line; `cpu_seconds` among them is the limit for an answer.
    """

    def __init__(self, program: Sequence[str], settings: Mapping[str, object]):
        self._program = program
        self._settings = json.dumps(settings).encode() + b"\n"
        self._cpu_seconds = settings["cpu_seconds"]
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        """The process, once it has been asked; it ends with this object."""
        self._end: Callable[[], object] = lambda: None

    def ask(self, question: str) -> Any:
        """The answer to a line of JSON. Raises LimitReached, and Killed where another try may have an answer."""
        with self._lock:
            process = self._running()
            _write(process, question.encode() + b"\n")
            answer = _read_line(process, time.monotonic() + _PATIENCE)
            if answer is not None:
                return json.loads(answer)
            self._end()
        match -process.returncode:
            case signal.SIGPROF:
                raise LimitReached(f"takes more than {self._cpu_seconds:g} s of processor time")
            case signal.SIGKILL:
                raise Killed(f"was ended: it did not answer within {_PATIENCE:g} s, or the machine ran out of memory")
            case _:
                raise LimitReached(f"ended its process with exit code {process.returncode}")

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self._end()
        process = subprocess.Popen(
            python_command(self._program),
            env=python_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.process = process
        self._end = weakref.finalize(self, _end, process)
        _write(process, self._settings)
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
            pipe.close()
