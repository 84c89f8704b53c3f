"""Compiles for TPUs on a machine without one: libtpu's own compiler, over a described machine."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""Topologies by generation."""


@functools.cache
def topology(tpu: str) -> topologies.TopologyDescription:
    """A described machine of a generation of `TPUS`."""
    return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[tpu])


def compile_for_tpu(tpu: str, function: Callable, *shapes: object, donate: tuple[int, ...] = ()) -> jax.stages.Compiled:
    """`function` compiled for one chip and arguments of these shapes, trees of `jax.ShapeDtypeStruct`."""
    mesh = Mesh(np.array(topology(tpu).devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=donate).lower(*placed).compile()
