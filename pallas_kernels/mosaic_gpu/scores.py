"""From the product of a query and a key to a score."""

import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.interface import Scoring

LOG2_E = math.log2(math.e)
LOWEST = -1e30
"""Below every score, and finite, so that no difference is one of infinities."""


def scores_of(product: Any, scoring: Scoring) -> Any:
    """The scores of products, float32, in units of log 2: the hardware has exp2."""
    if scoring.softcap is None:
        return product * (scoring.scale * LOG2_E)
    # cap * tanh(x / cap) through exp2, as the hardware's own tanh is good to 11 bits only.
    power = jnp.exp2(product * (2 * scoring.scale * LOG2_E / scoring.softcap))
    cap = scoring.softcap * LOG2_E
    return cap - 2 * cap / (power + 1)
