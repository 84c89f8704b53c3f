"""A token's output has the same bits whatever else is in the call and however it got there."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_sequences import IMPLEMENTATIONS, PagedSequences, Shape, TokenRange, bits, relative_error

from pallas_kernels import select
from pallas_kernels.cpu_native import NativePagedAttention
from pallas_kernels.native_build import register

SHAPES = {
    "bfloat16": Shape(q_heads=9, kv_heads=3, head_dim=64),
    "window": Shape(q_heads=4, kv_heads=1, head_dim=96, sliding_window=75, dtype="float32"),
    "small-pages": Shape(q_heads=8, kv_heads=1, head_dim=40, page_size=4),
    "quantised": Shape(q_heads=4, kv_heads=2, kv_dtype="int8", softcap=5.0, sinks=True, sliding_window=90),
}
LENGTH = 200


def token_by_token(implementation: str, shape: Shape) -> np.ndarray:
    """The sequence's output when each token comes alone."""
    sequences = PagedSequences(select("cpu", implementation), shape, lengths=[LENGTH])
    return np.concatenate([sequences.call(TokenRange(0, at, at + 1, 0))[0] for at in range(LENGTH)])


# Plain JAX has no way of its own for small pages; the native kernel has no quantised cache.
WITHOUT = {("cpu_xla", "small-pages"), ("cpu_native", "quantised")}
CASES = [(name, shape) for name in IMPLEMENTATIONS for shape in SHAPES if (name, shape) not in WITHOUT]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def implementation(case: tuple[str, str]) -> str:
    return case[0]


@pytest.fixture(scope="module")
def shape(case: tuple[str, str]) -> Shape:
    return SHAPES[case[1]]


@pytest.fixture(scope="module")
def alone(implementation: str, shape: Shape) -> np.ndarray:
    return bits(token_by_token(implementation, shape))


def test_chunks_give_the_bits_of_single_tokens(implementation: str, shape: Shape, alone: np.ndarray):
    for chunk in (17, 64, LENGTH):
        sequences = PagedSequences(select("cpu", implementation), shape, lengths=[LENGTH])
        pieces = [TokenRange(0, at, min(at + chunk, LENGTH), 0) for at in range(0, LENGTH, chunk)]
        got = np.concatenate([sequences.call(piece)[0] for piece in pieces])
        np.testing.assert_array_equal(bits(got), alone, err_msg=f"chunks of {chunk}")


def test_neighbours_rows_pages_and_table_width_do_not_matter(implementation: str, shape: Shape, alone: np.ndarray):
    """The sequence comes in pieces of changing size, in changing rows, among others that come and go."""
    sequences = PagedSequences(
        select("cpu", implementation), shape, lengths=[LENGTH, 90, 260], page_seed=1, max_pages=301
    )
    sequences.call(TokenRange(1, 0, 80, 0), TokenRange(2, 0, 240, 1))
    first, _ = sequences.call(TokenRange(0, 0, 50, 3), TokenRange(2, 0, 13, -1), rows=4)
    *_, second = sequences.call(TokenRange(1, 80, 81, 2), TokenRange(2, 240, 241, 1), TokenRange(0, 50, 190, 0), rows=4)
    third, *_ = sequences.call(TokenRange(0, 190, 191, 4), TokenRange(2, 241, 260, 2), rows=5)
    _, fourth = sequences.call(TokenRange(1, 81, 90, 1), TokenRange(0, 191, LENGTH, 2), rows=4)
    got = np.concatenate([first, second, third, fourth])
    np.testing.assert_array_equal(bits(got), alone)


def test_a_changed_bit_of_one_key_is_seen(implementation: str, shape: Shape, alone: np.ndarray):
    """The comparison of bits can fail: one key of the last token's window differs in its last bit."""
    sequences = PagedSequences(select("cpu", implementation), shape, lengths=[LENGTH])
    bits(sequences.k[0])[LENGTH - 2, 0] ^= 1
    (got,) = sequences.call(TokenRange(0, 0, LENGTH, 0))
    np.testing.assert_array_equal(bits(got)[: LENGTH - 2], alone[: LENGTH - 2])
    assert (bits(got)[LENGTH - 2 :] != alone[LENGTH - 2 :]).any()


SCRIPT = """
import os, sys
os.sched_setaffinity(0, set(map(int, sys.argv[3:])))
import numpy as np
from paged_sequences import PagedSequences, Shape, TokenRange
from pallas_kernels import select
sequences = PagedSequences(select("cpu", sys.argv[1]), Shape(q_heads=9, kv_heads=3), lengths=[210, 90])
first = sequences.call(TokenRange(0, 0, 180, 0), TokenRange(1, 0, 89, 1))
last = sequences.call(TokenRange(1, 89, 90, 1), TokenRange(0, 180, 210, 0))
np.save(sys.argv[2], np.concatenate([*first, *last]).astype(np.float32))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot bind a process to a processor here")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_number_of_threads_does_not_matter(name: str, tmp_path: Path):
    """XLA takes as many threads as the process has processors."""
    processors = sorted(os.sched_getaffinity(0))
    outputs = []
    for count in (1, len(processors)):
        output = tmp_path / f"{count}.npy"
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
        subprocess.run(
            [sys.executable, "-c", SCRIPT, name, str(output), *map(str, processors[:count])],
            check=True,
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        )
        outputs.append(np.load(output))
    np.testing.assert_array_equal(*outputs)
    assert outputs[0].any()


def test_pages_copied_elsewhere_gives_the_same_bits(implementation: str, shape: Shape, alone: np.ndarray):
    """Preemption moves pages to the host and back to other numbers."""
    sequences = PagedSequences(select("cpu", implementation), shape, lengths=[LENGTH, LENGTH])
    sequences.call(TokenRange(0, 0, LENGTH - 1, 0))
    moved = np.setdiff1d(sequences.tables[0], 0)[::-1]
    there = {int(page): int(free) for page, free in zip(moved, np.setdiff1d(sequences.tables[1], 0), strict=True)}
    old, new = np.array(list(there)), np.array(list(there.values()))
    sequences.cache = jax.tree.map(
        lambda pages: pages.at[new].set(jnp.asarray(np.asarray(pages)[old])).at[old].set(0), sequences.cache
    )
    sequences.tables[0] = [there.get(int(page), 0) for page in sequences.tables[0]]
    (got,) = sequences.call(TokenRange(0, LENGTH - 1, LENGTH, 0))
    np.testing.assert_array_equal(bits(got), alone[LENGTH - 1 :])


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="an x86 target")
@pytest.mark.parametrize("arch", ["x86-64-v3", "x86-64"])
@pytest.mark.parametrize("name", [name for name in SHAPES if ("cpu_native", name) not in WITHOUT])
def test_older_processors_keep_the_promises_too(arch: str, name: str):
    """Values and bits on narrower vectors, without fused or bfloat16 arithmetic."""
    attention, shape = NativePagedAttention(register("JaxservePagedAttention", arch)), SHAPES[name]
    whole = TokenRange(0, 0, LENGTH, 0)
    together = PagedSequences(attention, shape, lengths=[LENGTH])
    apart = PagedSequences(attention, shape, lengths=[LENGTH])
    (got,) = together.call(whole)
    single = np.concatenate([apart.call(TokenRange(0, at, at + 1, 0))[0] for at in range(LENGTH)])
    np.testing.assert_array_equal(bits(got), bits(single))
    assert relative_error(got, together.dense(whole)) < 1e-2
