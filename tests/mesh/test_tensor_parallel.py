"""A model shared by several devices gives what it gives on one: the same tokens, and logits within float32's rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from random_checkpoint import write_checkpoint

from jaxserve.checkpoints.loading import convert
from jaxserve.config import EngineConfig

DEVICES = 8
ROUNDING = 2e-5
"""Of a log-probability in float32: XLA orders a product's sums by its number of outputs, which the devices share."""


def run_engines(*engines: dict[str, Any]) -> list[dict[str, Any]]:
    """What each engine gives, all in one process with DEVICES virtual CPU devices."""
    root = Path(__file__).parents[2]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("engine_worker.py"))],
        input=json.dumps(engines),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(root)},
    )
    return json.loads(done.stdout)


SMALL = {"slots": 8, "prefill_chunks": [32], "max_context": 128, "dtype": "float32"}
CASES: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"tensor_parallel": 2},
    "four": {"tensor_parallel": 4},
    "eight": {"tensor_parallel": 8},
    "orbax_four": {"tensor_parallel": 4},
    "crowded_two": {"tensor_parallel": 2, "num_pages": 16},
    "native_attention_four": {"tensor_parallel": 4, "attention": "cpu_native"},
    "int8_cache_one": {"kv_dtype": "int8"},
    "int8_cache_two": {"kv_dtype": "int8", "tensor_parallel": 2},
    "int8_cache_four": {"kv_dtype": "int8", "tensor_parallel": 4, "num_pages": 16},
    "int8_cache_eight": {"kv_dtype": "int8", "tensor_parallel": 8},
    "int8_one": {"quantization": "int8", "attention": "cpu_native"},
    "int8_four": {"quantization": "int8", "attention": "cpu_native", "tensor_parallel": 4},
    "tied_one": {},
    "tied_two": {"tensor_parallel": 2},
    "replicas": {"replicas": 2, "tensor_parallel": 2, "slots": 4},
    "three": {"tensor_parallel": 3},
    "many": {"tensor_parallel": 8, "replicas": 2},
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    qwen = write_checkpoint(folder / "qwen")
    tied = write_checkpoint(
        folder / "tied", model_type="qwen2", architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True, head_dim=None
    )
    convert(str(qwen), folder / "orbax", "float32")
    paths = {"orbax_four": folder / "orbax", "tied_one": tied, "tied_two": tied}
    common = {**SMALL, "matmul": "xla", "attention": "cpu_xla"}
    engines = [{**common, "model": str(paths.get(name, qwen)), **fields} for name, fields in CASES.items()]
    return dict(zip(CASES, run_engines(*engines), strict=True))


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["tokens"] == other["tokens"]
    for what in ("logprobs", "prompt_logprobs"):
        for ours, theirs in zip(one[what], other[what], strict=True):
            assert ours == pytest.approx(theirs, abs=ROUNDING)


@pytest.mark.parametrize("name", ["two", "four", "eight", "orbax_four", "native_attention_four"])
def test_tokens_equal_those_of_one_device(given: dict[str, dict[str, Any]], name: str):
    assert_same(given[name], given["one"])


@pytest.mark.parametrize("name", ["one", "two", "four", "eight", "int8_cache_eight"])
def test_prompts_were_scored_and_prefixes_found(given: dict[str, dict[str, Any]], name: str):
    """What makes the comparisons above ones of prompt scores, and of mixed steps that begin within a prompt."""
    assert [len(scores) > 0 for scores in given[name]["prompt_logprobs"]].count(True) >= 3
    assert given[name]["loads"]["prefix_hits"] > 0


@pytest.mark.parametrize("name", ["int8_cache_two", "int8_cache_four", "int8_cache_eight"])
def test_an_int8_cache_is_shared_too(given: dict[str, dict[str, Any]], name: str):
    """A key that falls on either side of a rounding to int8 moves a log-probability by a thousandth or two; were it to
    tip a choice on some processor, it would tip one request's, not all."""
    ours, theirs = given[name], given["int8_cache_one"]
    same = [mine == other for mine, other in zip(ours["tokens"], theirs["tokens"], strict=True)]
    assert same.count(False) <= 1
    for mine, other, equal in zip(ours["logprobs"], theirs["logprobs"], same, strict=True):
        assert not equal or mine == pytest.approx(other, abs=1e-2)
    for mine, other in zip(ours["prompt_logprobs"], theirs["prompt_logprobs"], strict=True):
        assert mine == pytest.approx(other, abs=1e-2)


def test_pages_of_an_int8_cache_go_to_the_host_and_come_back(given: dict[str, dict[str, Any]]):
    assert given["int8_cache_four"]["loads"]["preemptions"] > 0


def test_pages_of_a_shared_cache_go_to_the_host_and_come_back(given: dict[str, dict[str, Any]]):
    assert_same(given["crowded_two"], given["one"])
    loads = given["crowded_two"]["loads"]
    assert loads["preemptions"] > 0 and loads["restored_pages"] > 0


def test_int8_weights_are_shared_too(given: dict[str, dict[str, Any]]):
    """Activations that fall on either side of a rounding to int8 may part the ways of two runs later on, and on some
    processor move the first token's log-probability of one request, by less than a hundredth."""
    first = [
        abs(ours[0] - theirs[0])
        for ours, theirs in zip(given["int8_four"]["logprobs"], given["int8_one"]["logprobs"], strict=True)
    ]
    assert sum(difference > ROUNDING for difference in first) <= 1
    assert max(first) < 1e-2


def test_a_tied_embedding_and_biases_are_shared_too(given: dict[str, dict[str, Any]]):
    assert_same(given["tied_two"], given["tied_one"])


@pytest.mark.parametrize(("name", "parts"), [("two", 2), ("four", 4), ("eight", 8), ("orbax_four", 4)])
def test_each_device_holds_its_share_of_weights_and_cache(given: dict[str, dict[str, Any]], name: str, parts: int):
    (whole,), (cache,) = given["one"]["weights"][0], given["one"]["cache"][0]
    (weights,), (caches,) = given[name]["weights"], given[name]["cache"]
    assert caches == [cache // parts] * parts
    assert len(weights) == parts and max(weights) < whole / parts * 1.02  # norms are whole on each


def test_replicas_give_the_tokens_of_one_engine_and_share_the_requests(given: dict[str, dict[str, Any]]):
    assert_same(given["replicas"], given["one"])
    (first, second), one = given["replicas"]["weights"], given["two"]["weights"][0]
    assert first == second == one
    assert given["replicas"]["loads"]["slots"] == 8
    taken = given["replicas"]["taken_slots"]
    assert len(taken) == len(given["one"]["tokens"])
    assert min(sum(slot < 4 for slot in taken), sum(slot >= 4 for slot in taken)) >= 3


def test_heads_that_cannot_be_shared_evenly_are_refused(given: dict[str, dict[str, Any]]):
    assert given["three"]["error"] == "tensor_parallel: must divide the model's num_kv_heads of 8, got 3"


def test_more_devices_than_there_are_are_refused(given: dict[str, dict[str, Any]]):
    assert "2 replicas of 8 devices each were asked for, and there are 8 devices" in given["many"]["error"]


def test_native_products_are_for_one_device():
    with pytest.raises(ValueError, match="matmul: must be xla with tensor_parallel of 2, got 'native'"):
        EngineConfig(tensor_parallel=2, matmul="native")
    with pytest.raises(ValueError, match="replicas: must be at least 1, got 0"):
        EngineConfig(replicas=0)
