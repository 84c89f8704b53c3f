"""Which implementation is chosen, and what is refused with what words."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import IMPLEMENTATIONS, select


def test_each_platform_has_an_implementation_of_its_own():
    for platform in ("cpu", "tpu", "cuda"):
        attention = select(platform)
        assert attention.name in IMPLEMENTATIONS[platform]
        assert attention.cache_shape(8, 16, 2, 64)[0] == 8


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
        ((1, 16, 2, 64), "num_pages must be at least 2"),
        ((8, 0, 2, 64), "page_size and kv_heads must be at least 1"),
        ((8, 16, 2, 60), "head_dim must be a multiple of 8, got 60"),
    ],
)
def test_sizes_that_cannot_work_are_refused(implementation: str, sizes: tuple[int, int, int, int], words: str):
    with pytest.raises(ValueError, match=words):
        select("cpu", implementation).cache_shape(*sizes)


def operands(implementation: str, **changed) -> tuple[list, object]:
    attention = select("cpu", implementation)
    cache = jnp.zeros(attention.cache_shape(8, 16, 2, 64), changed.get("cache_dtype", jnp.bfloat16))
    q, k, v = (jnp.zeros((3, heads, 64), jnp.bfloat16) for heads in (changed.get("q_heads", 4), 2, 2))
    index = jnp.zeros(3, jnp.int32)
    return [q, k, v, cache, cache, jnp.zeros((2, 4), jnp.int32), index, index], attention


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS["cpu"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"q_heads": 5}, "5 query heads are not a multiple of 2 kv heads"),
        ({"cache_dtype": jnp.float16}, "must be bfloat16 or float32, got float16"),
    ],
)
def test_operands_that_do_not_fit_are_refused_when_traced(implementation: str, changed: dict, words: str):
    arrays, attention = operands(implementation, **changed)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda *a: attention.write_and_attend(*a, scale=1.0, sliding_window=None), *arrays)


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
