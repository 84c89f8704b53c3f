"""What a model does differently where several devices share it: each traces its own share of every linear map."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Num

TENSOR = "tensor"
"""The axis of the mesh along which linear maps are cut."""


@dataclass(frozen=True)
class Shards:
    """How many devices share the model. With more than one it must be called under `jax.shard_map`, over `TENSOR`."""

    count: int = 1

    def gather(self, x: Num[Array, "token share"]) -> Num[Array, "token whole"]:
        """The devices' shares of the last axis, side by side."""
        return x if self.count == 1 else lax.all_gather(x, TENSOR, axis=1, tiled=True)

    def rows(self, table: Float[Array, "share hidden"], ids: Int32[Array, " token"]) -> Float[Array, "token hidden"]:
        """Rows of a table of which each device has a share of the rows."""
        if self.count == 1:
            return table[ids]
        own = ids - lax.axis_index(TENSOR) * table.shape[0]
        is_own = (own >= 0) & (own < table.shape[0])
        found = jnp.where(is_own[:, None], table.at[own].get(mode="clip"), jnp.zeros((), table.dtype))
        return lax.psum(found, TENSOR)  # all but one are zeros: exact in any order


UNSHARDED = Shards()
"""One device has the whole model."""
