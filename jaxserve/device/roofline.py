"""The least time that a step can take on a device: what it must read over the bandwidth, or compute over the rate.

Each device of a replica does an equal share. What devices tell each other, launches and the host are left out, so that
no step is faster than its floor.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.config import Quantization
from jaxserve.device.devices import Device
from jaxserve.device.sharding import RULES, parameter_axes
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import abstract_llama
from jaxserve.models.parameters import named_parameters


@dataclass(frozen=True)
class ModelCost:
    """What a model takes of each of the devices that share it. Bytes, and operations (an addition is one)."""

    weight_bytes: int
    """Held."""
    read_bytes: int
    """Read by every step: all but an embedding that is only looked up in."""
    flops_per_token: float
    """Of the products with weights but the lm head's."""
    flops_per_logits: float
    """Of the lm head, for one row."""
    flops_per_pair: float
    """Of attention, for one token and one position that it attends to."""
    cache_bytes_per_token: float
    """Of keys, values and their scales over all layers."""
    sliding_window: int | None
    """Positions that a token attends to at most."""
    products_in_int8: bool
    """Both sides of the products with weights are int8. Those of int4 are not: its activations stay as they are."""

    def products(self, device: Device, tokens: int, logits: int) -> float:
        """Seconds that the products with weights take at the device's rate: of tokens, and of rows that get logits."""
        rate = device.int8_ops if self.products_in_int8 else device.flops
        return (tokens * self.flops_per_token + logits * self.flops_per_logits) / rate

    def attended(self, context: int) -> int:
        """Positions that the last token of a context attends to."""
        return min(context, self.sliding_window or context)

    def decode_bytes(self, rows: int, context: int) -> float:
        """Read and written by a decode step of `rows` rows at `context` tokens each: weights and live cache."""
        return self.read_bytes + rows * self.attended(context) * self.cache_bytes_per_token

    def decode_flops(self, rows: int, context: int) -> float:
        """Of the same step."""
        per_row = self.flops_per_token + self.flops_per_logits + self.attended(context) * self.flops_per_pair
        return rows * per_row

    def decode_floor(self, device: Device, rows: int, context: int) -> float:
        """Seconds. Attention reads its cache before and after the products read theirs, and neither can hide the other:
        rows x cache / bandwidth + max(products / rate, weights / bandwidth)."""
        cache = rows * self.attended(context) * self.cache_bytes_per_token / device.bandwidth
        return cache + max(self.products(device, rows, rows), self.read_bytes / device.bandwidth)

    def prefill_floor(self, device: Device, tokens: int) -> float:
        """Seconds for a prompt of `tokens` tokens alone: products and attention at full rate, or the weights' bytes."""
        window = self.attended(tokens)
        # Token i attends to min(i + 1, window) positions.
        pairs = window * (window + 1) / 2 + (tokens - window) * window
        seconds = self.products(device, tokens, 1) + pairs * self.flops_per_pair / device.flops
        return max(seconds, self.read_bytes / device.bandwidth)


def model_cost(
    model: ModelConfig, dtype: str, quantization: Quantization, cache_bytes_per_token: float, tensor_parallel: int
) -> ModelCost:
    """The cost to each of `tensor_parallel` devices, whose cache takes `cache_bytes_per_token` on each of them."""
    parameters = _abstract_parameters(model, dtype, quantization)
    sizes = {
        name: math.prod(array.shape)
        * jnp.dtype(array.dtype).itemsize
        // (tensor_parallel if RULES[parameter_axes(name)[0]] else 1)
        for name, array in parameters.items()
    }
    has_head = "lm_head.weight" in parameters
    head = model.vocab_size * model.hidden_size
    # The floating-point model has a weight for each multiplication, whatever its bytes are here.
    floating = _abstract_parameters(model, dtype, "none")
    products = sum(
        math.prod(array.shape)
        for name, array in floating.items()
        if len(array.shape) == 2 and name not in ("embedding", "lm_head.weight")
    )
    return ModelCost(
        weight_bytes=sum(sizes.values()),
        read_bytes=sum(sizes.values()) - (sizes["embedding"] if has_head else 0),
        flops_per_token=2 * products / tensor_parallel,
        flops_per_logits=2 * head / tensor_parallel,
        flops_per_pair=4 * model.q_size * model.num_layers / tensor_parallel,
        cache_bytes_per_token=cache_bytes_per_token,
        sliding_window=model.sliding_window,
        products_in_int8=quantization == "int8",
    )


@functools.lru_cache(maxsize=8)
def _abstract_parameters(
    model: ModelConfig, dtype: str, quantization: Quantization
) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the weights by name. Kept: a plan asks for the same ones again and again."""
    return named_parameters(abstract_llama(model, dtype, quantization)[1])
