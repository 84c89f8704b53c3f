"""Which implementation is chosen, and what is refused with what words."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import IMPLEMENTATIONS, AttentionNeeds, PagedAttention, select


def test_each_platform_has_an_implementation_of_its_own():
    for platform in ("cpu", "tpu", "cuda"):
        attention = select(platform)
        assert attention.name in IMPLEMENTATIONS[platform]
        assert attention.cache_layout(8, 16, 2, 64, jnp.bfloat16).k_pages.shape[0] == 8


def test_implementations_are_found_by_name():
    for platform, named in IMPLEMENTATIONS.items():
        assert [select(platform, name).name for name in named] == list(named)


def test_an_unknown_platform_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"platform 'metal'; there are cpu, tpu, cuda"):
        select("metal")


def test_an_implementation_of_another_platform_is_refused():
    with pytest.raises(ValueError, match=r"no attention 'cpu_native' on tpu; there are"):
        select("tpu", "cpu_native")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS["cpu"])
@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 16, 2, 64, "bfloat16"), "num_pages must be at least 2"),
        ((8, 0, 2, 64, "bfloat16"), "page_size and kv_heads must be at least 1"),
        ((8, 16, 2, 60, "bfloat16"), "head_dim must be a multiple of 8, got 60"),
        ((8, 16, 2, 64, "float16"), "the cache must be bfloat16, .* or float8_e4m3fn, got float16"),
    ],
)
def test_sizes_that_cannot_work_are_refused(implementation: str, sizes: tuple[int, int, int, int, str], words: str):
    with pytest.raises(ValueError, match=words):
        select("cpu", implementation).cache_layout(*sizes)


def operands(implementation: str, **changed) -> tuple[list, PagedAttention]:
    attention = select("cpu", implementation)
    layout = attention.cache_layout(8, 16, 2, 64, jnp.bfloat16)
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, changed.get("cache_dtype", leaf.dtype)), layout)
    q, k, v = (jnp.zeros((3, heads, 64), jnp.bfloat16) for heads in (changed.get("q_heads", 4), 2, 2))
    index = jnp.zeros(3, jnp.int32)
    return [q, k, v, cache, jnp.zeros((changed.get("rows", 2), 4), jnp.int32), index, index], attention


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS["cpu"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"q_heads": 5}, "5 query heads are not a multiple of 2 kv heads"),
        ({"cache_dtype": jnp.float16}, "the cache must be .* got float16"),
        ({"rows": 4}, "the first tokens are those of the 4 rows, got 3 tokens"),
    ],
)
def test_operands_that_do_not_fit_are_refused_when_traced(implementation: str, changed: dict, words: str):
    arrays, attention = operands(implementation, **changed)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda *a: attention.write_and_attend(*a, scale=1.0), *arrays)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS["cpu"])
def test_a_cache_in_another_layout_is_refused_when_traced(implementation: str):
    arrays, attention = operands(implementation)
    arrays[3] = arrays[3]._replace(v_pages=arrays[3].v_pages[:-1])
    with pytest.raises(ValueError, match="v_pages of the cache must be"):
        jax.eval_shape(lambda *a: attention.write_and_attend(*a, scale=1.0), *arrays)


def test_what_an_implementation_lacks_is_refused_by_name_and_passed_over_by_default(caplog: pytest.LogCaptureFixture):
    needs = AttentionNeeds(kv_dtype="int8")
    with pytest.raises(ValueError, match="attention cpu_native: keys and values are bfloat16 or float32, not int8"):
        select("cpu", "cpu_native", needs)
    assert select("cpu", None, needs).name == "cpu_xla"
    assert "attention cpu_xla instead of cpu_native: keys and values are" in caplog.text
    for lacking in (AttentionNeeds(softcap=True), AttentionNeeds(sinks=True)):
        assert select("cpu", None, lacking).name == "cpu_xla"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("NVIDIA H100 80GB HBM3", "mosaic_gpu"), ("NVIDIA H200", "mosaic_gpu"), ("NVIDIA A100-SXM4-40GB", "xla")],
)
def test_the_kernels_of_hopper_serve_hopper_and_one_line_says_why_not_others(kind: str, name: str, caplog):
    assert select("cuda", None, AttentionNeeds(device_kind=kind)).name == name
    assert (
        f"attention xla instead of mosaic_gpu: its kernels are for Hopper GPUs, and this is {kind!r}" in caplog.text
    ) == (name == "xla")
    assert select("cuda", None, AttentionNeeds("float32", device_kind=kind)).name == "xla"


def test_what_the_kernels_cannot_hold_is_refused_before_a_cache_is_made():
    with pytest.raises(ValueError, match="attention mosaic_gpu: it takes at most 64 query heads a kv head, not 65"):
        select("cuda", "mosaic_gpu", AttentionNeeds(group=65))
    with pytest.raises(ValueError, match="attention mosaic_tpu: a row takes at most 131072 pages, not 131073"):
        select("tpu", "mosaic_tpu", AttentionNeeds(max_pages=131_073))
    with pytest.raises(ValueError, match="page_size must be at most 128 on a TPU, got 256"):
        select("tpu").cache_layout(64, 256, 32, 256, "bfloat16")


def test_every_implementation_says_where_kv_heads_can_be_cut():
    for platform, named in IMPLEMENTATIONS.items():
        for name in named:
            attention = select(platform, name)
            whole, half = (
                attention.cache_layout(8, 64, heads, 64, "int8" if name != "cpu_native" else "float32")
                for heads in (4, 2)
            )
            for leaf, part in zip(jax.tree.leaves(whole), jax.tree.leaves(half), strict=True):
                expected = [
                    size // 2 if axis == attention.kv_head_axis else size for axis, size in enumerate(leaf.shape)
                ]
                assert list(part.shape) == expected


def test_without_a_compiler_plain_jax_serves_and_one_line_says_why(tmp_path: Path):
    script = "import logging; logging.basicConfig(); from pallas_kernels import select; print(select('cpu').name)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.split() == ["cpu_xla"]
    (line,) = (line for line in done.stderr.splitlines() if "pallas_kernels" in line)
    assert "attention cpu_xla instead of cpu_native: no C++ compiler found" in line
