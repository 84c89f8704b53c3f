"""The paged KV cache: a cache for each layer, in the layout of the attention implementation."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.config import EngineConfig
from jaxserve.models.config import ModelConfig
from jaxserve.pytree import pytree_dataclass
from pallas_kernels import LayerCache, PagedAttention


@pytree_dataclass
@dataclass(frozen=True)
class KVCache:
    """Donated to each step, which writes the keys and values of its tokens in place. Page 0 stays zero."""

    layers: tuple[LayerCache, ...]

    @staticmethod
    def zeros(model: ModelConfig, attention: PagedAttention, num_pages: int, config: EngineConfig) -> "KVCache":
        """An empty cache of `num_pages` pages, page 0 included; under `jax.eval_shape`, its shapes and dtypes.

        Raises:
            ValueError: the attention does not support the sizes or the dtype; names it and the limit.
        """
        layout = _layer_layout(model, attention, num_pages, config)
        zeros = partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))
        return KVCache(tuple(zeros(layout) for _ in range(model.num_layers)))


def cache_dtype(config: EngineConfig) -> str:
    """What keys and values are stored as."""
    return config.kv_dtype or config.dtype


def page_bytes(model: ModelConfig, attention: PagedAttention, config: EngineConfig) -> int:
    """Bytes of one page over all layers: keys, values and scales."""
    pages = 2
    leaves = jax.tree.leaves(_layer_layout(model, attention, pages, config))
    return model.num_layers * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) // pages


def _layer_layout(model: ModelConfig, attention: PagedAttention, num_pages: int, config: EngineConfig) -> LayerCache:
    return attention.cache_layout(num_pages, config.page_size, model.num_kv_heads, model.head_dim, cache_dtype(config))
