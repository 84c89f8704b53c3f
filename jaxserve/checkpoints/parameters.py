"""From named tensors to the tree of parameters: fused, cast, quantized and uploaded one at a time."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx

from jaxserve.checkpoints.tensors import Checkpoint, CheckpointError
from jaxserve.config import Quantization
from jaxserve.device.sharding import Placement, in_shard_order
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import abstract_llama
from jaxserve.models.parameters import named_parameters, with_values
from jaxserve.models.quantize import quantize_matrix, quantize_weight, scale_name
from pallas_kernels.block_quantization import block_bits

Progress = Callable[[str, float | None], None]
Source = tuple[str, tuple[int, ...]]
"""A tensor's Hugging Face name and its shape."""

_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Of a buffer that old checkpoints carry; it follows from the configuration."""


def parameter_sources(config: ModelConfig) -> dict[str, tuple[Source, ...]]:
    """The tensors whose rows, one after the other, make each parameter of the floating-point model."""
    hidden, wide = config.hidden_size, config.intermediate_size
    embedding = ("model.embed_tokens.weight", (config.vocab_size, hidden))
    head = embedding if config.tie_embeddings else ("lm_head.weight", (config.vocab_size, hidden))
    sources: dict[str, tuple[Source, ...]] = {
        "embedding": (embedding,),
        "norm.weight": (("model.norm.weight", (hidden,)),),
        "lm_head.weight": (head,),
    }
    qkv_sizes = (("q", config.q_size), ("k", config.kv_size), ("v", config.kv_size))
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        layer: dict[str, tuple[Source, ...]] = {
            "attention_norm.weight": ((f"{prefix}.input_layernorm.weight", (hidden,)),),
            "attention.qkv.weight": tuple(
                (f"{prefix}.self_attn.{name}_proj.weight", (size, hidden)) for name, size in qkv_sizes
            ),
            "attention.out.weight": ((f"{prefix}.self_attn.o_proj.weight", (hidden, config.q_size)),),
            "feed_forward_norm.weight": ((f"{prefix}.post_attention_layernorm.weight", (hidden,)),),
            "feed_forward.gate_up.weight": tuple(
                (f"{prefix}.mlp.{name}_proj.weight", (wide, hidden)) for name in ("gate", "up")
            ),
            "feed_forward.down.weight": ((f"{prefix}.mlp.down_proj.weight", (hidden, wide)),),
        }
        if config.qkv_bias:
            layer["attention.qkv.bias"] = tuple(
                (f"{prefix}.self_attn.{name}_proj.bias", (size,)) for name, size in qkv_sizes
            )
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                layer[f"attention.{name}.weight"] = ((f"{prefix}.self_attn.{name}.weight", (config.head_dim,)),)
        sources |= {f"layers.{index}.{name}": parts for name, parts in layer.items()}
    return sources


def load_params(
    checkpoint: Checkpoint, dtype: str, quantization: Quantization, progress: Progress, placement: Placement
) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's structure, and its parameters, each put straight into its shards.

    All names and shapes are checked before anything is allocated. On the host, one parameter a thread is held at a
    time. Raises CheckpointError naming the tensor.
    """
    check_tensors(checkpoint)
    config = checkpoint.config
    graphdef, abstract = abstract_llama(config, dtype, quantization, shards=placement.shards)
    targets = named_parameters(abstract)
    sources = parameter_sources(config)

    def put(name: str, fused: np.ndarray) -> jax.Array:
        return jax.device_put(in_shard_order(fused, name, config, placement.shards), placement.parameter(name))

    def fill(name: str) -> dict[str, jax.Array]:
        if targets[name].dtype == np.uint8:
            return {name: put(name, read_blocks(checkpoint, sources[name], targets[name].shape))}
        is_int8 = scale_name(name) in targets
        value = read_fused(checkpoint, sources[name], np.dtype(dtype) if is_int8 else targets[name].dtype)
        return quantize_weight(name, put(name, value), targets)

    # The scale of an int8 weight is made with the weight.
    names = [name for name in targets if not name.endswith(".scale")]
    values: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for done, filled in enumerate(pool.map(fill, names), start=1):
            values |= filled
            progress("loading weights", done / len(names))
    return graphdef, with_values(abstract, values)


def check_tensors(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a tensor that is missing, has another shape, or that the model has no place for."""
    config, tensors = checkpoint.config, checkpoint.tensors
    if config.num_layers > len(tensors):
        raise CheckpointError(f"{checkpoint.path}: has {len(tensors)} tensors for {config.num_layers} layers")
    used = set()
    for name, shape in (source for parts in parameter_sources(config).values() for source in parts):
        stored = tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.file}: tensor {name} has shape {stored.shape}; the configuration asks for {shape}"
            )
        used.add(name)
    for name in tensors.keys() - used:
        redundant = name == "lm_head.weight" and config.tie_embeddings
        if not redundant and not name.endswith(_IGNORED_SUFFIX):
            raise CheckpointError(f"{tensors[name].file}: tensor {name} has no place in the model")


def read_fused(checkpoint: Checkpoint, parts: tuple[Source, ...], dtype: np.dtype) -> np.ndarray:
    """The tensors' rows, one after the other, in `dtype`: a fresh array that aliases no file."""
    rows = [shape[0] for _, shape in parts]
    fused = np.empty((sum(rows), *parts[0][1][1:]), dtype)
    for (name, _), end, count in zip(parts, np.cumsum(rows), rows, strict=True):
        fused[end - count : end] = checkpoint.tensors[name].read()
    return fused


def read_blocks(checkpoint: Checkpoint, parts: tuple[Source, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The tensors' rows, one after the other, in blocks: a fresh array of `shape`, uint8 [out, width].

    Blocks that the file has of as many bits are taken as they are, other tensors quantized.
    """
    bits = block_bits(shape[1], parts[0][1][1])
    fused, start = np.empty(shape, np.uint8), 0
    for name, (rows, _) in parts:
        stored = checkpoint.tensors[name]
        if stored.blocks is not None and stored.blocks.bits == bits:
            fused[start : start + rows] = stored.blocks.read()
        else:
            fused[start : start + rows] = quantize_matrix(stored.read(), bits)
        start += rows
    return fused
