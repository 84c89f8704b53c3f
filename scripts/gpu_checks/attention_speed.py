"""Attention alone: decode as a part of what memory gives, a prompt chunk as a part of the matmul rate."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gpu_checks import roofline
from gpu_checks.cases import Case, Options
from gpu_checks.chosen_attention import chosen_attention
from gpu_checks.timing import profile, seconds_per_call

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LAYERS = 4
"""In one call, as in a step: what is to do is the same for each, and is computed once."""
WORKING_SET = 256e6
"""Bytes of all layers' caches, where each is read once: a Hopper's L2 cache holds 50 MB."""
MOST_LAYERS = 16


@dataclass(frozen=True)
class Work:
    """`rows` decode rows at `context`, or one piece of `chunk` tokens that ends there."""

    rows: int
    chunk: int
    context: int
    page_size: int = 16
    dtype: str = "bfloat16"
    """Of the cache."""

    @property
    def name(self) -> str:
        if self.chunk:
            return f"chunk of {self.chunk} at {self.context}"
        return f"{self.rows} x {self.context} page {self.page_size} {self.dtype}"

    @property
    def cache_bytes(self) -> int:
        """Of keys, values and scales, in one layer."""
        scales = 4 * (self.dtype == "int8")
        return self.rows * self.context * KV_HEADS * 2 * (HEAD_DIM * jnp.dtype(self.dtype).itemsize + scales)

    @property
    def layers(self) -> int:
        """In one call: as many as the working set takes for decode, which memory bounds."""
        return LAYERS if self.chunk else min(max(LAYERS, math.ceil(WORKING_SET / self.cache_bytes)), MOST_LAYERS)


DECODE = (
    Work(64, 0, 4096),
    Work(64, 0, 4096, 64),
    Work(64, 0, 4096, 64, "int8"),
    Work(1, 0, 4096),
    Work(32, 0, 1024),
    Work(64, 0, 1024),
    Work(1, 0, 65536, 64),
)
CHUNKS = (Work(1, 512, 4096), Work(1, 2048, 4096), Work(1, 2048, 2048), Work(1, 4096, 16384))
REHEARSED = (Work(2, 0, 256),), (Work(1, 64, 128),)


def cases(options: Options) -> Iterator[Case]:
    """Every decode and chunk case, then what the kernels of each take without the time between them."""
    decode, chunks = REHEARSED if options.rehearse else (DECODE, CHUNKS)
    for work in decode:
        yield work.name, functools.partial(_decode, work, options.rehearse)
    for work in chunks:
        yield work.name, functools.partial(_chunk, work, options.rehearse)
    for work in (*decode, *chunks):
        yield f"profile of {work.name}", functools.partial(_profile, work)


def _decode(work: Work, rehearse: bool) -> dict:
    seconds, gb_per_s = _timed(work, work.cache_bytes / 1e9)
    case = {
        "attention": chosen_attention(work.dtype).name, "rows": work.rows, "context": work.context,
        "page_size": work.page_size, "dtype": work.dtype, "layers": work.layers, "us": seconds * 1e6,
        "gb_per_s": gb_per_s, **roofline.of_bandwidths(gb_per_s, rehearse),
    }  # fmt: skip
    return {**roofline.rates(rehearse), "decode": [case]}


def _chunk(work: Work, rehearse: bool) -> dict:
    seen = sum(range(work.context - work.chunk + 1, work.context + 1))
    seconds, rate = _timed(work, 4 * Q_HEADS * HEAD_DIM * seen / 1e12)
    case = {
        "attention": chosen_attention(work.dtype).name, "tokens": work.chunk, "context": work.context,
        "us": seconds * 1e6, "tflop_per_s": rate, "of_matmul": rate / roofline.rates(rehearse)["bf16_tflop_per_s"],
    }  # fmt: skip
    return {**roofline.rates(rehearse), "chunk": [case]}


def _timed(work: Work, amount: float) -> tuple[float, float]:
    """Seconds of a layer, and of an amount what it does in a second."""
    call, first_carry = _layers(work)
    seconds = seconds_per_call(call, first_carry(), calls=20) / work.layers
    return seconds, amount / seconds


def _profile(work: Work) -> dict:
    """Microseconds of a layer."""
    call, first_carry = _layers(work)
    return {"profile": profile(work.name, call, first_carry(), calls=5, parts=work.layers, most=4)}


@functools.cache
def _layers(work: Work) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """A call of all layers, and what makes its first carry."""
    attention, rows, chunk, context = chosen_attention(work.dtype), work.rows, work.chunk, work.context
    pages = context // work.page_size
    layout = attention.cache_layout(1 + rows * pages, work.page_size, KV_HEADS, HEAD_DIM, work.dtype)
    keys = jax.random.split(jax.random.key(0), 8)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.float32:
            return jnp.full(leaf.shape, 0.01, leaf.dtype)
        return jax.random.randint(keys[0], leaf.shape, -100, 100, jnp.int8).astype(leaf.dtype)

    table = (1 + jax.random.permutation(keys[1], rows * pages)).reshape(rows, pages).astype(jnp.int32)
    tokens = rows + chunk
    q, k, v = (
        jax.random.normal(key, (tokens, heads, HEAD_DIM), jnp.bfloat16)
        for key, heads in zip(keys[2:5], (Q_HEADS, KV_HEADS, KV_HEADS), strict=True)
    )
    if chunk:
        row = jnp.concatenate([jnp.full(rows, -1, jnp.int32), jnp.zeros(chunk, jnp.int32)])
        position = jnp.concatenate([jnp.zeros(rows, jnp.int32), jnp.arange(context - chunk, context, dtype=jnp.int32)])
    else:
        row, position = jnp.arange(rows, dtype=jnp.int32), jnp.full(rows, context - 1, jnp.int32)

    # Arguments, not constants of the program, which XLA would compute with ahead.
    @functools.partial(jax.jit, donate_argnums=0)
    def attend(carry, q, k, v, table, row, position):
        out, caches = carry
        written = []
        for cache in caches:
            out, cache = attention.write_and_attend(q + out, k, v, cache, table, row, position, scale=HEAD_DIM**-0.5)
            written.append(cache)
        return out, tuple(written)

    def call(carry):
        return attend(carry, q, k, v, table, row, position)

    def first_carry():
        return jnp.zeros(q.shape, q.dtype), tuple(jax.tree.map(fill, layout) for _ in range(work.layers))

    return call, first_carry
