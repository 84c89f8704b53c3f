"""The Hopper kernels in Pallas' interpreter for GPUs, with its race detector on.

wgmma with an operand in registers has no interpreter, so products are plain; indexing, masks, the ring and its
barriers, splits, their combination and the writes are what a GPU runs.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu
from paged_sequences import PagedSequences, Shape, TokenRange, bits, relative_error

from pallas_kernels.mosaic_gpu import MosaicGpuPagedAttention, chunk
from pallas_kernels.mosaic_gpu.ring import Ring

pytestmark = pytest.mark.interpreted_gpu
"""The interpreter runs programs from within a program; with as many threads as two cores give, other programs of the
process beside it can leave it none: `scripts/test --interpret-gpu` gives it a process and threads of its own."""

TOLERANCE = 1e-2
INTERPRETED = MosaicGpuPagedAttention(interpret=plgpu.InterpretGPUParams(detect_races=True), blocks=3)
SHAPES = {
    "smollm2": Shape(q_heads=9, kv_heads=3, head_dim=64),
    "window-softcap-sinks": Shape(q_heads=4, kv_heads=1, sliding_window=70, softcap=2.0, sinks=True, page_size=64),
    "int8": Shape(q_heads=2, kv_heads=2, kv_dtype="int8", page_size=64, sliding_window=40),
    "float8-head-dim-96": Shape(q_heads=2, kv_heads=1, head_dim=96, kv_dtype="float8_e4m3fn", page_size=32),
    "head-dim-256": Shape(q_heads=2, kv_heads=1, head_dim=256, page_size=128),
}
LENGTHS = {name: (100, 20, 1, 50) for name in SHAPES} | {"window-softcap-sinks": (260, 20, 1, 50)}
"""Beyond 256 tokens a row has splits to combine."""


@pytest.mark.parametrize(("shape", "lengths"), [(SHAPES[name], LENGTHS[name]) for name in SHAPES], ids=SHAPES)
def test_mixed_calls_agree_with_dense_attention(shape: Shape, lengths: tuple[int, ...]):
    """In pages that hold another's garbage; the last call reads what decode rows and a chunk wrote."""
    case = PagedSequences(INTERPRETED, shape, lengths)
    case.cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan if leaf.dtype != jnp.int8 else 99), case.cache)
    longest = lengths[0]
    prompts = [TokenRange(0, 0, longest - 2, 0), TokenRange(1, 0, 18, 1), TokenRange(3, 0, 20, 2)]
    mixed = [
        TokenRange(1, 18, 19, 0),
        TokenRange(0, longest - 2, longest - 1, 2),
        TokenRange(2, 0, 1, 3),
        TokenRange(3, 20, 49, 1),
    ]
    after = [TokenRange(1, 19, 20, 3), TokenRange(0, longest - 1, longest, 0), TokenRange(3, 49, 50, 1)]
    for call in (prompts, mixed, after):
        for piece, got in zip(call, case.call(*call, rows=4), strict=True):
            assert relative_error(got, case.dense(piece)) < TOLERANCE, piece


def test_masked_tokens_write_nothing_and_give_zeros():
    case = PagedSequences(INTERPRETED, Shape(q_heads=2, kv_heads=1), lengths=[30, 30])
    case.call(TokenRange(0, 0, 29, 0))
    before = [np.array(leaf) for leaf in jax.tree.leaves(case.cache)]
    masked, live = case.call(TokenRange(1, 0, 30, -1), TokenRange(0, 28, 29, 0))
    assert not masked.any()
    assert live.any()
    for leaf, expected in zip(jax.tree.leaves(case.cache), before, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), expected)


def filled(attention: MosaicGpuPagedAttention, **fields) -> PagedSequences:
    """Sequences whose pages hold the same random keys and values wherever they lie."""
    case = PagedSequences(attention, Shape(q_heads=2, kv_heads=1, page_size=64), lengths=(300, 90, 1), **fields)
    keys, values = (np.zeros(array.shape, np.float32) for array in case.cache[:2])
    for sequence, table in enumerate(case.tables):
        for number, page in enumerate(table):
            if page:
                rng = np.random.default_rng((sequence, number))
                keys[page], values[page] = (rng.standard_normal(keys.shape[1:]) for _ in range(2))
    case.cache = case.cache._replace(k_pages=jnp.asarray(keys, "bfloat16"), v_pages=jnp.asarray(values, "bfloat16"))
    return case


def test_a_decode_row_has_the_same_bits_in_any_row_among_any_neighbours_and_on_any_grid():
    (alone,) = filled(INTERPRETED).call(TokenRange(0, 299, 300, 0), rows=1)
    other = filled(replace(INTERPRETED, blocks=5), page_seed=7, max_pages=9)
    among = other.call(TokenRange(1, 89, 90, 0), TokenRange(0, 299, 300, 2), TokenRange(2, 0, 1, 1), rows=3)
    assert np.abs(alone).max() > 0
    np.testing.assert_array_equal(bits(among[1]), bits(alone))


# Faults planted on purpose: each must be seen by the check that is meant to see it.


@pytest.mark.parametrize("forgotten", ["wait", "release"])
def test_a_forgotten_barrier_of_the_ring_is_seen_by_the_race_detector(forgotten: str, monkeypatch):
    """Consumers that do not wait for the copies, or a producer that does not wait for the consumers."""
    if forgotten == "wait":
        monkeypatch.setattr(Ring, "wait", lambda ring, step: lax.rem(step, jnp.int32(ring.stages)))
    else:
        monkeypatch.setattr(Ring, "_wait_until_free", lambda ring, stage, step: None)
    faulty = replace(INTERPRETED, name=forgotten)
    case = PagedSequences(faulty, Shape(q_heads=2, kv_heads=1, head_dim=256, page_size=64), lengths=[300])
    try:
        with pytest.raises(Exception, match=r"RACE DETECTED|barrier"):
            case.call(TokenRange(0, 299, 300, 0))
    finally:
        reset_gpu_interpret_mode_state()


def test_a_row_that_does_not_take_in_its_own_token_is_seen(monkeypatch):
    monkeypatch.setattr(Ring, "insert", lambda *arguments: None)
    case = PagedSequences(replace(INTERPRETED, name="no insert"), Shape(q_heads=2, kv_heads=1), lengths=[50])
    case.call(TokenRange(0, 0, 49, 0))
    piece = TokenRange(0, 49, 50, 0)
    assert relative_error(case.call(piece)[0], case.dense(piece)) > 2 * TOLERANCE


def test_a_mask_one_key_too_wide_is_seen(monkeypatch):
    monkeypatch.setattr(chunk.ChunkKernel, "_mask", lambda self, score, block, position: score)
    case = PagedSequences(replace(INTERPRETED, name="no mask"), Shape(q_heads=2, kv_heads=1), lengths=[50])
    piece = TokenRange(0, 0, 50, 0)
    assert relative_error(case.call(piece)[0], case.dense(piece)) > 10 * TOLERANCE
