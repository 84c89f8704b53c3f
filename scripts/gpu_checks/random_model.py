"""Models of seeded random weights, made on the spot: nothing large has to travel."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from jaxserve.models.config import ModelConfig, RopeConfig
from jaxserve.models.llama import abstract_llama

LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, RopeConfig(5e5), 131072, False)
TINY = ModelConfig("llama", 512, 128, 256, 2, 4, 2, 64, 1e-5, RopeConfig(1e4), 4096, True)
FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "families"


def random_weights(config: ModelConfig) -> tuple[jax.Array, ...]:
    """The flat weights of a bfloat16 model, made on the device."""
    leaves = jax.tree.leaves(abstract_llama(config, "bfloat16")[1])
    fill = jax.jit(lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(jnp.bfloat16), static_argnums=1)
    return tuple(
        jnp.ones(leaf.shape, leaf.dtype) if leaf.ndim == 1 else fill(jax.random.key(number), leaf.shape)
        for number, leaf in enumerate(leaves)
    )


@dataclass(frozen=True)
class Sizes:
    """Of a Llama."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int


def random_folder(folder: Path, sizes: Sizes, dtype: DTypeLike = np.float32, *, alike: bool = False) -> Path:
    """A Hugging Face folder of a Llama with random weights and the tokenizer of a fixture.

    Weights are large enough that logits differ clearly: a greedy token then does not hang on the last bits. `alike`
    gives all layers the same, which makes a large model in seconds.
    """
    hidden, heads, kv_heads, intermediate = sizes.hidden, sizes.heads, sizes.kv_heads, sizes.intermediate
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(FIXTURES / "llama3" / name, folder / name)
    config = json.loads((FIXTURES / "llama3" / "config.json").read_text())
    head_dim = hidden // heads
    config |= {
        "num_hidden_layers": sizes.layers, "hidden_size": hidden, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)).astype(dtype)

    tensors = {
        "model.embed_tokens.weight": weight(config["vocab_size"], hidden),
        "lm_head.weight": weight(config["vocab_size"], hidden),
        "model.norm.weight": np.ones(hidden, dtype),
    }
    kv_size = kv_heads * head_dim
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }  # fmt: skip
    made: dict[str, np.ndarray] = {}
    for layer in range(sizes.layers):
        if not (alike and made):
            made = {name: weight(*shape) for name, shape in shapes.items()}
            made |= {name: np.ones(hidden, dtype) for name in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in made.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
