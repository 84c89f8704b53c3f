"""Spans as a collector gets them, from gRPC and from HTTP."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc.aio
import pytest
from http_serving import openai_client
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from scripted_engine import ScriptedEngine
from serving import back_to_the_start

from rpc.server import Server
from rpc.server_config import ServerConfig
from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@contextmanager
def collector() -> Iterator[tuple[str, list]]:
    """A collector's URL, and the spans that it has been sent."""
    spans: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
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
    with collector() as (endpoint, spans):
        config = replace(ServerConfig(), grpc_port=0, http_port=0, otlp_endpoint=endpoint)
        server = Server(config, report=lambda _: None)
        await server.start()
        await server.attach(engine)
        assert server.http is not None
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = jaxserve_pb2_grpc.InferenceStub(channel)
            message = pb.GenerateRequest(request_id="native", text="hello", stopping=pb.Stopping(max_tokens=4))
            async for _ in stub.Generate(message, metadata=(("traceparent", TRACEPARENT),)):
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
    assert native.end_time_unix_nano > native.start_time_unix_nano
    (alone,) = [span for span in spans if span.trace_id.hex() != TRACE]
    assert alone.parent_span_id == b""
    assert attributes_of(alone)["gen_ai.response.finish_reasons"] == ["abort"]
