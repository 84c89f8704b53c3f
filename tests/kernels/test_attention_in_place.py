"""A donated cache is updated where it lies: no copy, no temporary of its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_sequences import IMPLEMENTATIONS

from pallas_kernels import select

LAYERS, PAGES, PAGE_SIZE, Q_HEADS, KV_HEADS, HEAD_DIM, TOKENS = 3, 4096, 16, 9, 3, 64, 8
CACHE_BYTES = PAGES * PAGE_SIZE * KV_HEADS * HEAD_DIM * 2


def three_layers(implementation: str):
    """A chain of three calls as in a step, and its operands."""
    attention = select("cpu", implementation)

    def run(layers, q, k, v, table, token_row, position):
        written = []
        for cache in layers:
            q, cache = attention.write_and_attend(q, k, v, cache, table, token_row, position, scale=0.125)
            written.append(cache)
        return written, q

    layout = attention.cache_layout(PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM, jnp.bfloat16)
    layers = [jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layout) for _ in range(LAYERS)]
    q, k, v = (jnp.ones((TOKENS, heads, HEAD_DIM), jnp.bfloat16) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    table = jnp.arange(1, 1 + TOKENS * 4, dtype=jnp.int32).reshape(TOKENS, 4)
    return run, (layers, q, k, v, table, jnp.arange(TOKENS), jnp.arange(TOKENS) * 7)


def addresses(layers) -> list[int]:
    return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(layers)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_donated_cache_stays_where_it_is(implementation: str):
    run, (layers, *rest) = three_layers(implementation)
    before = addresses(layers)
    step = jax.jit(run, donate_argnums=0)
    for _ in range(3):
        layers, _ = step(layers, *rest)
        assert addresses(layers) == before
    written = np.asarray(layers[1].k_pages, np.float32)
    assert written.sum() == TOKENS * KV_HEADS * HEAD_DIM


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_temporary_has_the_size_of_a_cache(implementation: str):
    run, operands = three_layers(implementation)
    memory = jax.jit(run, donate_argnums=0).lower(*operands).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * LAYERS * CACHE_BYTES
    assert memory.temp_size_in_bytes < CACHE_BYTES / 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_donation_the_copy_shows_and_the_operand_is_unharmed(implementation: str):
    """The two checks above can fail; and a cache that was not given away is not written to."""
    run, (layers, *rest) = three_layers(implementation)
    compiled = jax.jit(run).lower(layers, *rest).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 0
    new_layers, _ = compiled(layers, *rest)
    assert set(addresses(layers)).isdisjoint(addresses(new_layers))
    assert not np.asarray(layers[0].k_pages).any()
    assert np.asarray(new_layers[0].k_pages).any()


def test_a_layer_of_one_cache_of_all_is_as_a_cache_of_its_own():
    run, (layers, *rest) = three_layers("cpu_native")
    together = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    attention = select("cpu", "cpu_native")
    assert attention.stacks_layers

    def run_together(cache, q, k, v, table, token_row, position):
        for layer in range(LAYERS):
            of_layer = cache._replace(layer=jnp.int32(layer))
            q, cache = attention.write_and_attend(q, k, v, of_layer, table, token_row, position, scale=0.125)
        return cache._replace(layer=None), q

    compiled = jax.jit(run_together, donate_argnums=0).lower(together, *rest).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < CACHE_BYTES / 2
    before = addresses(together)
    together, out = compiled(together, *rest)
    layers, expected = run(layers, *rest)
    assert addresses(together) == before
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(expected, np.float32))
    for layer, cache in enumerate(layers):
        assert np.asarray(cache.k_pages, np.float32).any()
        np.testing.assert_array_equal(np.asarray(together.k_pages[layer]), np.asarray(cache.k_pages))
        np.testing.assert_array_equal(np.asarray(together.v_pages[layer]), np.asarray(cache.v_pages))
