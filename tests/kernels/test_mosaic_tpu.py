"""The TPU kernels, interpreted on a CPU: values over many sizes, bits, races and reads of what no one wrote."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from paged_sequences import PagedSequences, Shape, TokenRange, bits, relative_error
from pairwise import covering, each_value

from pallas_kernels.mosaic_tpu import MosaicTpuPagedAttention, attend, page_copies
from pallas_kernels.mosaic_tpu.work import chunk_units, chunk_writes

TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}
ATTENTION = MosaicTpuPagedAttention(interpret=True, block_tokens=128)
"""Blocks of 128 keys, so that short sequences take several."""
FEATURES = {
    "plain": {},
    "window": {"sliding_window": 37},
    "all": {"sliding_window": 150, "softcap": 3.0, "sinks": True},
}
FACTORS = {
    "head_dim": (64, 96, 128, 256),
    "page_size": (16, 64),
    "kv_heads": (1, 2, 3, 4, 8),
    "kv_dtype": ("bfloat16", "float32", "int8", "float8_e4m3fn"),
    "features": tuple(FEATURES),
}


def shape_of(case: dict) -> Shape:
    features = FEATURES[case.pop("features")]
    dtype = "float32" if case["kv_dtype"] == "float32" else "bfloat16"
    return Shape(q_heads=case["kv_heads"] * 3, dtype=dtype, **case, **features)


# Interpreting is compiling for the CPU, seconds a shape: every run takes each value once, `scripts/test --aot` each pair,
# half of them on either end of the range of JAX.
FEW = [shape_of(case) for case in each_value(FACTORS)]
PAIRS = [shape for case in covering(FACTORS) if (shape := shape_of(case)) not in FEW]
HALF = jax.__version_info__ >= (0, 12)
SHAPES = [*FEW, *[pytest.param(shape, marks=pytest.mark.aot) for shape in PAIRS[HALF::2]]]


def mixed(case: PagedSequences) -> Iterator[tuple[TokenRange, np.ndarray]]:
    """A prompt's part, then in a call of the same size decode rows with two chunks beside them, one masked row among them."""
    (first,) = case.call(TokenRange(0, 0, 141, 1), rows=4)
    yield TokenRange(0, 0, 141, 1), first
    pieces = [TokenRange(0, 141, 142, 2), TokenRange(1, 0, 141, 0), TokenRange(2, 0, 1, 3)]
    yield from zip(pieces, case.call(*pieces, rows=4), strict=True)


def check(case: PagedSequences) -> None:
    for piece, got in mixed(case):
        assert relative_error(got, case.dense(piece)) < TOLERANCE[case.shape.dtype], piece


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"d{s.head_dim}-{s.page_size}-{s.kv_heads}-{s.kv_dtype}")
def test_mixed_calls_agree_with_dense_attention(shape: Shape):
    check(PagedSequences(ATTENTION, shape, lengths=[142, 141, 1]))


def test_neighbours_rows_pages_and_the_cut_change_no_bit():
    shape = Shape(q_heads=3, kv_heads=1, head_dim=64, dtype="float32")
    alone = PagedSequences(ATTENTION, shape, lengths=[142, 141, 1])
    crowd = PagedSequences(ATTENTION, shape, lengths=[142, 141, 1], page_seed=5)
    (first,) = alone.call(TokenRange(0, 0, 141, 1), rows=4)
    last, *_ = alone.call(TokenRange(0, 141, 142, 2), TokenRange(1, 0, 141, -1), rows=4)
    crowded = [crowd.call(TokenRange(1, 0, 40, 0), TokenRange(0, 0, 101, 3), rows=4)[1]]
    crowded.append(crowd.call(TokenRange(0, 101, 141, 1), TokenRange(1, 40, 141, 2), rows=4)[0])
    crowded.append(crowd.call(TokenRange(1, 0, 141, 2), TokenRange(0, 141, 142, 0), TokenRange(2, 0, 1, 3), rows=4)[1])
    np.testing.assert_array_equal(bits(np.concatenate(crowded)), bits(np.concatenate([first, last])))


def test_a_nan_of_its_own_reaches_a_token_and_what_others_left_does_not():
    case = PagedSequences(ATTENTION, Shape(q_heads=2, kv_heads=2), lengths=[142, 141, 1])
    case.cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), case.cache)
    case.v[1][40] = np.nan
    (_, first), (_, last), (_, broken), (_, single) = mixed(case)
    assert np.isfinite(first).all() and np.isfinite(last).all() and np.isfinite(single).all()
    assert np.isfinite(broken[:40]).all()
    assert np.isnan(broken[40:]).all()


def test_masked_tokens_write_nothing_and_give_zeros():
    case = PagedSequences(ATTENTION, Shape(q_heads=2, kv_heads=2), lengths=[142, 141, 1])
    list(mixed(case))
    before = [np.array(leaf) for leaf in jax.tree.leaves(case.cache)]
    masked, _ = case.call(TokenRange(1, 0, 141, -1), TokenRange(0, 141, 142, 2), rows=4)
    assert not masked.any()
    for leaf, expected in zip(jax.tree.leaves(case.cache), before, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), expected)


def test_page_tables_beyond_scalar_memory_give_the_same(monkeypatch: pytest.MonkeyPatch):
    shape = Shape(q_heads=2, kv_heads=2)
    whole = [got for _, got in mixed(PagedSequences(ATTENTION, shape, lengths=[142, 141, 1]))]
    monkeypatch.setattr("pallas_kernels.mosaic_tpu.implementation.TABLE_ENTRIES", 20)  # two rows of ten pages
    split = replace(ATTENTION, name="split")  # compiled apart
    for (_, got), expected in zip(mixed(PagedSequences(split, shape, lengths=[142, 141, 1])), whole, strict=True):
        np.testing.assert_array_equal(bits(got), bits(expected))


def test_units_of_work_follow_live_tokens():
    row = np.full(512, -1, np.int32)
    row[:300], row[300:310] = 4, 1
    position = np.concatenate([np.arange(1000, 1300), np.arange(10), np.zeros(202)]).astype(np.int32)
    units = chunk_units(jnp.asarray(row), jnp.asarray(position), 64, rows=64, window=None)
    assert int(jnp.sum(units.last_key >= 0)) == 6  # five tiles of the first piece, one of the second
    assert int(jnp.sum(units.closes)) == int(jnp.sum(units.opens)) == 512 // 64
    table = jnp.arange(1, 64 * 100 + 1, dtype=jnp.int32).reshape(64, 100)
    writes, _ = chunk_writes(jnp.asarray(row), jnp.asarray(position), table, 16)
    assert int(jnp.sum(writes.end - writes.start)) == 310
    assert int(jnp.sum(writes.end > writes.start)) == 20 + 1


# On the simulated machine: memory begins as NaN, copies are asynchronous, and races are looked for.


SIMULATED = Shape(q_heads=2, kv_heads=1, head_dim=64, page_size=64)


def simulated(name: str, shape: Shape = SIMULATED, **parameters) -> PagedSequences:
    """Each test takes a name of its own: what one traced, with a fault in it or not, is not another's."""
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", **parameters)
    attention = MosaicTpuPagedAttention(name, interpret=interpret, block_tokens=128)
    return PagedSequences(attention, shape, lengths=[142, 141, 1], max_pages=-(-142 // shape.page_size))


@pytest.fixture
def simulator() -> Iterator[None]:
    """What a failed run leaves behind is cleared."""
    yield
    pltpu.reset_tpu_interpret_mode_state()


def races_seen() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = interpret_pallas_call.races
    return bool(races is not None and races.races_found)


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize(
    ("shape", "copies"),
    [
        pytest.param(SIMULATED, "on_wait", id="key-and-value-side-by-side"),
        pytest.param(
            replace(SIMULATED, head_dim=128, kv_dtype="int8", **FEATURES["window"]),
            "on_wait",
            id="scales",
            marks=pytest.mark.aot,
        ),
        pytest.param(
            replace(SIMULATED, head_dim=96, page_size=16, kv_heads=2, **FEATURES["all"]),
            "eager",
            id="pages-in-blocks",
            marks=pytest.mark.aot,
        ),
    ],
)
def test_no_race_and_no_read_before_its_copy_arrived(shape: Shape, copies: str):
    """Copies come as late as they may, when someone waits for them, or at once; into pages full of another's garbage."""
    case = simulated("right", shape, dma_execution_mode=copies)
    case.cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan if leaf.dtype != jnp.int8 else 99), case.cache)
    check(case)
    assert not races_seen()


# Faults planted on purpose, one for each kind of check.


@pytest.mark.usefixtures("simulator")
def test_a_missing_wait_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_copies.Ring, "_await", lambda *_: None)
    faulty = simulated("without a wait")
    try:
        (got,) = faulty.call(TokenRange(0, 0, 141, 1), rows=4)
    except Exception as race:  # JAX 0.12 raises
        assert "race" in str(race).lower()
        return
    wrong = not relative_error(got, faulty.dense(TokenRange(0, 0, 141, 1))) < TOLERANCE["bfloat16"]
    assert wrong or races_seen()


@pytest.mark.usefixtures("simulator")
def test_a_write_that_nobody_waits_for_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_copies.Writer, "_await", lambda _: None)
    faulty = simulated("without a wait for the write")
    second = TokenRange(0, 1, 2, 0)
    try:
        faulty.call(TokenRange(0, 0, 1, 0), TokenRange(1, 0, 1, 1), TokenRange(2, 0, 1, 2), rows=4)
        (got,) = faulty.call(second, rows=4)
    except Exception as race:  # JAX 0.12 raises
        assert "race" in str(race).lower()
        return
    assert races_seen() or not relative_error(got, faulty.dense(second)) < TOLERANCE["bfloat16"]


@pytest.mark.usefixtures("simulator")
def test_a_page_number_past_the_end_is_seen():
    faulty = simulated("bad page")
    faulty.tables[0, 1] = 10**6
    with pytest.raises(Exception, match=r"(?i)out.of.bounds|out of range|index"):
        faulty.call(TokenRange(0, 0, 141, 0), rows=4)


def test_a_wrong_mask_is_seen(monkeypatch: pytest.MonkeyPatch):
    seen = attend._seen
    monkeypatch.setattr(attend, "_seen", lambda kernel, key, *rest: seen(kernel, key - 1, *rest))  # one key too many
    case = PagedSequences(replace(ATTENTION, name="wrong mask"), Shape(), lengths=[142, 141, 1])
    assert any(relative_error(got, case.dense(piece)) > TOLERANCE["bfloat16"] for piece, got in mixed(case))
