"""The engine's own steps, compiled from shapes for devices that are not there: the cache stays in place, temporaries are
small, no work is missing, and devices talk as often as the layout asks. `step_table.py` makes the table."""

import json

import pytest
from step_table import CELLS, COVERING, TABLE, Cell, figures, floors

from jaxserve.device.allocation import estimated_temporaries
from jaxserve.models.published import PUBLISHED

pytestmark = pytest.mark.aot
TABLED = json.loads(TABLE.read_text())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A few cells stand for the others, each of which takes minutes of compiling."""
    full = metafunc.config.getoption("--aot-matrix", default="covering") == "full"
    metafunc.parametrize("compiled", list(TABLED) if full else COVERING, indirect=True, scope="module")


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> tuple[Cell, dict]:
    cell = CELLS[request.param]
    return cell, figures(cell, TABLED[cell.name]["pages"])


def test_the_cache_is_overwritten_in_place_and_never_copied(compiled: tuple[Cell, dict]):
    for half in ("decode", "mixed"):
        step = compiled[1][half]
        assert step["cache_is_aliased"] and step["cache_copies"] == 0
        assert step["aliased"] >= step["cache"] > 0


def test_temporaries_are_a_twentieth_of_weights_and_cache_at_most(compiled: tuple[Cell, dict]):
    _, found = compiled
    held = found["weights"] + found["decode"]["cache"]
    assert max(found[half]["temporaries"] for half in ("decode", "mixed", "choose")) <= 0.05 * held


def test_the_estimate_of_temporaries_is_no_less_than_what_the_compiler_says(compiled: tuple[Cell, dict]):
    cell, found = compiled
    needed = max(found[half]["temporaries"] for half in ("decode", "mixed", "choose"))
    assert needed <= estimated_temporaries(PUBLISHED[cell.model], cell.config)


def test_devices_talk_four_times_a_layer_and_twice_a_step(compiled: tuple[Cell, dict]):
    cell, found = compiled
    shared = {"all-gather": 4 * PUBLISHED[cell.model].num_layers + 1, "all-reduce": 1}
    for half in ("decode", "mixed"):
        assert found[half]["collectives"] == (shared if cell.tensor_parallel > 1 else {})
    assert found["choose"]["collectives"] == {}


def test_no_less_work_is_counted_than_arithmetic_says(compiled: tuple[Cell, dict]):
    cell, found = compiled
    for half in ("decode", "mixed"):
        if cell.device == "h100":
            assert found[half]["flops"] == 0  # this compiler counts nothing without a GPU
            continue
        # Attention comes on top: its kernels state their work for the widest table, heads padded to the hardware's tiles.
        assert found[half]["flops"] >= 0.98 * floors(cell)[f"{half}_flops"]
        assert found[half]["bytes_accessed"] >= 0.98 * floors(cell)["bytes"]


def test_the_figures_are_those_of_the_committed_table(compiled: tuple[Cell, dict]):
    cell, found = compiled
    expected = TABLED[cell.name]
    for name in ("attention", "weights"):
        assert found[name] == expected[name]
    for half in ("decode", "mixed", "choose"):
        for name in ("arguments", "aliased", "cache", "collectives"):
            assert found[half][name] == expected[half][name], (half, name)
        # Other versions of JAX and its compilers fuse differently.
        held = found["weights"] + found["decode"]["cache"]
        assert found[half]["temporaries"] == pytest.approx(expected[half]["temporaries"], abs=0.01 * held), half
        for name in ("flops", "bytes_accessed"):
            assert found[half][name] == pytest.approx(expected[half][name], rel=0.1), (half, name)
