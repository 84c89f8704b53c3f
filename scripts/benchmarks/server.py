"""A jaxserve server as a process of its own."""

import json
import signal
import subprocess
import tempfile
from dataclasses import fields
from typing import Self

from benchmarks.machine import cpu_seconds, process_tree
from benchmarks.workers import await_end, module_environment, python_module
from jaxserve.commands.options import option_name
from jaxserve.config import EngineConfig


class ServerFailed(RuntimeError):
    """The server ended before it was ready; the message has the end of what it said."""


def serve_options(config: EngineConfig) -> list[str]:
    """The options of `jaxserve serve` that make a configuration."""
    options: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        name = option_name(field.name)
        if isinstance(value, bool):
            options.append(name if value else name.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, tuple) else (value,)
            options += [name, *("none" if one is None else str(one) for one in values)]
    return options


class ServerProcess:
    """`jaxserve serve` on free ports of loopback, ready when the constructor returns.

    Args:
        config: of its engine.
        options: further ones of the command.

    Raises:
        ServerFailed: it did not become ready.
    """

    def __init__(self, config: EngineConfig, *options: str):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            python_module(
                "jaxserve", "serve", "--grpc-port", "0", "--http-port", "0", *serve_options(config), *options
            ),
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=module_environment(),
        )
        self.address: str = self._await("listening")["address"]
        self.http_address: str = self._await("listening")["address"]
        ready = self._await("ready")
        self.model: str = ready["model"]
        """The name that requests use."""
        self.ready_seconds: float = ready["seconds"]
        """From the start of the server to its readiness, as it says."""
        self._processes = process_tree(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _await(self, event: str) -> dict:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            report = json.loads(line)
            if report["event"] == event:
                return report
        code = self._process.wait()
        self._errors.seek(0)
        raise ServerFailed(f"exit code {code}: {self._errors.read()[-2000:].strip()}")

    @property
    def is_alive(self) -> bool:
        """Whether its front runs."""
        return self._process.poll() is None

    @property
    def processes(self) -> list[int]:
        """Its process ids: the front's, and the core's if that is another."""
        return self._processes

    def cpu_seconds(self) -> float:
        """CPU time of its processes so far."""
        return cpu_seconds(self._processes)

    def kill(self) -> None:
        """Ends its front as a crash does. The core sees that and ends as well."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Stops it as an operator does."""
        self._process.send_signal(signal.SIGTERM)
        await_end(self._process, 60)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()
