"""Times attention over the paged cache: decode rows and prompt chunks, a layer.

A call of the benchmark runs several layers in a row, each with a cache of its own, so that a layer's keys and values
come from memory as they do in a step. The least of the rounds counts.

The implementations are those of the platform that JAX runs on. `of copy` is the rate of reading keys and values over
the measured bandwidth of a copy: the roofline of a decode step.

    python scripts/bench_kernels.py [--implementation cpu_native] [--dtype bfloat16] [--json]
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from gpu_checks.roofline import copy_bandwidth

from pallas_kernels import IMPLEMENTATIONS, PagedAttention, select

PAGE_SIZE = 16
WORKING_SET = 256 << 20
"""Bytes of all layers' live keys and values together, well beyond the last-level cache."""


@dataclass(frozen=True)
class Case:
    """One call: decode rows at a context, and a chunk that ends at one."""

    decode_rows: int
    decode_context: int
    """Live tokens of each decode row, the new one included."""
    chunk: int
    chunk_context: int
    """Live tokens of the chunk's row after the chunk."""


@dataclass(frozen=True)
class Timing:
    """A case's result, a layer."""

    implementation: str
    case: Case
    milliseconds: float
    gigabytes_per_second: float
    """Live keys and values, once a row."""
    gigaflops: float
    """4 * q_heads * head_dim a pair of a token and a key it attends to."""


@dataclass(frozen=True)
class Heads:
    """The attention shape of a model; SmolLM2-135M by default."""

    q_heads: int
    kv_heads: int
    head_dim: int


def platform() -> str:
    """The platform of this process, a key of `IMPLEMENTATIONS`."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def arguments(case: Case, heads: Heads, dtype: jnp.dtype, attention: PagedAttention, layers: int) -> tuple:
    """Random operands of `layers` layers: (q, k, v, caches, table, token_row, position)."""
    rows = case.decode_rows + (case.chunk > 0)
    contexts = [case.decode_context] * case.decode_rows + [case.chunk_context] * (case.chunk > 0)
    max_pages = -(-max(contexts) // PAGE_SIZE)
    rng = np.random.default_rng(0)
    table = (1 + rng.permutation(rows * max_pages)).reshape(rows, max_pages).astype(np.int32)
    start = case.chunk_context - case.chunk
    idle = rows - case.decode_rows  # the decode row of what has a chunk
    token_row = [*range(case.decode_rows), *[-1] * idle, *[case.decode_rows] * case.chunk]
    position = [*[case.decode_context - 1] * case.decode_rows, *[0] * idle, *range(start, start + case.chunk)]
    layout = attention.cache_layout(rows * max_pages + 1, PAGE_SIZE, heads.kv_heads, heads.head_dim, dtype)

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype).at[0].set(0)

    tokens = len(position)
    q, k, v = (
        jnp.asarray(rng.standard_normal((tokens, count, heads.head_dim)), dtype)
        for count in (heads.q_heads, heads.kv_heads, heads.kv_heads)
    )
    caches = tuple(jax.tree.map(filled, layout) for _ in range(layers))
    return q, k, v, caches, jnp.asarray(table), jnp.asarray(token_row, jnp.int32), jnp.asarray(position, jnp.int32)


def chained(attention: PagedAttention, scale: float) -> Callable:
    """`layers` calls of which each one's queries follow from the last one's output."""

    def run(q, k, v, caches, table, token_row, position):
        written = []
        for cache in caches:
            out, cache = attention.write_and_attend(q, k, v, cache, table, token_row, position, scale=scale)
            q = (q + out) * jnp.asarray(0.5, q.dtype)
            written.append(cache)
        return q, tuple(written)

    return run


def measure(name: str, case: Case, heads: Heads, dtype: jnp.dtype, rounds: int) -> Timing:
    """Times one case."""
    attention = select(platform(), name)
    live = case.decode_rows * case.decode_context + case.chunk_context * (case.chunk > 0)
    layer_bytes = 2 * live * heads.kv_heads * heads.head_dim * dtype.itemsize
    layers = int(min(30, max(3, WORKING_SET // layer_bytes)))
    q, k, v, caches, *rest = arguments(case, heads, dtype, attention, layers)
    run = jax.jit(chained(attention, heads.head_dim**-0.5), donate_argnums=3)
    best = float("inf")
    for _ in range(rounds + 1):
        started = time.perf_counter()
        _, caches = jax.block_until_ready(run(q, k, v, caches, *rest))
        best = min(best, time.perf_counter() - started)
    seconds = best / layers
    start = case.chunk_context - case.chunk
    pairs = case.decode_rows * case.decode_context + sum(range(start + 1, start + case.chunk + 1))
    flops = 4 * heads.q_heads * heads.head_dim * pairs
    return Timing(name, case, seconds * 1e3, layer_bytes / seconds / 1e9, flops / seconds / 1e9)


def cases() -> list[Case]:
    """What is timed by default."""
    decodes = [Case(rows, context, 0, 0) for rows in (8, 32) for context in (256, 512, 2048)]
    chunks = [Case(0, 0, 128, context) for context in (128, 256, 512, 2048)] + [Case(0, 0, 512, 512)]
    return [*decodes, *chunks, Case(32, 256, 128, 512)]


def main() -> None:
    """Prints a table, then with --json one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", action="append", help="of the platform; by default its first two")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--heads", default="9,3,64", help="q_heads,kv_heads,head_dim")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one line of JSON last")
    options = parser.parse_args()
    heads = Heads(*map(int, options.heads.split(",")))
    timings = []
    named = IMPLEMENTATIONS[platform()]
    bandwidth = copy_bandwidth(0.5) / 1e9
    print(f"{jax.devices()[0].device_kind}, copy {bandwidth:.1f} GB/s")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.dtype}, {heads}, jax {jax.__version__}")
    print(f"{'':12} {'decode rows':>14} {'chunk':>14} {'ms/layer':>9} {'GB/s':>6} {'of copy':>7} {'GFLOP/s':>8}")
    for name in options.implementation or list(named)[:2]:
        for case in cases():
            timing = measure(name, case, heads, jnp.dtype(options.dtype), options.rounds)
            timings.append(timing)
            decode = f"{case.decode_rows} x {case.decode_context}" if case.decode_rows else ""
            chunk = f"{case.chunk} to {case.chunk_context}" if case.chunk else ""
            print(
                f"{name:12} {decode:>14} {chunk:>14} {timing.milliseconds:9.3f}"
                f" {timing.gigabytes_per_second:6.1f} {timing.gigabytes_per_second / bandwidth:7.2f}"
                f" {timing.gigaflops:8.1f}",
                flush=True,
            )
    if options.json:
        report = {"copy_gb_per_s": bandwidth, "dtype": options.dtype, "heads": asdict(heads)}
        print(json.dumps(report | {"timings": [asdict(timing) for timing in timings]}))


if __name__ == "__main__":
    main()
