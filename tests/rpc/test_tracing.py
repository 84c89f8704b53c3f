"""Spans and histograms as a collector gets them, from gRPC and from HTTP."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc.aio
import openai
import pytest
from http_serving import openai_client
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from scripted_engine import ScriptedEngine
from serving import PATIENCE, back_to_the_start, lent, serving
from test_attach import broken_after, fields

from jaxserve.engine import Engine
from jaxserve.request_errors import StreamTaken
from rpc.server import Server
from rpc.server_config import ServerConfig
from rpc.telemetry import telemetry_to
from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@contextmanager
def collector() -> Iterator[tuple[str, list, dict]]:
    """A collector's URL, the spans that it has been sent, and the latest state of each histogram by name."""
    spans: list = []
    histograms: dict = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
            else:
                assert self.path == "/v1/metrics"
                for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    for scope in resource.scope_metrics:
                        histograms.update({metric.name: metric for metric in scope.metrics})
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans, histograms
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def attributes_of(span) -> dict[str, object]:
    """Attributes by name."""

    def plain(value) -> object:
        kind = value.WhichOneof("value")
        part = getattr(value, kind)
        return [plain(one) for one in part.values] if kind == "array_value" else part

    return {pair.key: plain(pair.value) for pair in span.attributes}


@pytest.mark.asyncio
async def test_each_request_is_one_span_under_its_senders_with_the_conventions_attributes() -> None:
    engine = ScriptedEngine()
    with collector() as (endpoint, spans, histograms):
        config = replace(ServerConfig(), grpc_port=0, http_port=0, otlp_endpoint=f"{endpoint}/v1/traces")
        server = Server(config, report=lambda _: None)
        await server.start()
        await server.attach(engine)
        assert server.http is not None
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = jaxserve_pb2_grpc.InferenceStub(channel)
            message = pb.GenerateRequest(request_id="native", text="hello", stopping=pb.Stopping(max_tokens=4))
            headers = (("traceparent", TRACEPARENT), ("tracestate", "a=1"), ("tracestate", "b=2"))
            async for _ in stub.Generate(message, metadata=headers):
                pass
        async with openai_client(f"127.0.0.1:{server.http.port}") as client:
            headers = {"traceparent": TRACEPARENT, "x-request-id": "over-http"}
            messages = [{"role": "user", "content": "hi"}]
            fields = {"model": "scripted", "messages": messages, "extra_headers": headers}
            await client.chat.completions.create(**fields, max_tokens=3, temperature=0.5)
            stream = await client.completions.create(model="scripted", prompt="x", stream=True)
            async for _ in stream:
                break
            await stream.close()
            await back_to_the_start(engine, server)
        await server.stop(grace=0.0)
    by_operation = {span.name: (span, attributes_of(span)) for span in spans}
    assert len(spans) == 3
    span, attributes = by_operation["chat scripted"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes["gen_ai.response.id"] == "over-http"
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (8, 3)
    assert attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert attributes["gen_ai.server.time_to_first_token"] > 0
    native = next(span for span in spans if attributes_of(span)["gen_ai.response.id"] == "native")
    assert (native.trace_id.hex(), native.parent_span_id.hex()) == (TRACE, PARENT)
    assert native.trace_state == "a=1,b=2"
    assert native.end_time_unix_nano > native.start_time_unix_nano
    (alone,) = [span for span in spans if span.trace_id.hex() != TRACE]
    assert alone.parent_span_id == b""
    assert attributes_of(alone)["gen_ai.response.finish_reasons"] == ["abort"]
    assert set(histograms) == {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }


@pytest.mark.asyncio
async def test_a_request_whose_stream_is_taken_up_again_is_one_span_that_ends_with_it() -> None:
    with (
        collector() as (endpoint, spans, histograms),
        Engine(simulated_step_ms=4.0, slots=8, max_context=256) as engine,
    ):
        async with serving(lent(engine), ServerConfig(grpc_port=0, otlp_endpoint=endpoint)) as (_, client):
            taken_up, deltas = await broken_after(client, 10, fields())
            left, _ = await broken_after(client, 10, fields())
            await client.attach(taken_up, sum(len(delta.token_ids) for delta in deltas)).text()
            await back_to_the_start(engine)
            await client.attach(taken_up).text()  # which has ended
            moved = client.generate("Once", **fields())
            before = aiter(moved)
            await anext(before)
            after = aiter(client.attach(moved.request_id))
            await anext(after)  # before the first connection is known to be broken
            with pytest.raises(StreamTaken):
                async for _ in before:
                    pass
            moved_on = time.time_ns()
            async for _ in after:
                pass
    ends = {attributes["gen_ai.response.id"]: attributes for attributes in map(attributes_of, spans)}
    assert len(spans) == 3
    (last,) = [span for span in spans if attributes_of(span)["gen_ai.response.id"] == moved.request_id]
    assert last.end_time_unix_nano > moved_on
    assert ends[taken_up]["gen_ai.response.finish_reasons"] == ["length"] and "error.type" not in ends[taken_up]
    assert ends[taken_up]["gen_ai.usage.output_tokens"] == 60
    assert ends[left]["gen_ai.response.finish_reasons"] == ["abort"]
    points = histograms["gen_ai.server.request.duration"].histogram.data_points
    assert {(attributes_of(point).get("error.type"), point.count) for point in points} == {(None, 2), ("abort", 1)}


def test_spans_that_no_collector_takes_do_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpc.telemetry.EXPORT_TIMEOUT", 0.1)
    telemetry = telemetry_to("http://127.0.0.1:9")
    closed, flushed = threading.Event(), threading.Event()

    def flush(*_: object) -> None:
        """Batch after batch, each to its timeout."""
        if closed.wait(PATIENCE):
            flushed.set()

    monkeypatch.setattr(telemetry._tracers, "force_flush", flush)
    telemetry.close()
    closed.set()
    assert flushed.wait(PATIENCE)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", ""])
def test_an_endpoint_that_is_no_url_is_refused_and_not_tried_for_ever(endpoint: str) -> None:
    with pytest.raises(ValueError, match="otlp_endpoint: must be a URL"):
        ServerConfig(otlp_endpoint=endpoint)


@pytest.mark.asyncio
async def test_times_of_requests_are_histograms_by_operation_and_failure() -> None:
    engine = ScriptedEngine(step_time=0.01)
    with collector() as (endpoint, _, histograms):
        server = Server(
            replace(ServerConfig(), grpc_port=0, http_port=0, otlp_endpoint=endpoint), report=lambda _: None
        )
        await server.start()
        await server.attach(engine)
        assert server.http is not None
        async with openai_client(f"127.0.0.1:{server.http.port}") as client:
            for tokens in (1, 4, 4):
                await client.completions.create(model="scripted", prompt="x", max_tokens=tokens)
            chat = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
            await client.chat.completions.create(**chat, max_tokens=2)
            late = await client.chat.completions.create(**chat, extra_body={"timeout": 0.2})
            assert late.choices[0].finish_reason == "deadline"
            with pytest.raises(openai.InternalServerError):
                await client.completions.create(model="scripted", prompt="break")
        await server.stop(grace=0.0)
    counts: dict[str, dict[tuple[str, str | None], int]] = {}
    for name, metric in histograms.items():
        assert metric.unit == "s"
        for point in metric.histogram.data_points:
            labels = attributes_of(point)
            key = (str(labels["gen_ai.operation.name"]), labels.get("error.type"))
            assert labels["gen_ai.request.model"] == labels["gen_ai.response.model"] == "scripted"
            assert (labels["gen_ai.provider.name"], sum(point.bucket_counts)) == ("jaxserve", point.count)
            assert 0 < point.sum < 100 * point.count
            counts.setdefault(name, {})[key] = point.count
    failed = {("text_completion", "error"): 1, ("chat", "deadline"): 1}
    assert counts == {
        "gen_ai.server.request.duration": {("text_completion", None): 3, ("chat", None): 1, **failed},
        "gen_ai.server.time_to_first_token": {("text_completion", None): 3, ("chat", None): 1, **failed},
        "gen_ai.server.time_per_output_token": {("text_completion", None): 2, ("chat", None): 1, **failed},
    }
    bounds = histograms["gen_ai.server.time_to_first_token"].histogram.data_points[0].explicit_bounds
    assert (bounds[0], bounds[-1]) == (0.001, 10.0)
