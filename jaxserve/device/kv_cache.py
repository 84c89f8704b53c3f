"""The paged KV cache: a cache for each layer, in the layout of the attention implementation."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxserve.config import EngineConfig
from jaxserve.device.pytree import pytree_dataclass
from jaxserve.device.sharding import Placement
from jaxserve.models.config import ModelConfig
from pallas_kernels import LayerCache, PagedAttention


@pytree_dataclass
@dataclass(frozen=True)
class KVCache:
    """Donated to each step, which writes the keys and values of its tokens in place. Page 0 stays zero."""

    page_axis: ClassVar[int] = 0
    """Of every array."""
    layers: tuple[LayerCache, ...]

    def layer(self, index: int) -> LayerCache:
        """What attention is given in a layer."""
        return self.layers[index]

    def with_layer(self, index: int, cache: LayerCache) -> "KVCache":
        """The cache with what attention gave back."""
        return KVCache((*self.layers[:index], cache, *self.layers[index + 1 :]))

    @staticmethod
    def layout(
        model: ModelConfig, attention: PagedAttention, num_pages: int, config: EngineConfig, placement: Placement
    ) -> "KVCache":
        """Shapes, dtypes and shardings of a cache of `num_pages` pages, page 0 included.

        Raises:
            ValueError: the attention does not support the sizes or the dtype; names it and the limit.
        """
        parts = placement.tensor_parallel
        axis = attention.kv_head_axis
        share = _layer_layout(model, attention, num_pages, config, parts)

        front = (model.num_layers,) if attention.stacks_layers else ()

        def whole(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (*front, *leaf.shape[:axis], leaf.shape[axis] * parts, *leaf.shape[axis + 1 :])
            sharding = placement.sharding(*(None,) * (len(front) + axis), "kv_head")
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

        if attention.stacks_layers:
            return StackedKVCache((jax.tree.map(whole, share),))
        return KVCache(tuple(jax.tree.map(whole, share) for _ in range(model.num_layers)))

    @staticmethod
    def zeros(layout: "KVCache") -> "KVCache":
        """An empty cache of a layout."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), layout)


@pytree_dataclass
@dataclass(frozen=True)
class StackedKVCache(KVCache):
    """One cache of all layers, along axis 0 of its arrays, for an attention that `stacks_layers`."""

    page_axis: ClassVar[int] = 1

    def layer(self, index: int) -> LayerCache:
        """See `KVCache.layer`."""
        return self.layers[0]._replace(layer=jnp.int32(index))

    def with_layer(self, index: int, cache: LayerCache) -> "StackedKVCache":
        """See `KVCache.with_layer`."""
        return StackedKVCache((cache._replace(layer=None),))


def cache_dtype(config: EngineConfig) -> str:
    """What keys and values are stored as."""
    return config.kv_dtype or config.dtype


def page_bytes(model: ModelConfig, attention: PagedAttention, config: EngineConfig) -> int:
    """Bytes of one page over all layers, keys, values and scales, on each of the devices that share the cache."""
    pages = 2
    leaves = jax.tree.leaves(_layer_layout(model, attention, pages, config, config.tensor_parallel))
    return model.num_layers * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) // pages


def _layer_layout(
    model: ModelConfig, attention: PagedAttention, num_pages: int, config: EngineConfig, parts: int
) -> LayerCache:
    """Of each device's part of a layer's cache."""
    kv_heads = model.num_kv_heads // parts
    return attention.cache_layout(num_pages, config.page_size, kv_heads, model.head_dim, cache_dtype(config))
