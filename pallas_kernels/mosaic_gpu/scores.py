"""From the product of a query and a key to a score."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

LOG2_E = math.log2(math.e)
LOWEST = -1e30
"""Below every score, and finite, so that no difference is one of infinities."""


@dataclass(frozen=True)
class Scores:
    """Scale and soft cap. Scores are in units of log 2: the hardware has exp2."""

    scale: float
    softcap: float | None = None

    def of(self, product: Any) -> Any:
        """The scores of products, float32."""
        if self.softcap is None:
            return product * (self.scale * LOG2_E)
        # cap * tanh(x / cap) through exp2, as the hardware's own tanh is good to 11 bits only.
        power = jnp.exp2(product * (2 * self.scale * LOG2_E / self.softcap))
        cap = self.softcap * LOG2_E
        return cap - 2 * cap / (power + 1)
