"""The paged KV cache: one array of keys and one of values a layer, in the layout of the attention implementation."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from jaxserve.models.config import ModelConfig
from jaxserve.pytree import pytree_dataclass
from pallas_kernels import PagedAttention


@pytree_dataclass
@dataclass(frozen=True)
class KVCache:
    """Donated to each step, which writes the keys and values of its tokens in place. Page 0 stays zero."""

    keys: tuple[Array, ...]
    """Of each layer, in the shape that `PagedAttention.cache_shape` gives."""
    values: tuple[Array, ...]

    @staticmethod
    def zeros(config: ModelConfig, attention: PagedAttention, num_pages: int, page_size: int, dtype: str) -> "KVCache":
        """An empty cache of `num_pages` pages, page 0 included."""
        shape = attention.cache_shape(num_pages, page_size, config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers)
        return KVCache(
            keys=tuple(jnp.zeros(shape, dtype) for _ in layers), values=tuple(jnp.zeros(shape, dtype) for _ in layers)
        )


def page_bytes(config: ModelConfig, page_size: int, dtype: str) -> int:
    """Bytes of one page over all layers, keys and values."""
    return 2 * config.num_layers * page_size * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
