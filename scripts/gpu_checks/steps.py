"""A whole step of the engine's own forward and choosing, on random weights: MBU of decode, operations of prompts."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_checks import roofline
from gpu_checks.random_model import LLAMA_8B, TINY, random_weights
from gpu_checks.timing import profile, seconds_per_call
from jaxserve.config import EngineConfig
from jaxserve.device.batch import ROW_COLUMNS, Column, Upload
from jaxserve.device.choosing import make_choosing
from jaxserve.device.decode_state import DecodeState
from jaxserve.device.kv_cache import KVCache
from jaxserve.device.lowering import StepInputs
from jaxserve.device.sharding import Placement
from jaxserve.device.step import make_forward
from jaxserve.device.vocabulary import search_on
from jaxserve.scheduling.sequence import EMITTED
from pallas_kernels import AttentionNeeds, select

PEAK_GB_PER_S = {"H100 80GB HBM3": 3350, "H200": 4800}
"""Of the data sheet, by a part of the device's name."""


def run(rehearse: bool) -> Iterator[dict]:
    """Decode at several batch sizes, then steps with a prompt chunk, and what each consists of."""
    rates = roofline.rates(rehearse)
    model = TINY if rehearse else LLAMA_8B
    context = 128 if rehearse else 1024
    device = jax.devices()[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    attention = select(platform, None, AttentionNeeds("bfloat16", device_kind=device.device_kind))
    peak = next((rate for name, rate in PEAK_GB_PER_S.items() if name in device.device_kind), rates["copy_gb_per_s"])
    weights = random_weights(model)
    weight_bytes = sum(leaf.nbytes for leaf in weights)
    # A token's embedding is one row: the table is not read.
    read_bytes = weight_bytes - 2 * model.vocab_size * model.hidden_size * (not model.tie_embeddings)
    kv_bytes = 2 * model.num_layers * model.kv_size * 2
    results: dict = {**rates, "attention": attention.name, "weight_gb": weight_bytes / 1e9, "peak_gb_per_s": peak}

    results["decode"], results["prefill"], results["profile"] = [], [], []
    for rows in (2,) if rehearse else (1, 32, 64):
        call, carry = _step(weights, model, attention, rows, 0, context)
        seconds = seconds_per_call(call, carry(), calls=5)
        moved = read_bytes + rows * context * kv_bytes
        results["decode"].append(
            {
                "rows": rows, "context": context, "ms": seconds * 1e3, "mbu": moved / seconds / 1e9 / peak,
                "of_copy": moved / seconds / 1e9 / rates["copy_gb_per_s"], "tokens_per_s": rows / seconds,
            }
        )  # fmt: skip
        results["profile"] += profile(f"{rows} rows", call, carry(), calls=5)
        yield results
    for chunk in (64,) if rehearse else (512, 2048):
        call, carry = _step(weights, model, attention, 1, chunk, chunk)
        seconds = seconds_per_call(call, carry(), calls=5)
        operations = chunk * read_bytes + 4 * model.num_layers * model.q_size * chunk * (chunk + 1) // 2
        rate = operations / seconds / 1e12
        results["prefill"].append(
            {"tokens": chunk, "ms": seconds * 1e3, "tflop_per_s": rate, "of_matmul": rate / rates["bf16_tflop_per_s"]}
        )
        results["profile"] += profile(f"prompt of {chunk}", call, carry(), calls=5)
        yield results


def _step(
    weights, model, attention, live: int, chunk: int, context: int
) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """A step with `live` decode rows at `context`, or with one prompt of `chunk` tokens, and what makes its carry.

    Its rows are those of the engine, which has none of fewer than `small_slots`. Raises RuntimeError where other rows
    give a token than are to.
    """
    rows = max(live, EngineConfig().small_slots)
    config = EngineConfig(slots=rows, dtype="bfloat16")
    pages = -(-context // config.page_size)
    placement = Placement((jax.devices()[0],))
    inputs = StepInputs.abstract(model, config, attention, 1 + rows * pages, placement)
    search = search_on(placement.platform)
    forward = make_forward(inputs.build_model, model, attention, search, rows, chunk)
    take = make_choosing(search).take
    packed = jnp.asarray(_upload(rows, live, chunk, context, pages))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(weights, carry, packed):
        cache, state, _ = carry
        cache, prediction, packed_rows, _ = forward(weights, cache, state, packed)
        return cache, *take(state, prediction, packed_rows)

    def first_carry():
        state = replace(DecodeState.zeros(rows, model.vocab_size), ended=jnp.zeros(rows, bool))
        return KVCache.zeros(inputs.cache), state, jnp.zeros((2, rows), jnp.int32)

    def call(carry):
        return step(weights, carry, packed)

    *_, (_, flags) = call(first_carry())
    emits = np.arange(rows) < live
    if not ((np.asarray(flags) == EMITTED) == emits).all():
        raise RuntimeError(f"the first {live} rows were to give a token and no other; flags are {flags}")
    return call, first_carry


def _upload(rows: int, live: int, chunk: int, context: int, pages: int) -> np.ndarray:
    """What a step is told: `live` greedy rows of `context` tokens, or a chunk that is one prompt, and idle rows."""
    packed = np.zeros(Upload.size(rows, chunk, pages), np.int32)
    width = ROW_COLUMNS + pages
    table = packed[: rows * width].reshape(rows, width)
    table[:live, Column.SLOT] = np.arange(live)
    table[live:, Column.SLOT] = rows
    table[:live, Column.DECODES] = 0 if chunk else 1
    table[:, Column.SAMPLE_INDEX] = -1
    table[:live, Column.SAMPLE_INDEX] = chunk - 1 if chunk else -1
    table[:live, Column.LENGTH] = context
    table[:, Column.MAX_LENGTH] = 2**30
    table[:, Column.STOP_IDS : ROW_COLUMNS] = -1
    table[:, ROW_COLUMNS:] = 1 + np.random.default_rng(0).permutation(rows * pages).reshape(rows, pages)
    tokens, token_rows, positions = packed[rows * width :].reshape(3, chunk)
    tokens[:], token_rows[:], positions[:] = 7, 0, np.arange(chunk)
    return packed
