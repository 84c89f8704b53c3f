"""Pages of the KV cache, copied to host memory and back: what preemption does where recomputing would be dearer.

Copies run in blocks of a fixed number of pages, so that two programs serve any number, and whatever is in a page: its
layout is the attention implementation's own affair.
"""

from collections.abc import Sequence
from itertools import batched

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from jaxserve.device.kv_cache import KVCache

BLOCK = 16
"""Pages that one call copies."""
WAITING_BYTES = 256 << 20
"""About what copies on their way take of each device: the cache may fill its memory but for little."""

Block = tuple[Array | np.ndarray, ...]
"""BLOCK pages of every array of the cache: those of one shape and dtype are stacked, [array, page, ...]. In host memory
the last of a sequence has as many pages as there are."""


class PageCopies:
    """Copies pages out of and into caches shaped and placed as the given one. Compiles when made.

    Args:
        cache: such a cache.
        whole: the sharding of what is whole on each of its devices.
    """

    def __init__(self, cache: KVCache, whole: jax.sharding.Sharding):
        self._whole = whole
        self._page_axis = 1 + cache.page_axis
        ids = jax.ShapeDtypeStruct((BLOCK,), jnp.int32, sharding=whole)
        self._gather = jax.jit(_gather).lower(cache, ids).compile()
        self._placement = self._gather.output_shardings
        block = jax.tree.map(
            lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
            jax.eval_shape(_gather, cache, ids),
            self._placement,
        )
        size = sum(array.size * array.dtype.itemsize for array in block) // whole.num_devices
        self._ahead = max(1, WAITING_BYTES // size)
        """Blocks that are on their way at once, of one save or of all restores."""
        self._restored = 0
        """Blocks that may still be on their way to the device."""
        self._scatter = jax.jit(_scatter, donate_argnums=0).lower(cache, ids, block).compile()

    def save(self, cache: KVCache, pages: Sequence[int]) -> list[Block]:
        """Starts copying pages to the host. `to_host` finishes it, once a later program has been waited for. Waits for
        those of many pages that are not among the last."""
        blocks: list[Block] = []
        for some in batched(pages, BLOCK):
            block = self._gather(cache, jax.device_put(_padded(some, 0), self._whole))
            for array in block:
                array.copy_to_host_async()
            blocks.append(block)
            if len(blocks) > self._ahead:
                blocks[-self._ahead - 1] = jax.device_get(blocks[-self._ahead - 1])
        return blocks

    def to_host(self, blocks: list[Block], pages: int) -> list[Block]:
        """The blocks of so many pages in host memory; the device's copies are let go."""
        *full, last = jax.device_get(blocks)
        used = np.arange(pages - BLOCK * len(full))
        return [*full, tuple(np.take(array, used, self._page_axis) for array in last)]

    def restore(self, cache: KVCache, blocks: list[Block], first: int, pages: Sequence[int]) -> KVCache:
        """Writes the saved pages from index `first` on to `pages`. Waits once many are on their way, with those of
        restores before.

        Args:
            cache: DONATED.
            blocks: what `save` or `to_host` gave.
            first: index, among the saved pages, of the one that goes to pages[0].
            pages: page numbers.
        """
        nowhere = jax.tree.leaves(cache)[0].shape[cache.page_axis]  # past the end: dropped
        targets = [nowhere] * first + list(pages)
        for block, some in zip(blocks, batched(targets, BLOCK), strict=False):
            if some[-1] != nowhere:
                whole = tuple(self._filled(array) for array in block)
                placements = (self._whole, self._placement)
                cache = self._scatter(cache, *jax.device_put((_padded(some, nowhere), whole), placements))
                self._restored += 1
                if self._restored == self._ahead:
                    jax.block_until_ready(cache)
                    self._restored = 0
        return cache

    def _filled(self, array: Array | np.ndarray) -> Array | np.ndarray:
        """With pages up to BLOCK."""
        missing = BLOCK - array.shape[self._page_axis]
        if not missing:
            return array
        widths = [(0, missing if axis == self._page_axis else 0) for axis in range(array.ndim)]
        return np.pad(array, widths)


def _padded(pages: Sequence[int], filler: int) -> np.ndarray:
    return np.array([*pages, *[filler] * (BLOCK - len(pages))], np.int32)


def _stacks(cache: KVCache) -> dict[tuple[tuple[int, ...], np.dtype], list[int]]:
    """Which of the cache's arrays are of one shape and dtype."""
    stacks: dict[tuple[tuple[int, ...], np.dtype], list[int]] = {}
    for number, array in enumerate(jax.tree.leaves(cache)):
        stacks.setdefault((array.shape, array.dtype), []).append(number)
    return stacks


def _gather(cache: KVCache, pages: Int32[Array, " block"]) -> Block:
    arrays = jax.tree.leaves(cache)
    front = (slice(None),) * cache.page_axis
    return tuple(
        jnp.stack([arrays[number][*front, pages] for number in numbers]) for numbers in _stacks(cache).values()
    )


def _scatter(cache: KVCache, pages: Int32[Array, " block"], block: Block) -> KVCache:
    arrays, structure = jax.tree.flatten(cache)
    front = (slice(None),) * cache.page_axis
    for stack, numbers in zip(block, _stacks(cache).values(), strict=True):
        for place, number in enumerate(numbers):
            arrays[number] = arrays[number].at[*front, pages].set(stack[place], mode="drop")
    return jax.tree.unflatten(structure, arrays)
