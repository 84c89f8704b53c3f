"""`/metrics`, read by Prometheus' own parser."""

import asyncio
import json
import re
from dataclasses import replace

import pytest
from http_serving import exchange, http_serving, openai_client
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine
from serving import ROOT, eventually

from rpc.client import AsyncClient
from rpc.server import Server
from rpc.server_config import ServerConfig

pytestmark = pytest.mark.asyncio

GET_METRICS = b"GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"

NAMES = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info", "device_idle_ratio"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total"),
    *("generation_tokens_total", "request_success_total", "overrun_tokens_total", "compiles_after_warmup_total"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("iteration_tokens_total", "host_step_seconds", "slot_reuse_lag_steps"),
}


async def read_metrics(address: str) -> dict[tuple[str, str], float]:
    """Samples by name without prefix and the label that tells them apart."""
    answer = await exchange(address, GET_METRICS)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            label = sample.labels.get("finished_reason") or sample.labels.get("le") or ""
            samples[sample.name.removeprefix("jaxserve:"), label] = sample.value
    return samples


async def test_every_name_is_there_and_the_counts_are_those_of_the_answers() -> None:
    engine = ScriptedEngine()
    async with http_serving(engine) as (_, address), openai_client(address) as client:
        before = await read_metrics(address)
        sampled = {name.removesuffix("_bucket") for name, _ in before}
        assert sampled >= NAMES
        answers = await asyncio.gather(
            *(client.completions.create(model="scripted", prompt="x" * size, max_tokens=size) for size in (3, 5, 30))
        )
        stream = await client.completions.create(model="scripted", prompt="y", stream=True)
        async for _ in stream:
            break
        running = await read_metrics(address)
        assert running["num_requests_running", ""] == 1
        assert running["kv_cache_usage_perc", ""] > 0
        await stream.close()
        await eventually(lambda: engine.loads().running == 0)
        after = await read_metrics(address)
    usages = [answer.usage for answer in answers]
    assert after["prompt_tokens_total", ""] == sum(usage.prompt_tokens for usage in usages if usage) + 1
    assert after["generation_tokens_total", ""] >= sum(usage.completion_tokens for usage in usages if usage) + 1
    assert (after["request_success_total", "length"], after["request_success_total", "abort"]) == (3, 1)
    assert after["time_to_first_token_seconds_count", ""] == 4
    assert after["inter_token_latency_seconds_count", ""] == after["generation_tokens_total", ""] - 4
    assert after["e2e_request_latency_seconds_bucket", "+Inf"] == 4
    assert after["kv_cache_usage_perc", ""] == 0


async def test_a_server_of_grpc_alone_has_them_on_a_port_of_their_own() -> None:
    server = Server(replace(ServerConfig(), grpc_port=0, metrics_port=0), report=lambda _: None)
    await server.start()
    assert server.metrics is not None
    address = f"127.0.0.1:{server.metrics.port}"
    loading = await exchange(address, GET_METRICS.replace(b"/metrics", b"/health"))
    assert (loading.status, loading.body) == (503, b'{"status":"loading"}')
    assert ("generation_tokens_total", "") not in await read_metrics(address)  # there is no engine yet
    await server.attach(ScriptedEngine())
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        await client.generate_once("hello", max_tokens=7)
    assert (await read_metrics(address))["generation_tokens_total", ""] == 7
    assert (await exchange(address, GET_METRICS.replace(b"/metrics", b"/v1/models"))).status == 404
    await server.stop(grace=0.0)


async def test_the_dashboard_asks_only_for_metrics_that_exist_and_for_each_of_them() -> None:
    dashboard = json.loads((ROOT / "rpc/http/grafana.json").read_text())
    asked = {name for panel in dashboard["panels"] for name in re.findall(r"jaxserve:(\w+)", json.dumps(panel))}
    async with http_serving(ScriptedEngine()) as (_, address):
        served = {name for name, _ in await read_metrics(address)}
    assert asked <= served
    assert NAMES - {"cache_config_info"} == {name.removesuffix("_bucket") for name in asked}
