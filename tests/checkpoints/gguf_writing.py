"""Writes GGUF files for the tests, as the converter of llama.cpp lays them out."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from jaxserve.models.config import LinearScaling, Llama3Scaling, ModelConfig
from jaxserve.models.layers import inverse_frequencies

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama.cpp's converter (LlamaModel.permute): halves of a head become pairs."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    file: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    types: Mapping[str, GGMLQuantizationType] | None = None,
    metadata: Mapping[str, str | int | float | bool] | None = None,
    control: Mapping[int, str] | None = None,
    control_type: TokenType = TokenType.CONTROL,
) -> None:
    """Writes `tensors`, by GGUF name: floats as they are, those in `types` as raw blocks (uint8). `control` are control
    tokens by id, written as of `control_type`."""
    family = config.family
    writer = GGUFWriter(file, family)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_q_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if isinstance(config.rope.scaling, LinearScaling):
        writer.add_string(f"{family}.rope.scaling.type", "linear")
        writer.add_float32(f"{family}.rope.scaling.factor", config.rope.scaling.factor)
    if isinstance(config.rope.scaling, Llama3Scaling):
        plain = inverse_frequencies(type(config.rope)(config.rope.theta), config.head_dim)
        writer.add_tensor("rope_freqs.weight", plain / inverse_frequencies(config.rope, config.head_dim))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    control = control or {}
    writer.add_token_list([control.get(index, f"token{index}") for index in range(config.vocab_size)])
    writer.add_token_types([control_type if index in control else 1 for index in range(config.vocab_size)])
    writer.add_token_merges(["t o", "to k"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        add[type(value)](key, value)
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
