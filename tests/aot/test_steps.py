"""The engine's own steps, compiled from shapes for devices that are not there: the cache stays in place, temporaries are
small, no work is missing, and devices talk as often as the layout asks. `step_table.py` makes the table."""

import json
from dataclasses import replace

import jax
import pytest
from step_table import CELLS, CHUNK, COVERING, TABLE, Cell, derived, figures, floors, stated_work

from jaxserve.config import KVDtype
from jaxserve.device.ahead_of_time import forward_figures, placement_on
from jaxserve.device.allocation import estimated_temporaries
from jaxserve.device.devices import DEVICES
from jaxserve.device.kv_cache import KVCache, page_bytes
from jaxserve.device.page_copies import BLOCK, PageCopies
from jaxserve.models.published import PUBLISHED

TABLED = json.loads(TABLE.read_text())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every cell as it stands in the committed table; and compiled anew, which takes minutes a cell, a few that stand
    for the others."""
    full = metafunc.config.getoption("--aot-matrix", default="covering") == "full"
    compiled = [
        pytest.param((name, True), marks=pytest.mark.aot, id=f"{name}-compiled")
        for name in (CELLS if full else COVERING)
    ]
    if "compiled" in metafunc.fixturenames:
        metafunc.parametrize("step", compiled, indirect=True, scope="module")
    elif "step" in metafunc.fixturenames:
        tabled = [pytest.param((name, False), id=name) for name in CELLS]
        metafunc.parametrize("step", tabled + compiled, indirect=True, scope="module")


@pytest.fixture(scope="module")
def step(request: pytest.FixtureRequest) -> tuple[Cell, dict]:
    name, compiles = request.param
    assert name in TABLED, f"python tests/aot/step_table.py '{name}' adds it"
    return CELLS[name], figures(CELLS[name]) if compiles else TABLED[name]


def programs(found: dict) -> list[dict]:
    """All of a cell's."""
    return [found["decode"], found["mixed"], *found["choosing"]]


@pytest.fixture
def compiled(step: tuple[Cell, dict]) -> tuple[Cell, dict]:
    """For a test that is about nothing but what was compiled anew."""
    return step


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_is_no_older_than_what_it_was_made_from(name: str):
    """What needs no compiler, and so is seen at every run: sizes, and what kernels state of their work."""
    cell, tabled = CELLS[name], TABLED[name]
    again = f"python tests/aot/step_table.py '{name}'"
    sizes = derived(cell)
    assert {key: tabled[key] for key in sizes} == sizes, again
    for half, chunk in (("decode", 0), ("mixed", CHUNK)):
        stated = stated_work(cell, chunk)
        for name, kernel in tabled[half]["kernels"].items():
            assert kernel == {**stated.pop(name, {}), "vmem": kernel["vmem"]}, again
        assert stated == {}, again


def test_the_cache_is_overwritten_in_place_and_never_copied(step: tuple[Cell, dict]):
    for half in ("decode", "mixed"):
        found = step[1][half]
        assert found["cache_is_aliased"] and found["cache_copies"] == 0
        assert found["aliased"] >= found["cache"] > 0


def test_temporaries_are_a_twentieth_of_weights_and_cache_at_most(step: tuple[Cell, dict]):
    _, found = step
    held = found["weights"] + found["decode"]["cache"]
    assert max(program["temporaries"] for program in programs(found)) <= 0.05 * held


def test_the_estimate_of_temporaries_is_no_less_than_what_the_compiler_says(step: tuple[Cell, dict]):
    cell, found = step
    needed = max(program["temporaries"] for program in programs(found))
    assert needed <= estimated_temporaries(PUBLISHED[cell.model], cell.config)


def test_kernels_of_a_step_take_no_more_vmem_than_the_compiler_gives_any_operation(step: tuple[Cell, dict]):
    """16 MiB on a v5e, the least of these; what they ask for beyond is for larger pages and more heads."""
    cell, found = step
    for half in ("decode", "mixed"):
        assert bool(found[half]["kernels"]) == (cell.attention().name == "mosaic_tpu")
        for name, kernel in found[half]["kernels"].items():
            assert 0 < kernel["vmem"] <= 16 << 20, name


def test_devices_talk_four_times_a_layer_and_twice_a_step(step: tuple[Cell, dict]):
    cell, found = step
    shared = {"all-gather": 4 * PUBLISHED[cell.model].num_layers + 1, "all-reduce": 1}
    for half in ("decode", "mixed"):
        assert found[half]["collectives"] == (shared if cell.tensor_parallel > 1 else {})
    assert [program["collectives"] for program in found["choosing"]] == [{}] * len(found["choosing"])


def test_no_program_branches(step: tuple[Cell, dict]):
    """A GPU waits at each branch until the host has read which way to go, and the host with it."""
    assert [program["branches"] for program in programs(step[1])] == [0] * (2 + len(step[1]["choosing"]))


def test_nothing_is_computed_twice(step: tuple[Cell, dict]):
    """XLA would do so, a layer's products too, rather than exceed what it takes for the device's memory."""
    assert [program["recomputed"] for program in programs(step[1])] == [0] * (2 + len(step[1]["choosing"]))


@pytest.mark.aot
def test_a_cache_without_room_beside_it_has_things_computed_twice():
    """The fault that the test above would find."""
    cell = CELLS["smollm2-135m h100-1"]
    model, config = replace(PUBLISHED[cell.model], num_layers=2), cell.config
    placement = placement_on(DEVICES[cell.device], 1)
    pages = DEVICES[cell.device].memory // page_bytes(model, cell.attention(), config)
    found = forward_figures(model, config, cell.attention(), placement, pages, CHUNK)
    assert found.recomputed > 0


@pytest.mark.aot
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("name", COVERING)
def test_pages_go_to_the_host_and_back_without_another_copy_of_the_cache(name: str, kv_dtype: KVDtype | None):
    """What preemption does, beside a cache that leaves little room."""
    cell = CELLS[name]
    model = replace(PUBLISHED[cell.model], num_layers=2)
    config = replace(cell.config, kv_dtype=kv_dtype, page_size=64)
    placement = placement_on(DEVICES[cell.device], cell.tensor_parallel)
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        copies = PageCopies(KVCache.layout(model, cell.attention(), 4096, config, placement), placement.sharding())
    a_page = page_bytes(model, cell.attention(), config)
    saves, restores = copies._gather.memory_analysis(), copies._scatter.memory_analysis()
    assert saves.temp_size_in_bytes + saves.output_size_in_bytes < 1.1 * BLOCK * a_page
    assert restores.temp_size_in_bytes < 1.1 * BLOCK * a_page
    assert restores.alias_size_in_bytes >= 4096 * a_page


def test_no_less_work_is_counted_than_arithmetic_says(step: tuple[Cell, dict]):
    cell, found = step
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
    held = found["weights"] + found["decode"]["cache"]
    for program, tabled in zip(programs(found), programs(expected), strict=True):
        for name in ("program", "arguments", "aliased", "cache", "collectives"):
            assert program[name] == tabled[name], (program["program"], name)
        # Other versions of JAX and its compilers fuse differently.
        assert program["temporaries"] == pytest.approx(tabled["temporaries"], abs=0.01 * held), program["program"]
        for name in ("flops", "bytes_accessed"):
            assert program[name] == pytest.approx(tabled[name], rel=0.1), (program["program"], name)
