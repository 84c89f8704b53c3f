"""The server: ports that answer from the first moment, and an end in good order.

listen, health NOT_SERVING -> load the engine in a thread -> SERVING -> NOT_SERVING, drain -> stop
"""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from rpc import jetstream_servicer, vllm_servicer
from rpc.arrivals import Arrivals, PrematureResets
from rpc.call_runner import CallRunner
from rpc.control import ControlServicer
from rpc.http.app import HttpFront, metrics_app
from rpc.http.listener import HttpListener
from rpc.jetstream import orchestrator_pb2_grpc
from rpc.lifecycle import Lifecycle, PortUnavailable, State
from rpc.metrics import Metrics
from rpc.open_calls import OpenCalls
from rpc.security.access import Access
from rpc.security.config import path_of
from rpc.security.grpc_guard import Guard
from rpc.security.keys import KeyFile
from rpc.security.tenants import for_tenants
from rpc.served_engine import ServedEngine
from rpc.server_config import ServerConfig
from rpc.servicer import InferenceServicer
from rpc.telemetry import telemetry_to
from rpc.thread_pool import started_pool
from rpc.tracing import traced
from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc

SERVICES = (
    *(service.full_name for service in pb.DESCRIPTOR.services_by_name.values()),
    vllm_servicer.SERVICE,
    jetstream_servicer.SERVICE,
)
"""Full names of the services."""

WATCH_INTERVAL = 0.2
"""Seconds between looks at the engine's health and at stalled readers."""
DRAIN_INTERVAL = 0.05
"""Seconds between looks, in a drain, at requests without a reader."""
FLUSH_TIME = 0.5
"""Seconds that calls other than Generate, a health Watch among them, may take when the server stops."""
ABORT_TIME = 5.0
"""Seconds for aborted calls to tell their clients so, past the grace."""

Report = Callable[[dict[str, object]], None]
"""Told what becomes of the server: `event` is listening, ready, draining or stopped."""


class Server:
    """One gRPC server on the running event loop. `start`, then `load` or `attach`, then `stop`."""

    def __init__(self, config: ServerConfig, report: Report = lambda _: None):
        self.config = config
        self.port = 0
        """The port of gRPC that is bound, after `start`."""
        self.lifecycle = Lifecycle(SERVICES)
        self.calls = OpenCalls(config.stall_limit)
        self._report = report
        self._tokenizing = started_pool(8, "jaxserve-tokenize")
        self._compiling = started_pool(8, "jaxserve-constrain")
        self._hurry = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._began = time.monotonic()
        endpoint = config.otlp_endpoint
        self._telemetry = None if endpoint is None else telemetry_to(endpoint)
        keys = config.security.api_keys
        self.access = Access(None if keys is None else KeyFile(path_of(keys)))
        """Who may call what, on every protocol."""
        self._server = grpc.aio.server(
            # The guard before all that reads: what comes without a key is not even parsed.
            interceptors=[Arrivals(config.message_timeout, PrematureResets()), Guard(self.access)],
            options=config.channel_options(),
        )
        runner = CallRunner(self.lifecycle, self.calls, self._tokenizing, self._compiling)
        self._add_services(runner)
        self.http, self.metrics = self._http_listeners(runner)
        """Where the API and the metrics are listened for over HTTP, if they are."""

    def _http_listeners(self, runner: CallRunner) -> tuple[HttpListener | None, HttpListener | None]:
        config, tls = self.config, self.config.security.tls_files()
        metrics = Metrics(self.lifecycle)
        http = probes = None
        if config.http_port is not None:
            front = HttpFront(runner, metrics, self.access, config)
            http = HttpListener(front.app, config, config.http_port, tls)
        if config.metrics_port is not None:
            app = metrics_app(self.lifecycle, metrics, self.access)
            probes = HttpListener(app, config, config.metrics_port, tls)
        return http, probes

    def _add_services(self, runner: CallRunner) -> None:
        control = ControlServicer(runner, self.config.max_request_bytes)
        jaxserve_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(runner), self._server)
        jaxserve_pb2_grpc.add_ControlServicer_to_server(control, self._server)
        vllm_engine = vllm_servicer.VllmEngineServicer(runner)
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(vllm_engine, self._server)
        orchestrator = jetstream_servicer.OrchestratorServicer(runner)
        orchestrator_pb2_grpc.add_OrchestratorServicer_to_server(orchestrator, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.lifecycle.health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Binds the ports and answers. Raises PortUnavailable where a port cannot be had."""
        self.lifecycle.move_to(State.LOADING)
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host  # IPv6
        address, tls = f"{host}:{self.config.grpc_port}", self.config.security.tls_files()
        try:
            if tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, tls.grpc_credentials())
        except RuntimeError as error:
            raise PortUnavailable(f"{address} cannot be had: {error}") from error
        others = {"http": self.http, "metrics": self.metrics}
        listeners = {name: listener for name, listener in others.items() if listener is not None}
        for listener in listeners.values():
            await listener.start()
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())
        ports = {"grpc": self.port} | {name: listener.port for name, listener in listeners.items()}
        for protocol, port in ports.items():
            self._report({"event": "listening", "protocol": protocol, "address": f"{host}:{port}", "port": port})

    async def attach(self, engine: ServedEngine) -> None:
        """Serves an engine that is ready."""
        await _in_daemon_thread(engine.tokenizer.start, "jaxserve-tokenizer")
        served = for_tenants(engine)
        self.lifecycle.engine = served if self._telemetry is None else traced(served, self._telemetry)
        self.lifecycle.move_to(State.READY)
        self._report(
            {"event": "ready", "model": engine.model_name, "seconds": round(time.monotonic() - self._began, 3)}
        )

    async def load(self, engine_factory: Callable[[], ServedEngine]) -> None:
        """Makes the engine in a thread of its own and serves it. Raises what the factory raises."""
        try:
            engine = await _in_daemon_thread(engine_factory, "jaxserve-load")
        except Exception:
            self.lifecycle.move_to(State.FAILED)
            raise
        await self.attach(engine)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            self.calls.abort_stalled()
            self.access.refresh()
            self.lifecycle.follow_engine_health()

    def hurry(self) -> None:
        """Cuts the grace of a `stop` in progress."""
        self._hurry.set()

    async def stop(self, grace: float | None = None) -> bool:
        """Refuses new requests, lets those in flight finish, and stops; the engine as well. A resumable request without
        a reader finishes like any other, and a reader may take it up until the end.

        Args:
            grace: seconds for requests in flight; None takes the configured ones. Past them, or after `hurry`, what
                is left is aborted and its clients are told UNAVAILABLE.

        Returns:
            Whether every request finished by itself.
        """
        deadline = time.monotonic() + (self.config.grace if grace is None else grace)
        engine = self.lifecycle.engine
        self.lifecycle.move_to(State.DRAINING)
        self._report({"event": "draining", "open_calls": len(self.calls)})
        if engine is not None:
            engine.drain()
        drained = await self._wait_for_requests(deadline)
        self.lifecycle.move_to(State.STOPPED)
        if engine is not None:
            await _in_daemon_thread(lambda: engine.shutdown(0.0), "jaxserve-shutdown")
        if not drained:
            await self.calls.wait_until_none(ABORT_TIME)
        if self._watching is not None:
            self._watching.cancel()
        await self._server.stop(FLUSH_TIME)
        for listener in (self.http, self.metrics):
            if listener is not None:
                await listener.stop(lambda: drained and time.monotonic() < deadline and not self._hurry.is_set())
        if self._telemetry is not None:
            await _in_daemon_thread(self._telemetry.close, "jaxserve-telemetry")
        for threads in (self._tokenizing, self._compiling):
            threads.shutdown(wait=False, cancel_futures=True)
        return drained

    async def _wait_for_requests(self, deadline: float) -> bool:
        """Waits for open calls and for requests whose streams are kept, readers or not; whether none is left."""
        waiting = asyncio.create_task(self._rest())
        hurrying = asyncio.create_task(self._hurry.wait())
        timeout = max(deadline - time.monotonic(), 0.0)
        await asyncio.wait((waiting, hurrying), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        rests = waiting.done()
        waiting.cancel()
        hurrying.cancel()
        return rests

    async def _rest(self) -> None:
        """Returns once no call is open and the engine has nothing to do."""
        engine = self.lifecycle.engine
        while True:
            await self.calls.wait_until_none()
            loads = None if engine is None else engine.loads()
            if loads is None or loads.running + loads.waiting == 0:
                return
            await asyncio.sleep(DRAIN_INTERVAL)  # meanwhile a reader may have come


async def _in_daemon_thread[Result](work: Callable[[], Result], name: str) -> Result:
    """Runs blocking work in a thread that does not keep the process from ending, as an executor's would."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # from now on nobody cancels it: a thread cannot be stopped

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await asyncio.wrap_future(future)
