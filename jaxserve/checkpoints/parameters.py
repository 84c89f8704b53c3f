"""From named tensors to the tree of parameters: fused, cast, quantized and uploaded one at a time."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.checkpoints.tensors import Checkpoint, CheckpointError
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import quantize_rows

Progress = Callable[[str, float | None], None]
Path = tuple[str | int, ...]
"""Of a parameter in the tree, as `("layers", 3, "attention", "qkv", "weight")`."""
Source = tuple[str, tuple[int, ...]]
"""A tensor's Hugging Face name and its shape."""

_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".self_attn.rotary_emb.inv_freq")
_FLOATING = ("F32", "F16", "BF16")


def parameter_sources(config: ModelConfig) -> dict[Path, tuple[Source, ...]]:
    """The tensors whose rows, one after the other, make each parameter of the floating-point model."""
    hidden, wide = config.hidden_size, config.intermediate_size
    embedding = ("model.embed_tokens.weight", (config.vocab_size, hidden))
    head = embedding if config.tie_embeddings else ("lm_head.weight", (config.vocab_size, hidden))
    sources: dict[Path, tuple[Source, ...]] = {
        ("embedding",): (embedding,),
        ("norm", "weight"): (("model.norm.weight", (hidden,)),),
        ("lm_head", "weight"): (head,),
    }
    qkv_sizes = (("q", config.q_size), ("k", config.kv_size), ("v", config.kv_size))
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        layer: dict[Path, tuple[Source, ...]] = {
            ("attention_norm", "weight"): ((f"{prefix}.input_layernorm.weight", (hidden,)),),
            ("attention", "qkv", "weight"): tuple(
                (f"{prefix}.self_attn.{name}_proj.weight", (size, hidden)) for name, size in qkv_sizes
            ),
            ("attention", "qkv", "bias"): tuple(
                (f"{prefix}.self_attn.{name}_proj.bias", (size,)) for name, size in qkv_sizes
            ),
            ("attention", "q_norm", "weight"): ((f"{prefix}.self_attn.q_norm.weight", (config.head_dim,)),),
            ("attention", "k_norm", "weight"): ((f"{prefix}.self_attn.k_norm.weight", (config.head_dim,)),),
            ("attention", "out", "weight"): ((f"{prefix}.self_attn.o_proj.weight", (hidden, config.q_size)),),
            ("feed_forward_norm", "weight"): ((f"{prefix}.post_attention_layernorm.weight", (hidden,)),),
            ("feed_forward", "gate_up", "weight"): tuple(
                (f"{prefix}.mlp.{name}_proj.weight", (wide, hidden)) for name in ("gate", "up")
            ),
            ("feed_forward", "down", "weight"): ((f"{prefix}.mlp.down_proj.weight", (hidden, wide)),),
        }
        sources |= {("layers", index, *path): parts for path, parts in layer.items()}
    return sources


def load_params(checkpoint: Checkpoint, abstract: nnx.State, progress: Progress) -> nnx.State:
    """Fills `abstract` (of `abstract_llama`) on the default device from a checkpoint's tensors.

    All names and shapes are checked before any data is read. On the host, one parameter a thread is held at a time.
    Raises CheckpointError naming the tensor.
    """
    targets = dict(nnx.to_flat_state(abstract))
    sources = parameter_sources(checkpoint.config)
    # The scale of an int8 weight is made with the weight.
    wanted = {path: sources[path] for path in targets if path[-1] != "scale"}
    check_tensors(checkpoint, wanted)

    def fill(path: Path) -> list[tuple[Path, jax.Array]]:
        target = targets[path].get_value()
        scale = (*path[:-1], "scale")
        if scale not in targets:
            return [(path, jax.device_put(read_fused(checkpoint, wanted[path], target.dtype)))]
        dtype = targets["embedding",].get_value().dtype
        weight, scales = _quantize_rows(jax.device_put(read_fused(checkpoint, wanted[path], dtype)))
        return [(path, weight), (scale, scales)]

    params = abstract
    filled: dict[Path, jax.Array] = {}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for done, pairs in enumerate(pool.map(fill, wanted)):
            filled |= pairs
            progress("loading weights", (done + 1) / len(wanted))
    return nnx.from_flat_state({path: targets[path].replace(filled[path]) for path in targets})


_quantize_rows = jax.jit(quantize_rows)


def check_tensors(checkpoint: Checkpoint, wanted: dict[Path, tuple[Source, ...]]) -> None:
    """Raises CheckpointError for a tensor that is missing, has another shape, or that the model has no place for."""
    used = set()
    for name, shape in (source for parts in wanted.values() for source in parts):
        stored = checkpoint.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.file}: tensor {name} has shape {stored.shape}; the configuration asks for {shape}"
            )
        used.add(name)
    for name in checkpoint.tensors.keys() - used:
        redundant = name == "lm_head.weight" and checkpoint.config.tie_embeddings
        if not redundant and not name.endswith(_IGNORED_SUFFIXES):
            raise CheckpointError(f"{checkpoint.tensors[name].file}: tensor {name} has no place in the model")


def read_fused(checkpoint: Checkpoint, parts: tuple[Source, ...], dtype: np.dtype) -> np.ndarray:
    """The tensors' rows, one after the other, in `dtype`: a fresh array that aliases no file."""
    rows = [shape[0] for _, shape in parts]
    fused = np.empty((sum(rows), *parts[0][1][1:]), dtype)
    for (name, _), end, count in zip(parts, np.cumsum(rows), rows, strict=True):
        fused[end - count : end] = checkpoint.tensors[name].read()
    return fused
