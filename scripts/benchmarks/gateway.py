"""The gateway smg as a process of its own: OpenAI HTTP on loopback, in front of jaxserve servers."""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Self

from benchmarks.workers import await_end

START_LIMIT = 60.0
"""Seconds until the gateway must know every server."""


class GatewayFailed(RuntimeError):
    """The gateway did not become ready; the message has the end of what it said."""


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Gateway:
    """smg, which knows its servers when the constructor returns.

    Args:
        addresses: `host:port` of servers that are ready.
        options: more options of `smg launch`.

    Raises:
        GatewayFailed: it did not become ready.
    """

    def __init__(self, addresses: Sequence[str], *options: str):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        port, metrics_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        """Of the OpenAI API, without /v1."""
        workers = [f"grpc://{address}" for address in addresses]
        command = [sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--prometheus-port", str(metrics_port), "--prometheus-host", "127.0.0.1", "--log-level", "warn"]
        command += ["--worker-urls", *workers, *options]
        self._process = subprocess.Popen(command, stdout=self._said, stderr=subprocess.STDOUT)
        try:
            self._await_servers(len(workers))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _await_servers(self, count: int) -> None:
        deadline = time.monotonic() + START_LIMIT
        while not self._serves(count):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise GatewayFailed(f"exit code {self._process.poll()}: {self.said()[-2000:].strip()}")
            time.sleep(0.1)

    def _serves(self, count: int) -> bool:
        """Whether it sends requests to so many servers, and has their tokenizer, which comes later than they do."""
        try:
            with urllib.request.urlopen(f"{self.url}/readiness", timeout=5) as answer:
                healthy = json.load(answer)["healthy_workers"]
            with urllib.request.urlopen(f"{self.url}/v1/tokenizers", timeout=5) as answer:
                return healthy >= count and bool(json.load(answer)["tokenizers"])
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def said(self) -> str:
        """What it has logged."""
        self._said.seek(0)
        return self._said.read()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def close(self) -> None:
        """Stops it."""
        self._process.terminate()
        await_end(self._process, 10)
        self._said.close()
