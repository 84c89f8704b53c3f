"""The persistent grid: blocks of threads that take units of work in turn."""

import jax.numpy as jnp
from jax import lax

MULTIPROCESSORS = 132
"""Of an H100 or H200. More or fewer cost balance, not correctness."""
GRID_AXIS = "block"


def for_each_unit(count, kv_heads: int, visit, carry):
    """Calls visit(number, unit, head, carry) -> carry for each unit and kv head of this block of threads.

    Unit u of head h is item u * kv_heads + h; items go round the blocks in turn. `number` counts this block's.

    Returns:
        How many there were, and the last carry.
    """
    block, blocks = lax.axis_index(GRID_AXIS), lax.axis_size(GRID_AXIS)
    heads = jnp.int32(kv_heads)

    def visit_item(number, carry):
        item = block + number * blocks
        return visit(number, lax.div(item, heads), lax.rem(item, heads), carry)

    visits = lax.div(count * heads - block + blocks - 1, jnp.int32(blocks))
    return visits, lax.fori_loop(0, visits, visit_item, carry)
