"""The programs of a step's second half: a step runs the least of them that has what its rows ask for, and none branches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxserve.device.batch import (
    BIASES,
    EARLY,
    ROW_COLUMNS,
    SAMPLES,
    TOP_K,
    TOP_P,
    Column,
    Packer,
    Upload,
)
from jaxserve.device.choosing import make_choosing
from jaxserve.device.lowering import abstract_state, lower_choosing
from jaxserve.device.sharding import Placement
from jaxserve.device.vocabulary import search_on
from jaxserve.models.published import PUBLISHED

PLATFORMS = ("cpu", "cuda", "tpu")
ROWS = 5


def waits(text: str | None) -> int:
    """Operations of a compiled HLO module at which a GPU would wait for the host."""
    assert text
    return text.count(" conditional(") + text.count(" while(") - text.count('"known_trip_count"')


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("features", [TOP_K, TOP_P, TOP_K | TOP_P])
def test_a_step_looks_for_the_least_that_has_what_its_rows_ask_for(platform, features):
    programs = make_choosing(search_on(platform))
    chosen = programs.cutting(features | SAMPLES | BIASES)
    taken = next(having for having, program in programs.cut.items() if program is chosen)
    assert taken & features == features
    assert all(having & features != features for having in programs.cut if having < taken)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_none_branches_and_every_loop_ends_after_a_number_of_turns_known_before(platform):
    """Where it does, a GPU waits for the host, and the host for the GPU. Those of GPUs and TPUs compile on CPU too."""
    model, placement = PUBLISHED["smollm2-135m"], Placement((jax.devices()[0],))
    state = abstract_state(ROWS, model.vocab_size, placement)
    lowered = lower_choosing(make_choosing(search_on(platform)), state, model, placement, ROWS, 4)
    assert len(lowered) == 7 + len(lowered.cut)
    assert [waits(program.compile().as_text()) for program in lowered] == [0] * len(lowered)


def test_a_branch_and_a_loop_of_unknown_turns_are_seen():
    def branch(count, x):
        return lax.cond(count > 0, lambda x: (x @ x).sum(), lambda x: x.sum(), x)

    def loop(count, x):
        return lax.fori_loop(0, count, lambda _, x: x @ x, x)

    for faulty in (branch, loop):
        assert waits(jax.jit(faulty).lower(3, jnp.ones((64, 64))).compile().as_text()) == 1


@pytest.fixture
def upload():
    """An upload of rows that decode, and what makes their features."""
    packer = Packer(ROWS, 4)
    packed = np.zeros(Upload.size(ROWS, 16, 4), np.int32)
    table = packed[: Upload.size(ROWS, 0, 4)].reshape(ROWS, -1)
    assert table.shape[1] == ROW_COLUMNS + 4
    table[:, Column.DECODES] = 1
    table[:, Column.SAMPLE_INDEX] = -1
    return table, functools.partial(packer.features, packed, ROWS)


def test_what_the_rows_of_a_step_ask_for_is_what_each_asks_for_together(upload):
    table, features = upload
    assert features() == 0
    table[1, Column.FEATURES], table[3, Column.FEATURES] = SAMPLES | TOP_P, BIASES
    assert features() == SAMPLES | TOP_P | BIASES


def test_a_row_that_chooses_no_token_asks_for_nothing(upload):
    table, features = upload
    table[1, Column.FEATURES] = SAMPLES
    table[1, Column.MIN_LENGTH] = 9
    table[1, Column.DECODES] = 0
    assert features() == 0
    table[1, Column.SAMPLE_INDEX] = 0
    assert features() == SAMPLES | EARLY


def test_a_row_is_early_until_its_sequence_may_stop(upload):
    table, features = upload
    table[2, Column.MIN_LENGTH] = 9
    table[2, Column.LENGTH] = 8
    assert features() == EARLY
    table[2, Column.LENGTH] = 9
    assert features() == 0
