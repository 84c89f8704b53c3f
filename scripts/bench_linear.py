"""Times the products of a model's linear maps: packed weights and the native kernel, and XLA's dot, for CPU.

A call of the benchmark multiplies by many copies of a weight, so that each comes from memory as it does in a step. The
least of the rounds counts.

    python scripts/bench_linear.py [--rows 1,8,32] [--quantization int4] [--json]
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxserve.config import Quantization
from jaxserve.models.layers import project, project_int8, quantize_rows
from pallas_kernels.block_quantization import dequantize_blocks, quantize_blocks
from pallas_kernels.linear import linear, pack

WORKING_SET = 128 << 20
"""Bytes of all copies of a weight, well beyond the last-level cache."""
SMOLLM2 = {"qkv": (576, 960), "out": (576, 576), "gate_up": (576, 3072), "down": (1536, 576), "lm_head": (576, 49152)}
"""Inputs and outputs of each linear map of SmolLM2-135M."""


@dataclass(frozen=True)
class Timing:
    """One product."""

    layer: str
    rows: int
    weight_bytes: int
    native_microseconds: float
    xla_microseconds: float

    @property
    def ratio(self) -> float:
        """How many times as fast as XLA's the native product is."""
        return self.xla_microseconds / self.native_microseconds


def seconds(function: Callable, x: Array, weights: list, rounds: int) -> float:
    """Of one product, the least of the rounds."""
    run = jax.jit(lambda x, weights: [function(x, *weight) for weight in weights])
    best = float("inf")
    for _ in range(rounds + 1):
        started = time.perf_counter()
        jax.block_until_ready(run(x, weights))
        best = min(best, time.perf_counter() - started)
    return best / len(weights)


def measure(layer: str, rows: int, dtype: jnp.dtype, quantization: Quantization, rounds: int) -> Timing:
    """Times a layer's product in both forms."""
    size_in, size_out = SMOLLM2[layer]
    x = jax.random.normal(jax.random.key(0), (rows, size_in), dtype)
    weight = jax.random.normal(jax.random.key(1), (size_out, size_in), dtype)
    scale = None
    if quantization == "int8":
        weight, scale = quantize_rows(weight)
    elif quantization == "int4":
        weight = quantize_blocks(weight, 8 if layer == "lm_head" else 4)
    copies = max(1, min(64, WORKING_SET // weight.nbytes))
    packed = pack(weight)

    def xla(x: Array, weight: Array) -> Array:
        if quantization == "int4":
            return project(x, dequantize_blocks(weight, size_in).astype(dtype), None, dtype)
        return project(x, weight, None, dtype) if scale is None else project_int8(x, weight, scale, None, dtype)

    native = seconds(
        lambda x, weight: linear(x, weight, size_out, scale=scale),
        x,
        [(jnp.copy(packed),) for _ in range(copies)],
        rounds,
    )
    plain = seconds(xla, x, [(jnp.copy(weight),) for _ in range(copies)], rounds)
    return Timing(layer, rows, weight.nbytes, native * 1e6, plain * 1e6)


def main() -> None:
    """Prints a table, then with --json one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,32,160,544")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--quantization", default="none", choices=get_args(Quantization))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one line of JSON last")
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, jax {jax.__version__}")
    print(f"{options.dtype}, quantization {options.quantization}")
    print(f"{'layer':8} {'rows':>5} {'native us':>10} {'GB/s':>6} {'GFLOP/s':>8} {'XLA us':>10} {'times':>6}")
    timings = []
    for rows in map(int, options.rows.split(",")):
        for layer, (size_in, size_out) in SMOLLM2.items():
            timing = measure(layer, rows, dtype, options.quantization, options.rounds)
            timings.append(timing)
            nanoseconds = timing.native_microseconds * 1e3
            size = size_in * size_out
            bandwidth = timing.weight_bytes / nanoseconds
            print(
                f"{layer:8} {rows:5} {timing.native_microseconds:10.1f} {bandwidth:6.1f}"
                f" {2 * rows * size / nanoseconds:8.1f} {timing.xla_microseconds:10.1f} {timing.ratio:6.2f}",
                flush=True,
            )
    if options.json:
        named = [{**asdict(timing), "ratio": timing.ratio} for timing in timings]
        print(json.dumps({"dtype": options.dtype, "quantization": options.quantization, "timings": named}))


if __name__ == "__main__":
    main()
