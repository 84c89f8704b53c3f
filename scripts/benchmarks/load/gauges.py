"""What the server says of itself while a load runs, and whether it is back at its baseline afterwards."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.load.targets import Address, http_errors, http_session
from jaxserve.request_errors import EngineUnavailable

if TYPE_CHECKING:
    import aiohttp

INTERVAL = 0.25
"""Seconds between samples."""
READY_TIMEOUT = 120.0
"""Seconds to wait for a server that is starting."""
PATIENCE = 30.0
"""Seconds that a server may take to be back at its baseline."""


@dataclass(frozen=True)
class Sample:
    """The gauges at a monotonic second."""

    at: float
    running: float
    waiting: float
    pages_used: float
    """Pages neither free nor evictable, or by HTTP their share of all, 0 to 1."""


Read = Callable[[], Awaitable[Sample]]


class Gauges:
    """Samples of a server, taken until `stop`."""

    def __init__(self, read: Read):
        self._read = read
        self.samples: list[Sample] = []
        self._sampling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes the baseline, and samples from then on."""
        self.samples = [await self._read()]
        self._sampling = asyncio.create_task(self._sample())

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            self.samples.append(await self._read())

    async def stop(self) -> None:
        """Takes no more samples."""
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)

    async def await_baseline(self) -> list[str]:
        """Waits until the server is where it was before; what is not after PATIENCE seconds. Raises EngineUnavailable
        where it does not answer."""
        baseline, deadline = self.samples[0], time.monotonic() + PATIENCE
        while True:
            now = await self._read()
            self.samples.append(now)
            leaked = [
                f"{name}: {getattr(now, name):g} at the end, {getattr(baseline, name):g} before"
                for name in ("running", "waiting", "pages_used")
                if getattr(now, name) > getattr(baseline, name)
            ]
            if not leaked or time.monotonic() > deadline:
                return leaked
            await asyncio.sleep(INTERVAL)


@asynccontextmanager
async def open_gauges(address: Address) -> AsyncGenerator[Gauges | None]:
    """The gauges of a server that is ready; None where it has none that can be read. Raises TimeoutError where none is
    ready in time, and OSError where its certificate is not trusted."""
    if address.is_grpc:
        async with address.grpc_client() as client:
            await client.wait_until_ready(READY_TIMEOUT)

            async def by_grpc() -> Sample:
                loads = await client.loads()
                used = loads.total_pages - loads.available_pages
                return Sample(time.monotonic(), loads.running, loads.waiting, used)

            yield Gauges(by_grpc)
        return
    async with http_session(address) as session:
        base = address.url.rstrip("/")
        await _await_health(session, base + "/health")
        url = base + "/metrics"

        async def by_http() -> Sample:
            with http_errors():
                async with session.get(url) as response:
                    return parse_metrics(await response.text())

        async with session.get(url) as response:
            has_gauges = response.status == 200 and "num_requests_running" in await response.text()
        yield Gauges(by_http) if has_gauges else None


async def _await_health(session: "aiohttp.ClientSession", url: str) -> None:
    async with asyncio.timeout(READY_TIMEOUT):
        while True:
            with suppress(EngineUnavailable), http_errors():  # it does not listen yet
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(INTERVAL)


def parse_metrics(text: str) -> Sample:
    """A sample from Prometheus's text: names with the prefix of jaxserve or vLLM."""

    def value(name: str) -> float:
        found = re.search(rf"^(?:jaxserve|vllm):{name}(?:{{[^}}]*}})? ([0-9.e+-]+)", text, re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    running, waiting = value("num_requests_running"), value("num_requests_waiting")
    return Sample(time.monotonic(), running, waiting, value("kv_cache_usage_perc"))
