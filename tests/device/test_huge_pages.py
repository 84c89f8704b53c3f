"""Weights in huge pages: where they are, and that they stay what they are."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.device.huge_pages import HUGE_PAGE, use_huge_pages, whole_pages


@given(st.lists(st.tuples(st.integers(0, 1 << 27), st.integers(1, 1 << 24))))
def test_ranges_become_whole_pages_apart_and_in_order(parts):
    ranges = [(start, start + size) for start, size in parts]
    whole = whole_pages(ranges)
    pages = {page for start, end in ranges for page in range(start // HUGE_PAGE, -(-end // HUGE_PAGE))}
    assert {page for start, end in whole for page in range(start // HUGE_PAGE, end // HUGE_PAGE)} == pages
    assert all(start % HUGE_PAGE == end % HUGE_PAGE == 0 for start, end in whole)
    assert all(before[1] < after[0] for before, after in pairwise(whole))


@pytest.mark.skipif(sys.platform != "linux", reason="madvise with MADV_COLLAPSE is Linux's")
def test_arrays_move_to_huge_pages_with_their_values():
    values = np.random.default_rng(0).integers(0, 1 << 30, 8 * HUGE_PAGE // 4, dtype=np.int32)
    large, small = jnp.array(values), jnp.arange(1000)
    address = large.unsafe_buffer_pointer()
    thread = use_huge_pages({"large": large, "small": small})
    assert thread is not None
    thread.join()
    assert large.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(large, values)
    np.testing.assert_array_equal(small, np.arange(1000))
    # Of eight pages' bytes at any address, seven pages at least are whole; the first and the last may be another's too.
    assert _huge_bytes(address, large.nbytes) >= 7 * HUGE_PAGE


def _huge_bytes(address: int, size: int) -> int:
    """Bytes in huge pages of the mappings that overlap a range."""
    total, overlaps = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(part, 16) for part in header.groups())
            overlaps = start < address + size and address < end
        elif overlaps and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) << 10
    return total
