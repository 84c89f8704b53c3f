"""Every implementation against naive dense attention, and that these comparisons can fail."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_sequences import IMPLEMENTATIONS, PagedSequences, Shape, TokenRange, relative_error

from pallas_kernels import select

EVERY = (*IMPLEMENTATIONS, "reference")
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}
SHAPES = {
    "smollm2": Shape(q_heads=9, kv_heads=3, head_dim=64),
    "smollm2-float32": Shape(q_heads=9, kv_heads=3, head_dim=64, dtype="float32"),
    "window": Shape(sliding_window=37),
    "small-pages": Shape(q_heads=2, kv_heads=2, head_dim=32, page_size=4, dtype="float32"),
    "head-dim-80": Shape(q_heads=4, kv_heads=4, head_dim=80),
}
FEATURE_SHAPES = {
    "softcap": Shape(softcap=2.0),
    "sinks": Shape(sinks=True, dtype="float32"),
    "sinks-window": Shape(sinks=True, sliding_window=20),
    "int8": Shape(kv_dtype="int8", dtype="float32"),
    "float8-all": Shape(kv_dtype="float8_e4m3fn", softcap=3.0, sinks=True, sliding_window=37),
}
"""What the native kernel for the CPU lacks."""
MORE_SHAPES = {
    "large-pages": Shape(q_heads=8, kv_heads=1, head_dim=128, page_size=64),
    "odd-pages": Shape(q_heads=2, kv_heads=1, head_dim=64, page_size=24),
    "head-dim-8": Shape(q_heads=2, kv_heads=1, head_dim=8, dtype="float32"),
    "head-dim-96": Shape(q_heads=14, kv_heads=2, head_dim=96),
    "head-dim-256": Shape(q_heads=4, kv_heads=2, head_dim=256, dtype="float32"),
}


CASES = {f"{implementation}-{name}": (implementation, SHAPES[name]) for implementation in EVERY for name in SHAPES}
CASES |= {
    f"{implementation}-{name}": (implementation, shape)
    for implementation in ("cpu_xla", "reference")
    for name, shape in FEATURE_SHAPES.items()
}
# In C++ each of these takes a way of its own.
CASES |= {f"cpu_native-{name}": ("cpu_native", shape) for name, shape in MORE_SHAPES.items()}


@pytest.mark.parametrize(("implementation", "shape"), CASES.values(), ids=CASES)
def test_mixed_calls_agree_with_dense_attention(implementation: str, shape: Shape):
    case = PagedSequences(select("cpu", implementation), shape, lengths=[150, 40, 1, 90])
    prompts = [TokenRange(0, 0, 149, 0), TokenRange(1, 0, 39, 1), TokenRange(3, 0, 40, 2)]
    mixed = [TokenRange(1, 39, 40, 0), TokenRange(0, 149, 150, 2), TokenRange(2, 0, 1, 3), TokenRange(3, 40, 90, 1)]
    for call in (prompts, mixed):
        for piece, got in zip(call, case.call(*call, rows=4), strict=True):
            assert relative_error(got, case.dense(piece)) < TOLERANCE[shape.dtype], piece


@pytest.mark.parametrize("implementation", EVERY)
def test_masked_tokens_write_nothing_and_give_zeros(implementation: str):
    case = PagedSequences(select("cpu", implementation), Shape(), lengths=[30, 30])
    case.call(TokenRange(0, 0, 30, 0))
    before = [np.array(leaf) for leaf in jax.tree.leaves(case.cache)]
    masked, live = case.call(TokenRange(1, 0, 30, -1), TokenRange(0, 29, 30, 0))
    assert not masked.any()
    assert live.any()
    for leaf, expected in zip(jax.tree.leaves(case.cache), before, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), expected)


@pytest.mark.parametrize("implementation", EVERY)
def test_page_zero_is_never_written(implementation: str):
    case = PagedSequences(select("cpu", implementation), Shape(), lengths=[20])
    case.tables[:] = 0
    case.call(TokenRange(0, 0, 20, 0))
    for leaf in jax.tree.leaves(case.cache):
        assert not np.asarray(leaf).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("page_size", [4, 16])
def test_what_lies_beyond_a_sequence_does_not_reach_it(implementation: str, page_size: int):
    """A page's earlier owner may have left NaN behind."""
    case = PagedSequences(select("cpu", implementation), Shape(page_size=page_size), lengths=[21])
    case.cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), case.cache)
    pieces = [TokenRange(0, 0, 18, 0), TokenRange(0, 18, 19, 0), TokenRange(0, 19, 21, 0)]
    for piece in pieces:
        (got,) = case.call(piece)
        assert relative_error(got, case.dense(piece)) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nan_of_its_own_reaches_a_token_and_no_other(implementation: str):
    case = PagedSequences(select("cpu", implementation), Shape(), lengths=[70, 70])
    case.k[0][40] = np.nan
    broken, whole = case.call(TokenRange(0, 0, 70, 0), TokenRange(1, 0, 70, 1))
    assert np.isfinite(broken[:40].astype(np.float32)).all()
    assert np.isnan(broken[40:].astype(np.float32)).all()
    assert relative_error(whole, case.dense(TokenRange(1, 0, 70, 1))) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation: str):
    case = PagedSequences(select("cpu", implementation), Shape(dtype="float32"), lengths=[130])
    case.q[0] *= 1e4
    piece = TokenRange(0, 0, 130, 0)
    (got,) = case.call(piece)
    assert relative_error(got, case.dense(piece)) < 1e-4


# Faults planted on purpose: each must be seen by the comparison above that is meant to see it.


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("which", ["k_pages", "v_pages"])
def test_a_corrupted_page_is_seen(implementation: str, which: str):
    case = PagedSequences(select("cpu", implementation), Shape(), lengths=[100])
    case.call(TokenRange(0, 0, 99, 0))
    pages = getattr(case.cache, which)
    case.cache = case.cache._replace(**{which: pages.at[case.tables[0, 2]].multiply(3)})
    piece = TokenRange(0, 99, 100, 0)
    (got,) = case.call(piece)
    assert relative_error(got, case.dense(piece)) > 10 * TOLERANCE["bfloat16"]


@pytest.mark.parametrize("implementation", EVERY)
def test_pages_in_the_wrong_order_are_seen(implementation: str):
    """Order matters only through which keys a token may see: the swap moves a page past the end."""
    case = PagedSequences(select("cpu", implementation), Shape(), lengths=[100])
    case.call(TokenRange(0, 0, 99, 0))
    case.tables[0, [1, 6]] = case.tables[0, [6, 1]]
    piece = TokenRange(0, 99, 100, 0)
    (got,) = case.call(piece)
    assert relative_error(got, case.dense(piece)) > 10 * TOLERANCE["bfloat16"]


@pytest.mark.parametrize("implementation", EVERY)
def test_a_window_one_too_wide_is_seen(implementation: str):
    attention = select("cpu", implementation)
    narrow = PagedSequences(attention, Shape(sliding_window=8, dtype="float32"), lengths=[64])
    wide = PagedSequences(attention, Shape(sliding_window=9, dtype="float32"), lengths=[64])
    piece = TokenRange(0, 0, 64, 0)
    assert relative_error(wide.call(piece)[0], narrow.dense(piece)) > 100 * TOLERANCE["float32"]


@pytest.mark.parametrize("changed", [{"softcap": 2.2}, {"sinks": False}, {"kv_dtype": "float8_e4m3fn"}])
def test_a_wrong_cap_a_forgotten_sink_and_other_scales_are_seen(changed: dict):
    right = Shape(softcap=2.0, sinks=True, kv_dtype="int8")
    piece = TokenRange(0, 0, 60, 0)
    (got,) = PagedSequences(select("cpu", "cpu_xla"), replace(right, **changed), lengths=[60]).call(piece)
    expected = PagedSequences(select("cpu", "cpu_xla"), right, lengths=[60]).dense(piece)
    assert relative_error(got, expected) > TOLERANCE["bfloat16"]
