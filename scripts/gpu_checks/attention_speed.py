"""Attention alone: decode as a part of the copy bandwidth, a prompt chunk as a part of the matmul rate."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from gpu_checks import roofline
from gpu_checks.timing import seconds_per_call
from pallas_kernels import AttentionNeeds, PagedAttention, select

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LAYERS = 4
"""In one call, as in a step: what is to do is the same for each, and is computed once."""


def run(rehearse: bool) -> Iterator[dict]:
    """Every decode and chunk case."""
    rates = roofline.rates(rehearse)
    results: dict = {**rates, "decode": [], "chunk": []}
    cases = [(64, 4096, 16, "bfloat16"), (64, 4096, 64, "bfloat16"), (64, 4096, 64, "int8"), (1, 4096, 16, "bfloat16")]
    cases += [(32, 1024, 16, "bfloat16"), (64, 1024, 16, "bfloat16"), (1, 65536, 64, "bfloat16")]
    for rows, context, page_size, dtype in [(2, 256, 16, "bfloat16")] if rehearse else cases:
        attention = _attention(dtype)
        seconds = _time(attention, rows, 0, context, page_size, dtype)
        itemsize = jnp.dtype(dtype).itemsize
        moved = rows * context * KV_HEADS * 2 * (HEAD_DIM * itemsize + 4 * (dtype == "int8"))
        results["decode"].append(
            {
                "attention": attention.name, "rows": rows, "context": context, "page_size": page_size, "dtype": dtype,
                "us": seconds * 1e6, "gb_per_s": moved / seconds / 1e9,
                "of_copy": moved / seconds / 1e9 / rates["copy_gb_per_s"],
            }
        )  # fmt: skip
        yield results
    for chunk, context in [(64, 128)] if rehearse else [(512, 4096), (2048, 4096), (2048, 2048), (4096, 16384)]:
        attention = _attention("bfloat16")
        seconds = _time(attention, 1, chunk, context, 16, "bfloat16")
        seen = sum(range(context - chunk + 1, context + 1))
        operations = 4 * Q_HEADS * HEAD_DIM * seen
        results["chunk"].append(
            {
                "attention": attention.name, "tokens": chunk, "context": context, "us": seconds * 1e6,
                "tflop_per_s": operations / seconds / 1e12,
                "of_matmul": operations / seconds / 1e12 / rates["bf16_tflop_per_s"],
            }
        )  # fmt: skip
        yield results


def _attention(dtype: str) -> PagedAttention:
    device = jax.devices()[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    return select(platform, None, AttentionNeeds(dtype, device_kind=device.device_kind))


def _time(attention: PagedAttention, rows: int, chunk: int, context: int, page_size: int, dtype: str) -> float:
    """Seconds of a layer with `rows` decode rows at `context`, or with one piece of `chunk` tokens that ends there."""
    pages = context // page_size
    layout = attention.cache_layout(1 + rows * pages, page_size, KV_HEADS, HEAD_DIM, dtype)
    keys = jax.random.split(jax.random.key(0), 8)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.float32:
            return jnp.full(leaf.shape, 0.01, leaf.dtype)
        return jax.random.randint(keys[0], leaf.shape, -100, 100, jnp.int8).astype(leaf.dtype)

    caches = tuple(jax.tree.map(fill, layout) for _ in range(LAYERS))
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

    return seconds_per_call(call, (jnp.zeros(q.shape, q.dtype), caches), calls=20) / LAYERS
