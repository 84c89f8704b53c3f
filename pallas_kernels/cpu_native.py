"""Paged attention for the CPU as one custom call, written in C++ (`native/`)."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.interface import Attended, check_operands, check_sizes
from pallas_kernels.native_build import register


@dataclass(frozen=True)
class NativePagedAttention:
    """Writes and attends in one call, in place on a donated cache, on XLA's own threads.

    Pages are [kv_heads, page_size, head_dim], the keys of 16 tokens interleaved within (`native/block_kernels.h`): fast
    where page_size is a multiple of 16 and head_dim one of 32, right for all sizes.
    """

    custom_call: str
    """The name that `native_build.register` gave."""
    name: str = "cpu_native"

    @staticmethod
    def build() -> "NativePagedAttention":
        """Raises `native_build.NativeUnavailable` where the kernels cannot be built."""
        return NativePagedAttention(register("JaxservePagedAttention"))

    def cache_shape(self, num_pages: int, page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """[num_pages, kv_heads, page_size, head_dim]."""
        check_sizes(num_pages, page_size, kv_heads, head_dim)
        return (num_pages, kv_heads, page_size, head_dim)

    def write_and_attend(
        self,
        q: Float[Array, "token q_head head_dim"],
        k: Float[Array, "token kv_head head_dim"],
        v: Float[Array, "token kv_head head_dim"],
        k_pages: Float[Array, "page kv_head page_size head_dim"],
        v_pages: Float[Array, "page kv_head page_size head_dim"],
        page_table: Int32[Array, "row max_pages"],
        token_row: Int32[Array, " token"],
        position: Int32[Array, " token"],
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Attended:
        """See `PagedAttention.write_and_attend`."""
        check_operands(q, k, v, k_pages, v_pages, page_table, token_row, position)
        if k_pages.ndim != 4 or k_pages.shape[1::2] != k.shape[1:]:
            raise ValueError(f"the cache must be [page, {k.shape[1]}, page_size, {k.shape[2]}], got {k_pages.shape}")
        dtype = k_pages.dtype
        call = jax.ffi.ffi_call(
            self.custom_call,
            (
                jax.ShapeDtypeStruct(q.shape, dtype),
                jax.ShapeDtypeStruct(k_pages.shape, dtype),
                jax.ShapeDtypeStruct(v_pages.shape, dtype),
            ),
            input_output_aliases={3: 1, 4: 2},
        )
        operands = (q.astype(dtype), k.astype(dtype), v.astype(dtype), k_pages, v_pages)
        out, k_pages, v_pages = call(
            *operands, page_table, token_row, position, scale=np.float32(scale), window=np.int32(sliding_window or 0)
        )
        return Attended(out.astype(q.dtype), k_pages, v_pages)
