"""OpenTelemetry's exporters: spans and histograms by OTLP over HTTP. Needs the extra `otel`."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, Meter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

PROVIDER = "jaxserve"
"""`gen_ai.provider.name`, and the service's name."""
EXPORT_INTERVAL_MS = 15_000
"""Milliseconds between exports of the histograms."""
EXPORT_TIMEOUT = 2.0
"""Seconds that one export may take, the last one of a server that stops among them."""

DURATION = "gen_ai.server.request.duration"
FIRST_TOKEN = "gen_ai.server.time_to_first_token"
OUTPUT_TOKEN = "gen_ai.server.time_per_output_token"

# Names, units and bounds are those of the semantic conventions for generative AI metrics.
_HISTOGRAMS = {
    DURATION: (
        "Time from a request's acceptance to its last token",
        (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    ),
    FIRST_TOKEN: (
        "Time to generate the first token",
        (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    ),
    OUTPUT_TOKEN: (
        "Time per output token after the first",
        (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    ),
}


class TelemetryUnavailable(RuntimeError):
    """OpenTelemetry is not installed."""


@dataclass(frozen=True)
class Telemetry:
    """What one server exports.

    Attributes:
        tracer: makes spans.
        histograms: by name, in seconds.
    """

    tracer: "Tracer"
    histograms: "Mapping[str, Histogram]"
    _tracers: "TracerProvider"
    _meters: "MeterProvider"

    def close(self) -> None:
        """Exports what is left, for at most twice `EXPORT_TIMEOUT`. Blocks."""
        # It exports batch after batch, however many there are, whatever timeout it is given.
        flushing = threading.Thread(target=self._tracers.force_flush, name="jaxserve-spans", daemon=True)
        flushing.start()
        self._meters.shutdown(timeout_millis=1000 * EXPORT_TIMEOUT)
        flushing.join(EXPORT_TIMEOUT)


def telemetry_to(endpoint: str) -> Telemetry:
    """Exports to a collector by its URL, as http://127.0.0.1:4318, or by that of its traces, which ends in /v1/traces.
    Raises TelemetryUnavailable."""
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TelemetryUnavailable(f"telemetry needs the extra: pip install 'jaxserve[otel]' ({error})") from error
    base = endpoint.removesuffix("/").removesuffix("/v1/traces")
    resource = Resource.create({"service.name": PROVIDER})
    tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{base}/v1/traces", timeout=EXPORT_TIMEOUT)))
    exporter = OTLPMetricExporter(f"{base}/v1/metrics", timeout=EXPORT_TIMEOUT)
    reader = PeriodicExportingMetricReader(exporter, EXPORT_INTERVAL_MS, 1000 * EXPORT_TIMEOUT)
    meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
    return Telemetry(tracers.get_tracer(PROVIDER), _histograms(meters.get_meter(PROVIDER)), tracers, meters)


def _histograms(meter: "Meter") -> "dict[str, Histogram]":
    return {
        name: meter.create_histogram(name, "s", about, explicit_bucket_boundaries_advisory=bounds)
        for name, (about, bounds) in _HISTOGRAMS.items()
    }
