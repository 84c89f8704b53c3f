"""What Prometheus reads: an engine's counters, gauges and distributions, under the names that dashboards know.

The suffixes and their meaning are vLLM's, under our prefix. Everything is read from the engine when it is asked for.
"""

import time
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from jaxserve.front.statistics import Distribution, device_idle_ratio
from rpc.lifecycle import Lifecycle
from rpc.served_engine import ServedEngine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

PREFIX = "jaxserve:"
_LABELS = ("model_name",)

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

DISTRIBUTIONS = {
    "time_to_first_token_seconds": ("time_to_first_token", "Acceptance to delivery of the first token"),
    "inter_token_latency_seconds": ("inter_token_latency", "Between deliveries of tokens of a sequence"),
    "e2e_request_latency_seconds": ("e2e_latency", "Acceptance to the last token"),
    "request_queue_time_seconds": ("queue_time", "Acceptance to first scheduled"),
    "request_prefill_time_seconds": ("prefill_time", "First scheduled to first token"),
    "request_decode_time_seconds": ("decode_time", "First to last token"),
    "iteration_tokens_total": ("iteration_tokens", "Tokens computed in a step"),
    "host_step_seconds": ("host_step", "Work of the step loop itself in a step, waits excluded"),
    "slot_reuse_lag_steps": ("slot_reuse_lag", "Steps until a freed slot had its next owner while requests waited"),
}
"""Histograms: name without prefix, attribute of Statistics, help."""


class Metrics:
    """The metrics of one server."""

    def __init__(self, lifecycle: Lifecycle):
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_EngineCollector(lifecycle))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, lifecycle: Lifecycle):
        self._lifecycle = lifecycle

    def collect(self) -> Iterable[Family]:
        """Nothing while the engine loads."""
        engine = self._lifecycle.engine
        if engine is None:
            return
        labels = [engine.model_name]
        yield from _gauges(engine, labels)
        yield from _counters(engine, labels)
        for name, (attribute, help_text) in DISTRIBUTIONS.items():
            yield _histogram(PREFIX + name, help_text, getattr(engine.statistics, attribute), labels)


def _gauges(engine: ServedEngine, labels: Sequence[str]) -> Iterable[Family]:
    loads = engine.loads()
    used = 1 - loads.available_pages / loads.total_pages if loads.total_pages else 0.0
    for name, help_text, value in (
        ("num_requests_running", "Requests that hold a slot", loads.running),
        ("num_requests_waiting", "Requests accepted and not yet running", loads.waiting),
        ("kv_cache_usage_perc", "Part of the pages of the KV cache that requests hold; 1 is all", used),
        (
            "device_idle_ratio",
            "Part of the last minute's work that the device waited for the host",
            device_idle_ratio(list(engine.step_records), time.monotonic()),
        ),
    ):
        family = GaugeMetricFamily(PREFIX + name, help_text, labels=_LABELS)
        family.add_metric(labels, value)
        yield family
    info = GaugeMetricFamily(
        PREFIX + "cache_config_info", "Size of the KV cache", labels=[*_LABELS, "block_size", "num_gpu_blocks"]
    )
    info.add_metric([*labels, str(engine.config.page_size), str(loads.total_pages)], 1)
    yield info


def _counters(engine: ServedEngine, labels: Sequence[str]) -> Iterable[Family]:
    loads, statistics = engine.loads(), engine.statistics
    for name, help_text, value in (
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", loads.prefix_queries),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache", loads.prefix_hits),
        ("num_preemptions", "Requests that gave their pages up to others and were computed again", loads.preemptions),
        ("prompt_tokens", "Prompt tokens of requests that began, cached ones included", statistics.prompt_tokens),
        ("generation_tokens", "Tokens generated", statistics.generation_tokens),
        ("overrun_tokens", "Row-steps spent on sequences that had already ended", loads.overrun_tokens),
        ("compiles_after_warmup", "Programs compiled since the engine was ready", loads.compiles_after_warmup),
    ):
        family = CounterMetricFamily(PREFIX + name, help_text, labels=_LABELS)
        family.add_metric(labels, value)
        yield family
    ended = CounterMetricFamily(
        PREFIX + "request_success", "Sequences that ended, by reason", labels=[*_LABELS, "finished_reason"]
    )
    for reason, count in statistics.finished.items():
        ended.add_metric([*labels, reason], count)
    yield ended


def _histogram(name: str, help_text: str, distribution: Distribution, labels: Sequence[str]) -> Family:
    counts = list(accumulate(distribution.counts))
    bounds = [*(f"{bound:g}" for bound in distribution.bounds), "+Inf"]
    family = HistogramMetricFamily(name, help_text, labels=_LABELS)
    family.add_metric(labels, list(zip(bounds, counts, strict=True)), distribution.sum)
    return family
