"""How many pages the cache gets, and that an engine on a device with a memory of its own takes what is left of it."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from jaxserve.checkpoints.description import describe_model
from jaxserve.checkpoints.loading import load_model
from jaxserve.config import EngineConfig
from jaxserve.device import allocation, model_runner
from jaxserve.device.allocation import allocate, device_in_use, device_limit, estimated_temporaries
from jaxserve.device.errors import AllocationError
from jaxserve.device.kv_cache import page_bytes
from jaxserve.device.lowering import needed_bytes
from jaxserve.device.sharding import Placement
from jaxserve.models.published import PUBLISHED
from pallas_kernels import select

QWEN = Path(__file__).parents[1] / "fixtures" / "families" / "qwen3"
MODEL = PUBLISHED["llama-3.2-1b"]
ATTENTION = select("cpu", "cpu_xla")
CONFIG = EngineConfig(slots=4, max_context=1024)
PAGE = page_bytes(MODEL, ATTENTION, CONFIG)
WANTED = 4 * 64 + 1


def pages(config: EngineConfig = CONFIG, *, limit: int | None = None, weights: int = 0, temporaries: int = 0) -> int:
    found = allocate(MODEL, ATTENTION, config, limit=limit, weights=weights, temporaries=temporaries)
    return found.num_pages


def test_every_slot_has_its_full_context_where_there_is_room():
    assert pages() == pages(limit=64 << 30) == WANTED


def test_the_configuration_comes_before_what_the_device_has():
    assert pages(replace(CONFIG, num_pages=50), limit=64 << 30) == 50
    assert pages(replace(CONFIG, cache_bytes=20 * PAGE + 1)) == 20
    assert pages(replace(CONFIG, cache_bytes=20 * PAGE + 1), limit=64 << 30) == 20


@pytest.mark.parametrize(
    ("field", "value", "limit"), [("cache_bytes", 2 * PAGE - 1, 2 * PAGE), ("max_context", 131_073, 131_072)]
)
def test_a_bound_that_cannot_be_kept_is_refused_by_name(field: str, value: int, limit: int):
    with pytest.raises(AllocationError, match=rf"^{field}: must be at (most|least) {limit}, .* got {value}$"):
        pages(replace(CONFIG, **{field: value}))
    assert pages(replace(CONFIG, **{field: limit})) >= 2


def test_a_device_gives_what_weights_temporaries_and_headroom_leave():
    limit = 4 << 30
    found = allocate(MODEL, ATTENTION, CONFIG, limit=limit, weights=limit - (150 << 20), temporaries=1 << 20)
    taken = found.weights + found.state + found.temporaries + found.headroom
    assert 2 <= found.num_pages < WANTED
    assert taken + found.cache <= limit < taken + found.cache + found.page


@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, num_pages=WANTED), replace(CONFIG, cache_bytes=WANTED * PAGE)]
)
def test_what_does_not_fit_is_refused_with_who_takes_what(config: EngineConfig):
    with pytest.raises(AllocationError, match=r"does not fit: of a device's 4\.29 GB, weights take 4\.29"):
        pages(config, limit=4 << 30, weights=4 << 30)


@dataclass(frozen=True)
class AcceleratorLike:
    """What is asked of a `jax.Device` here. The figures are those that JAX's allocators of TPUs and GPUs give."""

    stats: dict[str, int] | None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def accelerator(limit: int, in_use: int) -> AcceleratorLike:
    return AcceleratorLike(
        {
            "num_allocs": 12,
            "bytes_in_use": in_use,
            "peak_bytes_in_use": in_use + 4096,
            "largest_alloc_size": in_use // 2,
            "bytes_limit": limit,
            "bytes_reserved": 0,
            "largest_free_block_bytes": 0,
        }
    )


def test_the_smallest_limit_and_the_fullest_of_the_devices_count():
    devices = Placement((accelerator(16 << 30, 3 << 30), accelerator(15 << 30, 1 << 30)))
    assert device_limit(devices) == 15 << 30
    assert device_in_use(devices) == 3 << 30


def test_a_device_that_does_not_say_has_no_limit():
    """A CPU's device gives None; some plugins give figures without a limit."""
    for silent in (AcceleratorLike(None), AcceleratorLike({"bytes_in_use": 0})):
        assert device_limit(Placement((silent,))) is None
        assert device_in_use(Placement((silent,))) == 0
    real = Placement.of_replica()
    assert device_limit(real) is None and device_in_use(real) == 0


def test_pages_follow_what_the_devices_say():
    devices = Placement((accelerator(4 << 30, (4 << 30) - (200 << 20)), accelerator(4 << 30, 1 << 30)))
    limit, in_use = device_limit(devices), device_in_use(devices)
    found = allocate(MODEL, ATTENTION, CONFIG, limit=limit, weights=in_use, temporaries=0)
    assert 2 <= found.num_pages < WANTED
    assert found.num_pages == (limit - in_use - found.state - found.headroom) // PAGE


def runner(monkeypatch: pytest.MonkeyPatch, limit: int, in_use: int) -> model_runner.ModelRunner:
    monkeypatch.setattr(model_runner, "device_limit", lambda placement: limit)
    monkeypatch.setattr(model_runner, "device_in_use", lambda placement: in_use)
    config = EngineConfig(model=str(QWEN), slots=4, max_context=256, prefill_chunks=(16,))
    return model_runner.ModelRunner(load_model(str(QWEN), "bfloat16"), config)


def test_an_engine_takes_the_memory_that_its_device_has_left(monkeypatch: pytest.MonkeyPatch):
    limit, in_use = 1 << 20, 1 << 19
    found = runner(monkeypatch, limit, in_use)
    taken = found.allocation
    assert 2 <= found.num_pages < taken.wanted_pages
    assert in_use + taken.state + taken.temporaries + taken.headroom + taken.cache <= limit
    assert sum(leaf.nbytes for leaf in model_runner.jax.tree.leaves(found._cache)) == taken.cache


def test_steps_that_need_more_than_was_estimated_cost_pages(monkeypatch: pytest.MonkeyPatch):
    expected = runner(monkeypatch, 1 << 20, 1 << 19)
    programs = itertools.chain(expected._forwards.values(), *expected._choosing.values())
    needed = needed_bytes(programs, 0)
    monkeypatch.setattr(allocation, "estimated_temporaries", lambda model, config: 0)
    found = runner(monkeypatch, 1 << 20, 1 << 19)
    assert found.allocation.temporaries == needed > 0
    assert needed <= estimated_temporaries(describe_model(str(QWEN))[0], found.config)


@dataclass(frozen=True)
class Program:
    """A compiled one, by what the compiler says of its memory; a CPU's code is none of it."""

    temp_size_in_bytes: int
    generated_code_size_in_bytes: int

    def memory_analysis(self) -> "Program":
        return self


def test_programs_need_the_most_temporaries_of_one_and_the_code_of_all_beyond_what_is_kept_for_it():
    programs = [Program(7, 300), Program(90, 20), Program(0, 1)]
    assert needed_bytes(programs, 0) == 90 + 321
    assert needed_bytes(programs, 300) == 90 + 21
    assert needed_bytes(programs, 1000) == 90


def test_code_beyond_its_part_of_the_headroom_costs_pages(monkeypatch: pytest.MonkeyPatch):
    code, counted = 64 << 10, []

    def with_code(programs, room: int) -> int:
        programs = [*programs, Program(0, code)]
        counted.append((room, needed_bytes(programs, code)))
        return needed_bytes(programs, room)

    monkeypatch.setattr(allocation, "estimated_temporaries", lambda model, config: 0)
    monkeypatch.setattr(model_runner, "needed_bytes", with_code)
    found = runner(monkeypatch, 1 << 20, 1 << 19).allocation
    ((room, temporaries),) = counted
    assert 0 < room == found.headroom // 2 < code
    assert found.temporaries == temporaries + code - room
