"""Seeded random checkpoints in the Hugging Face layout, for shapes that the committed fixtures do not have."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxserve.checkpoints.parameters import parameter_sources
from jaxserve.models.huggingface_config import from_hf_config

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "families" / "qwen3"
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "bos_token_id": 1,
    "tie_word_embeddings": False,
}


def write_checkpoint(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A float32 checkpoint of CONFIG with `changes`, whose activations neither vanish nor explode."""
    folder.mkdir(parents=True)
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in (source for parts in parameter_sources(from_hf_config(config)).values() for source in parts):
        values = random.standard_normal(shape, np.float32)
        tensors[name] = 1 + 0.1 * values if "norm" in name else values * np.float32(shape[-1] ** -0.5)
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors")
    return folder
