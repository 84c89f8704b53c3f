"""`serve` as a process: ready, signalled, drained, gone, with the exit code that says which."""

import resource
import signal
import socket
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted_engine import expected_ids
from serving import PATIENCE, server_process

from jaxserve.events import Delta, Finished, FinishReason
from jaxserve.request_errors import EngineUnavailable
from rpc.client import Client
from rpc.client.calls import READY_SECONDS
from rpc.serve import OWN_DESCRIPTORS, take_descriptors
from rpc.server_config import ServerConfig

SLOW_ENGINE = """
def engine_factory():
    return ScriptedEngine(step_time=0.02)
"""
STUCK_LOADING = """
def engine_factory():
    time.sleep(1000)
"""
FAILS_TO_LOAD = """
def engine_factory():
    raise FileNotFoundError("weights.gguf is truncated")
"""


def test_sigterm_lets_streams_finish_refuses_new_ones_and_exits_0() -> None:
    with server_process(SLOW_ENGINE) as server:
        server.report("ready")
        with Client(server.address) as client, grpc.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            generation = client.generate("hello", max_tokens=60)
            deltas = iter(generation)
            tokens = [*next(deltas).token_ids]
            server.signal(signal.SIGTERM)
            # The open Watch must be told, and must not hold the server up.
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert client.server_info().state == "draining"
            with pytest.raises(EngineUnavailable, match="draining"):
                client.generate_once("late")
            tokens += [token for delta in deltas for token in delta.token_ids]
            assert tokens == expected_ids(60)
            assert generation.finished is not None
            assert generation.finished.finish_reason is FinishReason.LENGTH
            assert server.report("draining")["open_calls"] == 1
            assert server.exit_code() == 0
            assert server.report("stopped")["exit_code"] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_hurries(number: signal.Signals) -> None:
    with server_process(SLOW_ENGINE, grace=1000.0) as server:
        server.report("ready")
        with Client(server.address) as client:
            generation = client.generate("hello")
            events = generation.events()
            next(events)
            server.signal(number)
            server.report("draining")
            assert isinstance(next(events), Delta)  # still served
            server.signal(number)
            with pytest.raises(EngineUnavailable, match="stopped before"):
                for _ in events:
                    pass
            assert generation.finished is not None
            assert generation.finished.finish_reason is FinishReason.ABORT
            assert server.exit_code() == 3


def test_a_reader_that_never_reads_cannot_hold_the_exit_past_the_grace() -> None:
    setup = "def engine_factory(): return ScriptedEngine(step_time=0.0, max_context=1 << 24)"
    with server_process(setup, grace=0.2) as server:
        server.report("ready")
        with Client(server.address) as client:
            events = client.generate("hello").events()
            next(events)
            time.sleep(0.5)  # the windows fill
            server.signal(signal.SIGTERM)
            assert server.exit_code() in (0, 3)


def test_a_signal_while_loading_ends_the_process() -> None:
    with server_process(STUCK_LOADING) as server, Client(server.address) as client:
        assert client.server_info().state == "loading"
        assert not client.is_ready()
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0


def test_an_engine_that_cannot_start_ends_the_process_with_its_error() -> None:
    with server_process(FAILS_TO_LOAD) as server:
        assert server.exit_code() == 1
        assert server.process.stderr is not None
        assert "FileNotFoundError: weights.gguf is truncated" in server.process.stderr.read()


def test_clients_wait_for_a_server_that_is_not_there_yet() -> None:
    setup = """
    def engine_factory():
        time.sleep(0.5)
        return ScriptedEngine()
    """
    with server_process(setup) as server:
        with Client(server.address) as client:
            client.wait_until_ready(timeout=PATIENCE)
            assert client.generate("a", max_tokens=3).text() == "abc"
        with Client("127.0.0.1:1") as nobody:
            with pytest.raises(TimeoutError):
                nobody.wait_until_ready(timeout=0.3)
            with pytest.raises(EngineUnavailable):
                nobody.generate_once("a")


def test_the_blocking_client_waits_no_longer_than_it_was_told_for_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, Client(f"127.0.0.1:{silent.getsockname()[1]}") as client:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="not ready after"):
            client.wait_until_ready(timeout=0.3)
        assert time.monotonic() - began < READY_SECONDS


def test_the_blocking_client_does_all_that_the_other_does() -> None:
    with server_process("def engine_factory(): return ScriptedEngine()") as server:
        server.report("ready")
        with Client(server.address) as client:
            events = list(client.generate("hello", max_tokens=3).events())
            assert isinstance(events[-1], Finished)
            chat = client.chat([{"role": "user", "content": "hi"}], max_tokens=4)
            assert chat.text() == "abcd"
            assert chat.started is not None and chat.started.prompt_tokens == 8
            assert client.generate_once("hello", max_tokens=2).token_ids == tuple(expected_ids(2))
            assert client.tokenize("ab") == [97, 98]
            assert client.detokenize([97, 98]) == "ab"
            assert client.model_info().model == "scripted"
            with pytest.raises(TimeoutError):
                client.generate("hello", timeout=0.1).text()
            for _ in client.generate("hello"):
                break
            generation = client.generate("hello")
            threading.Timer(0.1, generation.cancel).start()
            for _ in generation:
                pass
            assert generation.finished is None
            generation = client.generate("hello")
            next(iter(generation))
            deadline = time.monotonic() + PATIENCE
            del generation
            while client.loads().running or client.loads().open_calls:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert not client.abort("nobody")


UNLIMITED = resource.RLIM_INFINITY
NEEDED = 2 * 3000 + OWN_DESCRIPTORS


@pytest.mark.parametrize(
    ("limits", "set_to", "warns"),
    [
        ((1024, 1 << 20), (NEEDED, 1 << 20), False),
        ((1024, UNLIMITED), (NEEDED, UNLIMITED), False),
        ((1024, 4096), (4096, 4096), True),
        ((1 << 16, 1 << 20), None, False),
        ((UNLIMITED, UNLIMITED), None, False),
    ],
)
def test_a_server_may_have_as_many_files_open_as_it_takes_connections_or_says_that_it_may_not(
    limits: tuple[int, int],
    set_to: tuple[int, int] | None,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))
    take_descriptors(ServerConfig(http_port=0, max_connections=3000))
    assert asked == ([] if set_to is None else [set_to])
    assert (f"3000 connections on 2 ports need {NEEDED}" in caplog.text) == warns
