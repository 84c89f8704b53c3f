"""Processes that measure: each loads one engine, and then times one case for each line it is given."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from benchmarks.machine import OtherLoad, process_tree

SCRIPTS = Path(__file__).resolve().parents[1]


class WorkerFailed(RuntimeError):
    """A worker ended instead of answering; the message has the end of what it said."""


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs one of the benchmarks' own modules in this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """An environment in which that command finds the benchmarks and the project, installed or not."""
    found = (str(SCRIPTS), str(SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found)}


def client_environment() -> dict[str, str]:
    """The same for a process that reads streams: gRPC reads them where it polls, and not on threads of its own. That is
    a quarter less CPU time a message, which a client on the server's own cores takes from the server."""
    return {**module_environment(), "GRPC_EXPERIMENTS": "-event_engine_client"}


def await_end(process: subprocess.Popen, seconds: float) -> None:
    """Waits for a process that was told to end, and kills it where it does not in time."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Worker:
    """A running worker. Between cases it waits for input, and takes no CPU time.

    Args:
        command: the process; it prints a JSON line when it is ready, and one for each line of JSON it reads.

    Raises:
        WorkerFailed: it did not become ready.
    """

    def __init__(self, command: Sequence[str]):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=client_environment(),
        )
        self.ready = self._answer()
        """What it said of itself."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read()[-2000:].strip()
            raise WorkerFailed(f"exit code {code}: {said}")
        return json.loads(line)

    def measure(self, case: Mapping[str, object]) -> dict:
        """One round of a case: what the worker measured, and as `other_load` the share of the machine's CPU time that
        went to processes other than it."""
        assert self._process.stdin is not None
        load = OtherLoad(process_tree(self._process.pid))
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return {**self._answer(), "other_load": load.share()}

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def close(self) -> None:
        """Ends the worker."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        await_end(self._process, 30)
        self._errors.close()
