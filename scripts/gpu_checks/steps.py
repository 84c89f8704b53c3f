"""A whole step of the engine's own forward and choosing, on random weights: MBU of decode, operations of prompts."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_checks import roofline
from gpu_checks.cases import Case, Options
from gpu_checks.chosen_attention import chosen_attention
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
from jaxserve.models.config import ModelConfig
from jaxserve.scheduling.sequence import EMITTED

PEAK_GB_PER_S = {"H100 80GB HBM3": 3350, "H200": 4800}
"""Of the data sheet, by a part of the device's name."""


def cases(options: Options) -> Iterator[Case]:
    """Decode at several batch sizes and steps with a prompt, each timed; then what each consists of."""
    model, context = (TINY, 128) if options.rehearse else (LLAMA_8B, 1024)
    yield "weights", functools.partial(_shared, model, options.rehearse)
    # The telling ones first: a section may end before it is through.
    decode, prompts = ((2,), (64,)) if options.rehearse else ((64, 32, 1), (2048, 512))
    for attention in ("xla", None) if options.beside_xla else (None,):
        steps = [Step(model, attention, rows, 0, context) for rows in decode]
        steps += [Step(model, attention, 1, chunk, chunk) for chunk in prompts]
        for step in steps:
            yield step.name, functools.partial(_timed, step, options.rehearse)
        for step in steps:
            yield f"profile of {step.name}", functools.partial(_profile, step)


@dataclass(frozen=True)
class Step:
    """A step with `live` decode rows at `context`, or with one prompt of `chunk` tokens."""

    model: ModelConfig
    attention: str | None
    """By its name; None is what an engine takes."""
    live: int
    chunk: int
    context: int

    @property
    def name(self) -> str:
        what = f"prompt of {self.chunk}" if self.chunk else f"{self.live} rows"
        return f"{what} {self.attention}" if self.attention else what


def prompt_operations(model: ModelConfig, tokens: int) -> int:
    """Multiplications and additions of a prompt: of its layers for each token, of the head for the last one alone."""
    hidden = model.hidden_size
    layer = 2 * hidden * (model.q_size + model.kv_size) + 3 * hidden * model.intermediate_size
    attended = tokens * (tokens + 1) // 2
    layers = model.num_layers * (2 * tokens * layer + 4 * model.q_size * attended)
    return layers + 2 * model.vocab_size * hidden


def _peak_gb_per_s(rehearse: bool) -> float:
    """Of the data sheet, or of a copy where that is not known."""
    kind = jax.devices()[0].device_kind
    known = (rate for name, rate in PEAK_GB_PER_S.items() if name in kind)
    return next(known, roofline.rates(rehearse)["copy_gb_per_s"])


def _shared(model: ModelConfig, rehearse: bool) -> dict:
    weight_bytes = sum(leaf.nbytes for leaf in _weights(model))
    return {
        **roofline.rates(rehearse),
        "weight_gb": weight_bytes / 1e9,
        "peak_gb_per_s": _peak_gb_per_s(rehearse),
    }


def _timed(step: Step, rehearse: bool) -> dict:
    model = step.model
    call, first_carry = _prepared(step)
    seconds = seconds_per_call(call, first_carry(), calls=5)
    case = {"attention": chosen_attention("bfloat16", name=step.attention).name, "ms": seconds * 1e3}
    if step.chunk:
        rate = prompt_operations(model, step.chunk) / seconds / 1e12
        of_matmul = rate / roofline.rates(rehearse)["bf16_tflop_per_s"]
        return {"prefill": [{**case, "tokens": step.chunk, "tflop_per_s": rate, "of_matmul": of_matmul}]}
    weight_bytes = sum(leaf.nbytes for leaf in _weights(model))
    # A token's embedding is one row: the table is not read.
    read = weight_bytes - 2 * model.vocab_size * model.hidden_size * (not model.tie_embeddings)
    moved = read + step.live * step.context * 2 * model.num_layers * model.kv_size * 2
    gb_per_s = moved / seconds / 1e9
    case |= {"rows": step.live, "context": step.context, "tokens_per_s": step.live / seconds}
    parts = roofline.of_bandwidths(gb_per_s, rehearse)
    return {"decode": [{**case, "mbu": gb_per_s / _peak_gb_per_s(rehearse), **parts}]}


def _profile(step: Step) -> dict:
    call, first_carry = _prepared(step)
    return {"profile": profile(step.name, call, first_carry(), calls=5)}


_weights = functools.cache(random_weights)


@functools.cache
def _prepared(of: Step) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """What computes the step, and what makes its first carry.

    Its rows are those of the engine, which has none of fewer than `small_slots`. Raises RuntimeError where other rows
    give a token than are to.
    """
    model, live, chunk, context = of.model, of.live, of.chunk, of.context
    weights, attention = _weights(model), chosen_attention("bfloat16", name=of.attention)
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
