"""The engine's steps compiled for devices that are not there, and what the compiler says of them.

TPUs need the package libtpu; an H100 needs jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc and nvidia-nvvm. JAX
must run on the CPU (`jax_platforms`), or the plugins look for real devices.
"""

import functools
import math
import os
import re
from collections import Counter
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from jaxserve.config import EngineConfig
from jaxserve.device.allocation import context_pages
from jaxserve.device.choosing import make_choosing
from jaxserve.device.devices import DEVICES, Device
from jaxserve.device.kv_cache import KVCache
from jaxserve.device.lowering import StepInputs, abstract_state, lower_choosing, lower_forward
from jaxserve.device.sharding import Placement
from jaxserve.device.vocabulary import search_on
from jaxserve.models.config import ModelConfig
from pallas_kernels import PagedAttention

_H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {round(DEVICES["h100"].memory / 0.8)} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""Without a device's allocator to say its limit, XLA takes 80 % of the memory for it, and computes things twice rather
than exceed it: this memory is what makes that the engine's own limit."""
_LIBTPU_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu reads from the environment, so that it asks nobody which machine it is on."""
_OPERATION = re.compile(r"^\s*(?:ROOT )?\S+ = (.*?) ([a-z][a-z-]*)\(", re.MULTILINE)
"""Result and kind of an operation in the text of an HLO module."""
_RECOMPUTED = re.compile(r"^\s*(?:ROOT )?\S+\.remat\S* = ", re.MULTILINE)
"""An operation that rematerialization added, by the name that it gives."""
_KERNEL = re.compile(
    r'custom_call_target="tpu_custom_call".*op_name="[^"]*?(?P<name>\w+)/pallas_call'
    r'.*"scoped_memory_configs":\[\{"memory_space":"1","offset":"(?P<begin>\d+)"'
    r'.*"cost_estimate":\{"flops":"(?P<flops>\d+)".*?"bytes_accessed":"(?P<bytes>\d+)"'
    r'.*"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(?P<end>\d+)"'
)
"""A call of a kernel: its part of VMEM is what lies from begin to end; XLA keeps other arrays before."""
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


class CannotCompile(RuntimeError):
    """There is no compiler for the device here, or no topology of as many."""


@dataclass(frozen=True)
class KernelFigures:
    """A Pallas kernel for TPUs in a compiled program."""

    calls: int
    vmem: int
    """Bytes of VMEM that a call takes."""
    flops: int
    """Of a call, as the kernel states them to the compiler."""
    bytes_accessed: int
    """Likewise."""


@dataclass(frozen=True)
class StepFigures:
    """What the compiler says of a program of a step, on each of the devices that share it. Sizes in bytes."""

    program: str
    """`forward`, or one of the second half, as `ChoosingPrograms` names them."""
    rows: int
    chunk: int
    """Prompt tokens beside the rows; 0 for a decode step."""
    arguments: int
    temporaries: int
    peak: int
    """Arguments, outputs and temporaries together at the worst moment; 0 where the compiler does not say."""
    aliased: int
    """Of arguments that the outputs overwrite in place."""
    cache: int
    """Of the arguments; 0 in the second half, which has no cache."""
    cache_is_aliased: bool
    """Every array of the cache is overwritten in place."""
    cache_copies: int
    """Operations that copy an array of the size of the cache's."""
    flops: float
    """As the compiler counts them; it counts no loop more than once, and no operation inside a kernel."""
    bytes_accessed: float
    collectives: dict[str, int]
    """Operations by which devices talk, by kind."""
    recomputed: int
    """Operations that stand there again, because the compiler saw no room to keep what they gave: rematerialization."""
    branches: int
    """Operations that run one of several computations: at each a GPU waits for the host, and the host for the GPU."""
    kernels: dict[str, KernelFigures]
    """Pallas kernels for TPUs, by name."""


def placement_on(device: Device, count: int) -> Placement:
    """`count` devices of a topology to compile for. Raises CannotCompile."""
    described = _topology(device)
    if count > len(described):
        raise CannotCompile(f"{device.kind}: the topology {device.topology} has {len(described)} devices, not {count}")
    return Placement(tuple(described[:count]))


@functools.cache
def _topology(device: Device):
    if device.topology is None:
        raise CannotCompile(f"{device.kind}: no topology is known to compile for")
    for name, value in _LIBTPU_ALONE.items():
        os.environ.setdefault(name, value)
    try:
        if device.platform == "cuda":
            described = topologies.get_topology_desc("h100", "cuda", target_config=_H100, topology=device.topology)
        else:
            described = topologies.get_topology_desc(platform=device.platform, topology_name=device.topology)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise CannotCompile(f"{device.kind}: there is no compiler for it here: {error}") from error
    return tuple(described.devices)


def forward_figures(
    model: ModelConfig,
    config: EngineConfig,
    attention: PagedAttention,
    placement: Placement,
    num_pages: int,
    chunk: int,
) -> StepFigures:
    """The first half of a step of all slots and `chunk` prompt tokens, compiled from shapes alone."""
    inputs = StepInputs.abstract(model, config, attention, num_pages, placement)
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        lowered = lower_forward(inputs, model, attention, placement, config.slots, chunk, context_pages(model, config))
    return _figures("forward", config.slots, chunk, lowered.compile(), inputs.cache, len(inputs.weights))


def choosing_figures(model: ModelConfig, config: EngineConfig, placement: Placement) -> list[StepFigures]:
    """The programs of the second half of a step of all slots, compiled from shapes alone."""
    state = abstract_state(config.slots, model.vocab_size, placement)
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        programs = make_choosing(search_on(placement.platform))
        lowered = lower_choosing(programs, state, model, placement, config.slots, context_pages(model, config))
    compiled = lowered.map(lambda name, program: _figures(name, config.slots, 0, program.compile(), KVCache(()), 0))
    return list(compiled)


def _figures(
    program: str, rows: int, chunk: int, compiled: jax.stages.Compiled, cache: KVCache, first: int
) -> StepFigures:
    """`first` is the number of the first argument that is an array of the cache; they are the first outputs."""
    memory, costs, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text() or ""
    assert memory is not None
    leaves = jax.tree.leaves(cache)
    shapes = {leaf.sharding.shard_shape(leaf.shape) for leaf in leaves}
    aliases = _aliases(text)
    return StepFigures(
        program=program,
        rows=rows,
        chunk=chunk,
        arguments=int(memory.argument_size_in_bytes),
        temporaries=int(memory.temp_size_in_bytes),
        peak=int(getattr(memory, "peak_memory_in_bytes", 0)),
        aliased=int(memory.alias_size_in_bytes),
        cache=sum(_shard_bytes(leaf) for leaf in leaves),
        cache_is_aliased=all(aliases.get(number) == first + number for number in range(len(leaves))),
        cache_copies=sum(operations_over(text, shape)[kind] for shape in shapes for kind in ("copy", "copy-start")),
        flops=float(costs.get("flops", 0.0)),
        bytes_accessed=float(costs.get("bytes accessed", 0.0)),
        collectives={kind: count for kind in _COLLECTIVES if (count := _count_calls(text, kind))},
        recomputed=len(_RECOMPUTED.findall(text)),
        branches=_count_calls(text, "conditional"),
        kernels=tpu_kernels(text),
    )


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _aliases(text: str) -> dict[int, int]:
    """Number of an output -> number of the argument that it overwrites, from the first line of an HLO module."""
    header = text.partition("\n")[0]
    return {int(out): int(argument) for out, argument in re.findall(r"\{(\d+)\}: \((\d+), \{\}", header)}


def operations_over(text: str, shape: tuple[int, ...]) -> Counter[str]:
    """Operations of an HLO module whose result is an array of a shape, or has one among others, by kind."""
    sizes = f"[{','.join(map(str, shape))}]"
    return Counter(kind for result, kind in _OPERATION.findall(text) if sizes in result)


def tpu_kernels(text: str) -> dict[str, KernelFigures]:
    """The Pallas kernels of a compiled HLO module, by name; of calls that differ, the most of each figure."""
    found: dict[str, KernelFigures] = {}
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            match = _KERNEL.search(line)
            assert match is not None, line
            name, before = match["name"], found.get(match["name"], KernelFigures(0, 0, 0, 0))
            found[name] = KernelFigures(
                before.calls + 1,
                max(before.vmem, int(match["end"]) - int(match["begin"])),
                max(before.flops, int(match["flops"])),
                max(before.bytes_accessed, int(match["bytes"])),
            )
    return found


def _count_calls(text: str, operation: str) -> int:
    """Operations of a kind; one that is split into start and done counts once."""
    return len(re.findall(rf"\s{operation}(?:-start)?\(", text))
