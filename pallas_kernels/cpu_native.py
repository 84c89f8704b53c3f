"""Paged attention for the CPU as one custom call, written in C++ (`native/`)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.interface import (
    Attended,
    AttentionNeeds,
    LayerCache,
    PagedAttention,
    check_cache,
    check_sizes,
    separate_layout,
)
from pallas_kernels.native_build import register


@dataclass(frozen=True)
class NativePagedAttention(PagedAttention):
    """Writes and attends in one call, in place on a donated cache, on XLA's own threads.

    Pages are [kv_heads, page_size, head_dim], the keys of 16 tokens interleaved within (`native/block_kernels.h`): fast
    where page_size is a multiple of 16 and head_dim one of 32, right for all sizes.
    """

    custom_call: str
    """The name that `native_build.register` gave."""
    name: str = "cpu_native"
    kv_head_axis: int = 1
    stacks_layers: bool = True

    @staticmethod
    def build() -> "NativePagedAttention":
        """Raises `native_build.NativeUnavailable` where the kernels cannot be built."""
        return NativePagedAttention(register("JaxservePagedAttention"))

    def missing(self, needs: AttentionNeeds) -> str | None:
        """See `PagedAttention.missing`."""
        if needs.kv_dtype not in ("bfloat16", "float32"):
            return f"keys and values are bfloat16 or float32, not {needs.kv_dtype}"
        if needs.softcap or needs.sinks:
            return "it has no soft cap of scores" if needs.softcap else "it has no attention sinks"
        return None

    def cache_layout(
        self, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> LayerCache:
        """Keys and values are each [num_pages, kv_heads, page_size, head_dim]."""
        check_sizes(num_pages, page_size, kv_heads, head_dim, dtype)
        if (reason := self.missing(AttentionNeeds(kv_dtype=jnp.dtype(dtype).name))) is not None:
            raise ValueError(f"attention {self.name}: {reason}")
        return separate_layout((num_pages, kv_heads, page_size, head_dim), (), dtype)

    def _write_and_attend(self, q, k, v, cache, page_table, token_row, position, scoring, sinks) -> Attended:
        k_pages, v_pages = cache.k_pages, cache.v_pages
        num_pages, _, page_size, _ = k_pages.shape[-4:]
        layout = self.cache_layout(num_pages, page_size, k.shape[1], k.shape[2], k_pages.dtype)
        check_cache(cache, layout)
        needs = AttentionNeeds(k_pages.dtype.name, scoring.softcap is not None, sinks is not None)
        if (reason := self.missing(needs)) is not None:
            raise ValueError(f"attention {self.name}: {reason}")
        dtype = k_pages.dtype
        call = jax.ffi.ffi_call(
            self.custom_call,
            (
                jax.ShapeDtypeStruct(q.shape, dtype),
                jax.ShapeDtypeStruct(k_pages.shape, dtype),
                jax.ShapeDtypeStruct(k_pages.shape, dtype),
            ),
            input_output_aliases={3: 1, 4: 2},
        )
        layer = jnp.int32(0) if cache.layer is None else cache.layer
        operands = (q.astype(dtype), k.astype(dtype), v.astype(dtype), k_pages, v_pages, layer, page_table)
        factors = {"scale": np.float32(scoring.scale), "window": np.int32(scoring.sliding_window or 0)}
        out, k_pages, v_pages = call(*operands, token_row, position, **factors)
        return Attended(out.astype(q.dtype), cache._replace(k_pages=k_pages, v_pages=v_pages))
