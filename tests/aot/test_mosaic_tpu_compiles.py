"""The TPU kernels through Mosaic's and XLA's own compilers for each generation, over the sizes that they promise."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from pairwise import covering, every

from jaxserve.device.ahead_of_time import operations_over, placement_on, tpu_kernels
from jaxserve.device.devices import DEVICES
from pallas_kernels import PagedAttention, select
from pallas_kernels.mosaic_tpu import MosaicTpuPagedAttention

pytestmark = pytest.mark.aot
TPUS = ("v5e", "v6e", "tpu7x")
FEATURES = {
    "plain": {},
    "window": {"sliding_window": 300},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 300, "softcap": 30.0, "sinks": True},
}
FACTORS = {
    "tpu": TPUS,
    "head_dim": (64, 96, 128, 256),
    "page_size": (16, 64),
    "kv_heads": (1, 2, 3, 4, 8),
    "dtype": ("bfloat16", "float32", "int8", "float8_e4m3fn"),
    "features": tuple(FEATURES),
}
PAGES = 512


def compile_for_tpu(tpu: str, function: Callable, *shapes: object, donate: tuple[int, ...] = ()) -> jax.stages.Compiled:
    """`function` compiled for one chip and arguments of these shapes, trees of `jax.ShapeDtypeStruct`."""
    placement = placement_on(DEVICES[tpu], 1)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.sharding()), shapes
    )
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=donate).lower(*placed).compile()


@dataclass(frozen=True)
class Cell:
    """A call of decode rows and a chunk, to be compiled for a TPU."""

    tpu: str = "v5e"
    head_dim: int = 128
    page_size: int = 16
    kv_heads: int = 2
    dtype: str = "bfloat16"
    features: str = "plain"
    group: int = 4
    rows: int = 16
    chunk: int = 128
    max_pages: int = 64

    @property
    def name(self) -> str:
        return f"{self.tpu}-d{self.head_dim}-page{self.page_size}-kv{self.kv_heads}-{self.dtype}-{self.features}"

    def compile(self, attention: PagedAttention, donate: tuple[int, ...] = (3,)) -> jax.stages.Compiled:
        shape, tokens = jax.ShapeDtypeStruct, self.rows + self.chunk
        dtype = jnp.float32 if self.dtype == "float32" else jnp.bfloat16
        q, k = (shape((tokens, n, self.head_dim), dtype) for n in (self.group * self.kv_heads, self.kv_heads))
        ints = [shape(size, jnp.int32) for size in ((self.rows, self.max_pages), (tokens,), (tokens,))]
        features = dict(FEATURES[self.features])
        sinks = [shape((self.group * self.kv_heads,), jnp.float32)] if features.pop("sinks", False) else []

        def call(q, k, v, cache, table, row, position, *sinks):
            given = {"sinks": sinks[0]} if sinks else {}
            scale = self.head_dim**-0.5
            return attention.write_and_attend(q, k, v, cache, table, row, position, scale=scale, **features, **given)

        return compile_for_tpu(self.tpu, call, q, k, k, self.cache(attention), *ints, *sinks, donate=donate)

    def cache(self, attention: PagedAttention):
        return attention.cache_layout(PAGES, self.page_size, self.kv_heads, self.head_dim, self.dtype)

    def cache_bytes(self, attention: PagedAttention) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.cache(attention)))

    def staged_bytes(self, attention: PagedAttention) -> int:
        """Of the chunk's tokens as `write_pages` takes them, a page for each part of a page that they fill.

        K and V, and one of the two before its axes change places: in VMEM where there is room, which tpu7x has not for
        the largest, else in HBM.
        """
        pages = min(self.chunk, self.chunk // self.page_size + 2 * self.rows + 1)
        return 3 * pages * self.cache_bytes(attention) // PAGES // 2


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All cells with `--aot-matrix full`, a few that hold every pair of values without."""
    if "cell" in metafunc.fixturenames:
        full = metafunc.config.getoption("--aot-matrix") == "full"
        cells = [Cell(**case) for case in (every if full else covering)(FACTORS)]
        metafunc.parametrize("cell", cells, ids=[cell.name for cell in cells])


def kernel_calls(compiled: jax.stages.Compiled) -> int:
    return sum(kernel.calls for kernel in tpu_kernels(compiled.as_text()).values())


def moved(compiled: jax.stages.Compiled, cell: Cell, attention: PagedAttention) -> set[str]:
    """Operations over whole arrays of the cache that are no kernels."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(cell.cache(attention))}
    found = {kind for shape in shapes for kind in operations_over(compiled.as_text(), shape)}
    return found - {"parameter", "custom-call", "get-tuple-element", "bitcast", "tuple"}


def test_each_cell_compiles_to_kernels_with_the_cache_in_place(cell: Cell):
    attention = select("tpu")
    compiled = cell.compile(attention)
    assert kernel_calls(compiled) == 3
    assert moved(compiled, cell, attention) == set()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cell.cache_bytes(attention)
    assert memory.temp_size_in_bytes < max(4 << 20, cell.staged_bytes(attention) + (1 << 20))


@pytest.mark.parametrize("tpu", TPUS)
def test_a_model_of_8b_compiles_with_64_rows_and_a_chunk_of_512(tpu: str):
    cell = Cell(tpu, kv_heads=8, rows=64, chunk=512, max_pages=512)
    attention = select("tpu")
    compiled = cell.compile(attention)
    assert kernel_calls(compiled) == 3
    assert compiled.memory_analysis().alias_size_in_bytes == cell.cache_bytes(attention)


@pytest.mark.parametrize("group", [1, 3, 7, 16, 64])
def test_each_group_of_query_heads_compiles(group: int):
    assert kernel_calls(Cell("v6e", kv_heads=1, group=group).compile(select("tpu"))) == 3


def test_the_most_and_largest_heads_compile():
    cell = Cell(head_dim=256, kv_heads=32, dtype="float32", features="all", group=1, chunk=512)
    assert kernel_calls(cell.compile(select("tpu"))) == 3


def test_a_decode_call_is_one_kernel_that_writes_too():
    assert kernel_calls(Cell("v6e", chunk=0).compile(select("tpu"))) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_decode_call_counts_the_bytes_and_operations_of_arithmetic_and_moves_no_more(dtype: str):
    """Attention over the widest table is all of it: nothing goes over the cache beside the kernel."""
    cell, attention = Cell("v6e", page_size=64, kv_heads=8, dtype=dtype, rows=64, chunk=0, max_pages=128), select("tpu")
    compiled = cell.compile(attention)
    context, heads = 64 * 128 * 64, 8 * cell.group
    scales = 2 * 8 * 4 * (128 // 64)  # a float32 each, in rows of 128 for the 64 tokens of a page
    token = 2 * 8 * 128 * (2 if dtype == "bfloat16" else 1) + (scales if dtype == "int8" else 0)
    queries = 64 * 8 * 16 * 128 * 2  # bfloat16; a kv head's four are padded to the sixteen rows of a tile
    floor = context * token + 2 * queries
    costs = compiled.cost_analysis()
    assert costs is not None
    assert floor <= costs["bytes accessed"] <= 1.01 * floor
    assert 4 * context * 128 * heads * 4 <= costs["flops"] <= 1.02 * 4 * context * 128 * heads * 4
    assert moved(compiled, cell, attention) == set()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 << 20


def test_page_tables_beyond_scalar_memory_are_served_in_groups_of_rows():
    """64 rows of 131,072 tokens: 2 MiB of page numbers, where a kernel may have 1."""
    assert kernel_calls(Cell("v6e", rows=64, max_pages=8192).compile(select("tpu"))) == 1 + 2 * 4


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((8, 24, 2, 128, "bfloat16"), r"page_size must be a power of two in \[16, 256\] on a TPU, got 24"),
        ((8, 4, 2, 128, "float32"), r"page_size must be a power of two in \[8, 256\] on a TPU, got 4"),
        ((8, 16, 2, 512, "bfloat16"), "head_dim must be at most 256 on a TPU, got 512"),
        ((8, 16, 64, 128, "bfloat16"), "kv_heads must be at most 32 on a TPU, got 64"),
    ],
)
def test_what_does_not_compile_is_refused_with_the_size_and_the_limit(sizes: tuple, words: str):
    with pytest.raises(ValueError, match=words):
        select("tpu").cache_layout(*sizes)


# Each check above can fail.


def test_a_block_beyond_vector_memory_does_not_compile():
    """Few large pages: each copy of one is instructions to compile."""
    cell = Cell(kv_heads=8, head_dim=256, page_size=256, group=1, rows=1, chunk=0)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"RESOURCE_EXHAUSTED|vmem"):
        cell.compile(MosaicTpuPagedAttention(block_tokens=8192, block_bytes=1 << 30))


def test_plain_jax_has_no_kernel_call():
    assert kernel_calls(Cell().compile(select("tpu", "xla"))) == 0


def test_a_cache_that_is_not_given_away_is_copied():
    attention = select("tpu")
    memory = Cell().compile(attention, donate=()).memory_analysis()
    assert memory.alias_size_in_bytes == 0
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes >= Cell().cache_bytes(attention)


@pytest.mark.parametrize("kind", ["copy", "copy-start"])
def test_a_copy_of_the_cache_is_seen_be_it_whole_or_started(kind: str):
    text = {
        "copy": "  %copy.1 = f32[512,3,128]{2,1,0:T(4,128)} copy(%scales.1), metadata={}",
        "copy-start": "  %copy-start = (f32[512,3,128]{2,1,0:T(4,128)S(1)}, f32[512,3,128]{2,1,0:T(4,128)}, u32[]{:S(2)})"
        " copy-start(%scales.1)",
    }
    assert operations_over(text[kind], (512, 3, 128)) == {kind: 1}
