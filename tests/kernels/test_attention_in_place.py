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

    def run(keys, values, q, k, v, table, token_row, position):
        keys, values = list(keys), list(values)
        for layer in range(LAYERS):
            q, keys[layer], values[layer] = attention.write_and_attend(
                q, k, v, keys[layer], values[layer], table, token_row, position, scale=0.125, sliding_window=None
            )
        return tuple(keys), tuple(values), q

    shape = attention.cache_shape(PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    keys, values = [tuple(jnp.zeros(shape, jnp.bfloat16) for _ in range(LAYERS)) for _ in range(2)]
    q, k, v = (jnp.ones((TOKENS, heads, HEAD_DIM), jnp.bfloat16) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    table = jnp.arange(1, 1 + TOKENS * 4, dtype=jnp.int32).reshape(TOKENS, 4)
    return run, (keys, values, q, k, v, table, jnp.arange(TOKENS), jnp.arange(TOKENS) * 7)


def addresses(arrays) -> list[int]:
    return [array.unsafe_buffer_pointer() for array in arrays]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_donated_cache_stays_where_it_is(implementation: str):
    run, (keys, values, *rest) = three_layers(implementation)
    before = addresses(keys) + addresses(values)
    step = jax.jit(run, donate_argnums=(0, 1))
    for _ in range(3):
        keys, values, _ = step(keys, values, *rest)
        assert addresses(keys) + addresses(values) == before
    written = np.asarray(keys[1], np.float32)
    assert written.sum() == TOKENS * KV_HEADS * HEAD_DIM


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_temporary_has_the_size_of_a_cache(implementation: str):
    run, operands = three_layers(implementation)
    memory = jax.jit(run, donate_argnums=(0, 1)).lower(*operands).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * LAYERS * CACHE_BYTES
    assert memory.temp_size_in_bytes < CACHE_BYTES / 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_donation_the_copy_shows_and_the_operand_is_unharmed(implementation: str):
    """The two checks above can fail; and a cache that was not given away is not written to."""
    run, (keys, values, *rest) = three_layers(implementation)
    compiled = jax.jit(run).lower(keys, values, *rest).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 0
    new_keys, new_values, _ = compiled(keys, values, *rest)
    assert set(addresses(keys + values)).isdisjoint(addresses(new_keys + new_values))
    assert not np.asarray(keys[0]).any()
    assert np.asarray(new_keys[0]).any()
