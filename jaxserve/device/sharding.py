"""How one replica of a model lies over its devices: one table from logical axes to the axis of the mesh.

Every linear map is sharded by its outputs, and the shards' outputs are gathered before the next map contracts over
them. The usual alternative shards every second map by its inputs and adds partial sums up: two all-reduces a layer
where this takes four all-gathers. The hops are as many, an all-reduce being a scatter and a gather; the bytes are fewer
here, since partial sums travel in float32 and activations in their own type. What decided: no sum is cut in parts, so
the number of devices changes a result by what the compiler makes of other shapes and by nothing else: the last bits.

The embedding and the lm head are sharded by vocabulary. Replicated, each would take a gigabyte of every device for an
8B model of 128k tokens, and the head would be the largest product of a decode step; logits are gathered instead.
Sampling is replicated: every device chooses the same tokens from the same logits.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.device.errors import PlacementError
from jaxserve.models.config import ModelConfig
from jaxserve.models.shards import TENSOR, Shards

type JaxDevice = jax.Device  # pyright: ignore[reportInvalidTypeForm]

RULES: dict[str, str | None] = {
    "vocab": TENSOR,
    "qkv": TENSOR,
    "gate_up": TENSOR,
    "hidden_out": TENSOR,
    "kv_head": TENSOR,
    "hidden": None,
    "q_head": None,
    "intermediate": None,
    "head_dim": None,
}
"""Logical axis -> axis of the mesh, None where it is whole on every device. `hidden_out` is the hidden axis as the
outputs of a map; activations are gathered along it. Of activations only q, k, v and the cache are sharded, by head."""

PARAMETER_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "hidden"),
    "lm_head.weight": ("vocab", "hidden"),
    "norm.weight": ("hidden",),
    "attention_norm.weight": ("hidden",),
    "feed_forward_norm.weight": ("hidden",),
    "q_norm.weight": ("head_dim",),
    "k_norm.weight": ("head_dim",),
    "qkv.weight": ("qkv", "hidden"),
    "out.weight": ("hidden_out", "q_head"),
    "gate_up.weight": ("gate_up", "hidden"),
    "down.weight": ("hidden_out", "intermediate"),
}
"""Axes of a parameter by the last parts of its name. A bias or scale has the first axis of its weight."""


@dataclass(frozen=True)
class Placement:
    """The devices that one replica of a model lies on, and where on them each of its arrays lies."""

    devices: tuple[JaxDevice, ...]
    """As many as the model is cut into (`tensor_parallel`), of this process or of a topology to compile for."""

    @staticmethod
    def of_replica(replica: int = 0, replicas: int = 1, tensor_parallel: int = 1) -> "Placement":
        """The devices of one of several replicas, each of which has `tensor_parallel` of this process's own.

        Raises PlacementError where there are too few, or none of the platform that JAX was told to use.
        """
        try:
            devices = jax.devices()
        except (RuntimeError, AssertionError) as error:  # the latter, without a word, for a platform without a plugin
            asked = jax.config.jax_platforms
            raise PlacementError(
                f"JAX has no device of the platforms {asked!r}: {str(error) or 'no plugin'}"
            ) from error
        if replicas * tensor_parallel > len(devices):
            raise PlacementError(
                f"tensor_parallel, replicas: {replicas} replicas of {tensor_parallel} devices each were asked for, and "
                f"there are {len(devices)} devices ({devices[0].device_kind})"
            )
        return Placement(tuple(devices[replica * tensor_parallel : (replica + 1) * tensor_parallel]))

    @property
    def tensor_parallel(self) -> int:
        """Devices that share each weight."""
        return len(self.devices)

    @property
    def platform(self) -> str:
        """As `pallas_kernels.select` calls it: `cpu`, `cuda` or `tpu`."""
        platform = self.devices[0].platform
        return "cuda" if platform == "gpu" else platform

    @property
    def shards(self) -> Shards:
        """What the model is told."""
        return Shards(self.tensor_parallel)

    @cached_property
    def mesh(self) -> Mesh:
        """Of one axis."""
        return Mesh(np.array(self.devices), (TENSOR,))

    def check(self, model: ModelConfig) -> None:
        """See `check_shares`."""
        check_shares(model, self.tensor_parallel)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Of an array whose axes have these logical names, None for one that is never sharded; no axes at all for what
        is whole on each device."""
        return NamedSharding(self.mesh, PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes)))

    def parameter(self, name: str) -> NamedSharding:
        """Of a parameter by its name in `models.parameters`."""
        return self.sharding(*parameter_axes(name))


def check_shares(model: ModelConfig, tensor_parallel: int) -> None:
    """Raises PlacementError where `tensor_parallel` devices cannot share the model evenly."""
    for name in ("num_kv_heads", "intermediate_size", "hidden_size", "vocab_size"):
        size = getattr(model, name)
        if size % tensor_parallel:
            raise PlacementError(f"tensor_parallel: must divide the model's {name} of {size}, got {tensor_parallel}")


def parameter_axes(name: str) -> tuple[str, ...]:
    """Logical axes of a parameter: `layers.3.attention.qkv.scale` has those of `qkv.weight`, the first alone."""
    owner, _, kind = name.rpartition(".")
    parts = [part for part in owner.split(".") if part]
    if kind in ("scale", "bias"):
        return PARAMETER_AXES[f"{parts[-1]}.weight"][:1]
    return PARAMETER_AXES[".".join([*parts[-1:], kind])]


def in_shard_order[A: (np.ndarray, jax.Array)](array: A, name: str, model: ModelConfig, shards: Shards) -> A:
    """A parameter whose rows are those of several maps, one after the other, with them in the order of the shards.

    q, k and v of four heads over two devices become q0 q1 k0 k1 v0 v1 | q2 q3 k2 k3 v2 v3, so that cutting the rows in
    two gives each device whole heads of all three. Other parameters, and those of one device, are given back.
    """
    sizes = {
        "qkv": (model.q_size, model.kv_size, model.kv_size),
        "gate_up": (model.intermediate_size, model.intermediate_size),
    }.get(parameter_axes(name)[0])
    if sizes is None or shards.count == 1:
        return array
    cut, start = [], 0
    for size in sizes:
        part = array[start : start + size]
        cut.append(part.reshape(shards.count, size // shards.count, *array.shape[1:]))
        start += size
    concatenate = np.concatenate if isinstance(array, np.ndarray) else jnp.concatenate
    return concatenate(cut, axis=1).reshape(array.shape)  # pyright: ignore[reportReturnType]
