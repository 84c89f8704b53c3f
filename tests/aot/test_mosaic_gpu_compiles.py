"""The Hopper kernels compiled to machine code over the sizes that they promise, or refused before anything is traced."""

import re
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from pairwise import covering, every

from jaxserve.config import EngineConfig
from jaxserve.device.ahead_of_time import placement_on
from jaxserve.device.devices import DEVICES
from jaxserve.device.lowering import StepInputs, lower_forward
from jaxserve.models.published import PUBLISHED
from pallas_kernels import LayerCache
from pallas_kernels.mosaic_gpu import MosaicGpuPagedAttention, decode
from pallas_kernels.mosaic_gpu.write import write_tokens

pytestmark = pytest.mark.aot
jax.config.update("jax_platforms", "cpu")
ATTENTION = MosaicGpuPagedAttention()
FACTORS = {
    "head_dim": (64, 96, 128, 256),
    "kv_heads": (1, 2, 3, 4, 8),
    "cache": (("bfloat16", 16), ("bfloat16", 64), ("int8", 64), ("float8_e4m3fn", 64)),
    "features": ("plain", "window", "softcap", "all"),
}
FEATURES = {
    "plain": {},
    "window": {"sliding_window": 300},
    "softcap": {"softcap": 30.0},
    "all": {"sliding_window": 300, "softcap": 30.0, "sinks": True},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All combinations with `--aot-matrix full`, a few that hold every pair of values without."""
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--aot-matrix") == "full"
        cases = (every if full else covering)(FACTORS)
        names = ["d{head_dim}-kv{kv_heads}-{cache[0]}-page{cache[1]}-{features}".format(**case) for case in cases]
        metafunc.parametrize("case", cases, ids=names)


def compile_for_h100(function: Callable, *shapes, donate: tuple[int, ...] = ()) -> jax.stages.Compiled:
    """`function` compiled for arguments of these shapes. Fails unless ptxas made machine code of it."""
    placement = placement_on(DEVICES["h100"], 1)
    on_device = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.sharding()), shapes
    )
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        compiled = jax.jit(function, donate_argnums=donate).lower(*on_device).compile()
    assert b"\x7fELF" in bytes(compiled.runtime_executable().serialize())
    return compiled


def compile_step(head_dim, page_size, kv_heads, dtype, *, rows=64, chunk=128, group=4, context=4096, **features):
    """write_and_attend of decode rows and a chunk, its cache donated. Gives it and the cache's bytes."""
    shape, table = jax.ShapeDtypeStruct, context // page_size
    cache = ATTENTION.cache_layout(512, page_size, kv_heads, head_dim, dtype)
    tokens = rows + chunk
    q, k = (shape((tokens, heads, head_dim), jnp.bfloat16) for heads in (group * kv_heads, kv_heads))
    ints = [shape(size, jnp.int32) for size in ((rows, table), (tokens,), (tokens,))]
    sinks = [shape((group * kv_heads,), jnp.float32)] if features.pop("sinks", False) else []

    def step(q, k, v, cache, table, row, position, *sinks):
        given = {"sinks": sinks[0]} if sinks else {}
        return ATTENTION.write_and_attend(
            q, k, v, LayerCache(*cache), table, row, position, scale=head_dim**-0.5, **features, **given
        )

    compiled = compile_for_h100(step, q, k, k, cache, *ints, *sinks, donate=(3,))
    return compiled, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def test_each_case_compiles_with_the_cache_in_place_and_its_numbers_in_registers(case: dict, capfd, monkeypatch):
    """The chunk kernel of an 8-bit cache at a head dim of 256 alone has more numbers than registers."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    dtype, page_size = case["cache"]
    features = FEATURES[case["features"]]
    compiled, cache_bytes = compile_step(case["head_dim"], page_size, case["kv_heads"], dtype, **features)
    kernels = re.findall(r"(\d+) bytes spill stores, .*?Used (\d+) registers", capfd.readouterr().out, re.DOTALL)
    quantized = dtype != "bfloat16"
    # Decode, combine, chunk, the chunk's write, and for an 8-bit cache that of the rows.
    assert compiled.as_text().count('custom_call_target="mosaic_gpu_v2"') == 4 + quantized
    # Those that an earlier case compiled are not compiled again.
    assert 0 < len(kernels) <= 4 + quantized
    spilling = [spilled for spilled, _ in kernels if spilled != "0"]
    assert len(spilling) <= (quantized and case["head_dim"] == 256)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes
    made = [line for line in compiled.as_text().splitlines() if f"[512,{case['kv_heads']}," in line.split("(")[0]]
    assert made and not [line for line in made if " copy(" in line]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_small_pages_of_a_quantized_cache_are_refused_at_once(dtype: str):
    with pytest.raises(ValueError, match=f"page_size of a {dtype} cache on mosaic_gpu must be at least 32, got 16"):
        ATTENTION.cache_layout(512, 16, 2, 128, dtype)


@pytest.mark.parametrize("group", [1, 3, 7, 8, 16, 64])
def test_each_group_of_query_heads_compiles(group):
    compile_step(64, 16, 1, "bfloat16", group=group, rows=8)


def test_a_long_context_takes_bounded_temporary_memory():
    """A cache of 64 sequences of 131,072 tokens would hold 34 GB a layer; the splits' results a thousandth of it."""
    compiled, _ = compile_step(128, 64, 8, "bfloat16", chunk=0, context=131072)
    assert compiled.memory_analysis().temp_size_in_bytes < 128e6


ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def misaligned_operands(compiled: jax.stages.Compiled) -> list[str]:
    """Slices of arrays that XLA gives a kernel by their addresses, where these are no multiples of 256 bytes. Mosaic
    starts no kernel with such a one, which only a card would tell."""
    text = re.sub(r'module = "(?:[^"\\]|\\.)*"', "", compiled.as_text())
    found = []
    for fusion in re.findall(r"\n%dynamic-slice-fusion[^\n]*\{\n.*?\n\}", text, re.DOTALL):
        if "mosaic_gpu_v2" not in fusion:
            continue
        shapes = {name: (kind, dims) for name, kind, dims in re.findall(r"%(\S+) = (\w+)\[([\d,]*)\]", fusion)}
        for line, source, places in re.findall(r"(%\S+ = .*? slice\(%?(\S+?)\), slice=\{(.*?)\})", fusion):
            kind, dims = shapes[source]
            offset = 0
            for size, start in zip(dims.split(","), re.findall(r"\[(\d+):", places), strict=True):
                offset = offset * int(size) + int(start)
            if offset * ITEM_BYTES[kind] % 256:
                found.append(line)
    return found


@pytest.mark.parametrize(
    ("name", "slots", "chunk", "kv_dtype"),
    [
        ("smollm2-135m", 1, 0, None),
        ("smollm2-135m", 3, 128, None),
        ("smollm2-135m", 32, 128, "int8"),
        ("llama-3.1-8b", 4, 128, "float8_e4m3fn"),
    ],
)
def test_what_a_step_gives_its_kernels_begins_where_they_can_take_it(name, slots, chunk, kv_dtype):
    model = replace(PUBLISHED[name], num_layers=1, vocab_size=512, bos_id=None, eos_ids=())
    config = EngineConfig(slots=slots, max_context=1024, page_size=64 if kv_dtype else 16, kv_dtype=kv_dtype)
    max_pages = config.max_context // config.page_size
    placement = placement_on(DEVICES["h100"], 1)
    inputs = StepInputs.abstract(model, config, ATTENTION, slots * max_pages + 1, placement)
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        compiled = lower_forward(inputs, model, ATTENTION, placement, slots, chunk, max_pages).compile()
    assert compiled.as_text().count('custom_call_target="mosaic_gpu_v2"') >= 2
    assert misaligned_operands(compiled) == []


# Faults planted on purpose: the compiler must see them.


def test_a_slice_that_a_kernel_cannot_take_is_found():
    def step(tokens, pages, page):
        ref = jax.new_ref(pages)
        write_tokens([tokens[3:]], [ref], page, page, 0)
        return ref[...]

    shape = jax.ShapeDtypeStruct
    tokens, pages = shape((131, 3, 64), jnp.bfloat16), shape((9, 3, 16, 64), jnp.bfloat16)
    assert misaligned_operands(compile_for_h100(step, tokens, pages, shape((128,), jnp.int32)))


def test_more_shared_memory_than_there_is_does_not_compile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "SHARED_BYTES", 300 * 1024)
    with pytest.raises(Exception, match="shared memory"):
        compile_step(256, 64, 1, "bfloat16", rows=2, chunk=0)


def test_an_operand_that_wgmma_cannot_take_does_not_compile(monkeypatch: pytest.MonkeyPatch):
    """float32 pages in shared memory instead of bfloat16."""
    monkeypatch.setattr(decode, "to_bfloat16", lambda values: values.astype(jnp.float32))
    with pytest.raises(Exception, match=r"dtype|type"):
        compile_step(128, 64, 1, "int8", rows=2, chunk=0)
