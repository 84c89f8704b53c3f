"""Weights in huge pages, where the device is the CPU.

A step reads all weights once. In pages of 4 KiB each page costs a walk of the page table, and the processor's
prefetchers stop at its end: reading 512 MB on both cores of a Zen 4 ran at 23 GB/s so, and at 32 in pages of 2 MiB.
"""

import ctypes
import logging
import sys
import threading
from collections.abc import Iterable

import jax

HUGE_PAGE = 2 << 20
"""Bytes, where a page has 4 KiB."""
CALL_BYTES = 32 * HUGE_PAGE
"""Moved by one call of the kernel, which takes some ms a page and must not hold up the end of the process."""
MADV_COLLAPSE = 25
"""linux/mman.h, since Linux 6.1: moves what is in a range to huge pages, whatever the system does with new memory."""

log = logging.getLogger(__name__)


def use_huge_pages(tree: object) -> threading.Thread | None:
    """Moves the arrays of a pytree, which are in the host's memory, to huge pages, on a thread of its own.

    Addresses and values stay, and programs may use the arrays meanwhile. Pages that the kernel does not move, all of
    them before Linux 6.1, stay as they are. None on another system.
    """
    if sys.platform != "linux":
        return None
    ranges = whole_pages(_ranges(tree))
    thread = threading.Thread(target=_collapse, args=(ranges,), name="jaxserve-huge-pages", daemon=True)
    thread.start()
    return thread


def whole_pages(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of addresses, each [start, end), widened to whole huge pages and merged: ascending, apart."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        first, last = start // HUGE_PAGE * HUGE_PAGE, -(-end // HUGE_PAGE) * HUGE_PAGE
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


def _ranges(tree: object) -> Iterable[tuple[int, int]]:
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            start = shard.data.unsafe_buffer_pointer()
            yield start, start + shard.data.nbytes


def _collapse(ranges: list[tuple[int, int]]) -> None:
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in ranges:
        for at in range(start, end, CALL_BYTES):
            # It goes on past a page that it cannot move, such as one at an end that is not all ours.
            if madvise(at, min(CALL_BYTES, end - at), MADV_COLLAPSE) != 0:
                log.debug("not all of a range of weights is in huge pages: errno %d", ctypes.get_errno())
