"""What a step costs if it were nothing but its matrix products."""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from jaxserve.checkpoints.description import describe_model
from jaxserve.models.layers import project
from jaxserve.models.llama import abstract_llama
from pallas_kernels import linear as packed
from pallas_kernels.block_quantization import BLOCK, dequantize_blocks, row_width

ROUNDS = 9
"""Runs of a measurement."""


class MatmulFloor:
    """A step's bare matrix products: every weight of the model against the rows of a step, and nothing else.

    Args:
        arguments: `model`, `dtype`, `quantization` and `slots`, as `add_engine_arguments` gives them.
        matmul: how, as in `EngineConfig.matmul`.
    """

    def __init__(self, arguments: argparse.Namespace, matmul: str):
        config, _ = describe_model(arguments.model)
        _, params = abstract_llama(config, arguments.dtype, arguments.quantization)
        leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
        if not config.tie_embeddings or arguments.quantization != "none":
            # The head has weights of its own: the embedding is only looked up.
            leaves = [(name, leaf) for name, leaf in leaves if "embedding" not in name]
        leaves = [(name, leaf) for name, leaf in leaves if leaf.ndim == 2]
        weights = [jnp.ones(leaf.shape, leaf.dtype) for _, leaf in leaves]
        shapes = [leaf.shape for _, leaf in leaves]
        if arguments.quantization == "int4":
            # The parameters are bytes: their inputs follow from those of a block.
            bits = [8 if "lm_head" in name else 4 for name, _ in leaves]
            shapes = [(out, width * BLOCK // row_width(BLOCK, b)) for (out, width), b in zip(shapes, bits, strict=True)]
        x_dtype = jnp.dtype(arguments.dtype)
        inputs = {size: jnp.ones((arguments.slots, size), x_dtype) for _, size in shapes}
        if matmul == "native":
            weights = [packed.pack(weight) for weight in weights]

        def products(weights: list[jax.Array], inputs: dict[int, jax.Array]) -> list[jax.Array]:
            outs = []
            for weight, (size_out, size_in) in zip(weights, shapes, strict=True):
                x = inputs[size_in]
                if matmul == "native":
                    scale = jnp.ones(size_out, jnp.float32) if weight.dtype == jnp.int8 else None
                    out = packed.linear(x, weight, size_out, scale=scale)
                elif weight.dtype == jnp.uint8:
                    out = project(x, dequantize_blocks(weight, size_in).astype(x_dtype), None, x_dtype)
                elif weight.dtype == jnp.int8:
                    x = x.astype(jnp.int8)
                    out = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
                else:
                    out = project(x, weight, None, x_dtype)
                # One after the other, as in a step.
                inputs[size_in], out = jax.lax.optimization_barrier((inputs[size_in], out))
                outs.append(out)
            return outs

        self._compiled = jax.jit(products).lower(weights, dict(inputs)).compile()
        self._arguments = (weights, inputs)
        self.times: list[float] = []

    def measure(self) -> None:
        """Adds the milliseconds of some runs to `times`."""
        for _ in range(ROUNDS):
            start = time.perf_counter()
            jax.block_until_ready(self._compiled(*self._arguments))
            self.times.append(1e3 * (time.perf_counter() - start))

    @property
    def milliseconds(self) -> float:
        """Median of all runs."""
        return statistics.median(self.times)
