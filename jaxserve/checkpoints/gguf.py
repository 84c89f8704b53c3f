"""GGUF files: configuration and tokenizer from the metadata, tensors dequantized as they are read."""

import math
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, TokenType, quants

from jaxserve.checkpoints.gguf_header import Header, TensorInfo, Value, read_header
from jaxserve.checkpoints.tensors import Checkpoint, CheckpointError, StoredBlocks, StoredTensor, read_bytes
from jaxserve.models.config import (
    FrequencyFactors,
    LinearScaling,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    UnsupportedModel,
)
from jaxserve.request import MAX_STOP_TOKEN_IDS
from jaxserve.tokenizing.tokenizer_source import GGUFTokenizer, TokenizerSource

_TYPE_NAMES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TYPES = tuple(GGMLQuantizationType[name] for name in _TYPE_NAMES)
"""Tensor types that are read."""

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_BITS = {GGMLQuantizationType.Q4_0: 4, GGMLQuantizationType.Q4_1: 4, GGMLQuantizationType.Q8_0: 8}
"""Types whose blocks are taken as they are for weights in blocks of as many bits."""
_JOINED_ELEMENTS = 16384
_ROPE_FACTORS = "rope_freqs.weight"
_ENDINGS = frozenset(
    {
        *("</s>", "<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>"),
    }
)
"""Tokens that end a text, a turn or a message, whether or not the metadata names them, and are control tokens, whatever
type it gives them: as in llama.cpp (`special_eog_ids` in `src/llama-vocab.cpp`). Left out are those of architectures
that are not read, and those of fill-in-the-middle prompts, after which code goes on."""
_MAX_ENDINGS = MAX_STOP_TOKEN_IDS // 2
"""Most ids that end a sequence: the other half are left to a request's client."""


def open_gguf(file: Path) -> Checkpoint:
    """Reads a GGUF file's header. Raises CheckpointError naming the file and the key or tensor at fault."""
    header = read_header(file)
    try:
        config = model_config(file, header)
    except UnsupportedModel as error:
        raise CheckpointError(f"{file}: {error}") from None
    tensors = {
        _hugging_face_name(name): _stored_tensor(file, name, info, config)
        for name, info in header.tensors.items()
        if name != _ROPE_FACTORS
    }
    return Checkpoint(file, config, tokenizer_source(file, header, config), tensors)


class _Metadata:
    """Typed access to metadata; a key of another type is an error."""

    def __init__(self, file: Path, values: dict[str, Value]):
        self.file = file
        self.values = values

    def get[T](self, key: str, kind: type[T]) -> T | None:
        value = self.values.get(key)
        if value is None:
            return None
        # bool is a subclass of int, and not what is meant by one.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"{self.file}: metadata {key} is not of type {kind.__name__}: {str(value)[:80]}")
        return value

    def need[T](self, key: str, kind: type[T]) -> T:
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.file}: metadata {key} is missing")
        return value


def model_config(file: Path, header: Header) -> ModelConfig:
    """The configuration in a GGUF header. Raises UnsupportedModel or CheckpointError."""
    metadata = _Metadata(file, header.metadata)
    family = metadata.need("general.architecture", str)
    if family not in _ARCHITECTURES:
        raise UnsupportedModel(f"architecture {family!r} is not one of {', '.join(_ARCHITECTURES)}")
    if (metadata.get("split.count", int) or 1) > 1:
        raise UnsupportedModel("is one of several split files: join them with llama-gguf-split --merge")
    if metadata.get(f"{family}.expert_count", int):
        raise UnsupportedModel(f"architecture {family!r} with experts is not supported")
    hidden_size = metadata.need(f"{family}.embedding_length", int)
    num_q_heads = metadata.need(f"{family}.attention.head_count", int)
    if num_q_heads < 1:
        raise CheckpointError(f"{file}: metadata {family}.attention.head_count is {num_q_heads}")
    head_dim = metadata.get(f"{family}.attention.key_length", int) or hidden_size // num_q_heads
    for key in (f"{family}.attention.value_length", f"{family}.rope.dimension_count"):
        if (metadata.get(key, int) or head_dim) != head_dim:
            raise UnsupportedModel(f"{key} of {header.metadata[key]} differs from the head_dim of {head_dim}")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file}: tensor token_embd.weight is missing")
    return ModelConfig(
        family=family,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=metadata.need(f"{family}.feed_forward_length", int),
        num_layers=metadata.need(f"{family}.block_count", int),
        num_q_heads=num_q_heads,
        num_kv_heads=metadata.get(f"{family}.attention.head_count_kv", int) or num_q_heads,
        head_dim=head_dim,
        rms_norm_eps=metadata.need(f"{family}.attention.layer_norm_rms_epsilon", float),
        rope=_rope(metadata, family, header.tensors.get(_ROPE_FACTORS), head_dim),
        max_context=metadata.need(f"{family}.context_length", int),
        tie_embeddings="output.weight" not in header.tensors,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=metadata.get(f"{family}.attention.sliding_window", int) or None,
        eos_ids=_eos_ids(metadata),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id", int),
    )


def _eos_ids(metadata: _Metadata) -> tuple[int, ...]:
    """The ids that the metadata names, and those of tokens that are known to end a sequence."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens", list) or ()
    known = [id for id, token in enumerate(tokens) if token in _ENDINGS]
    ids = dict.fromkeys([*(id for id in named if id is not None), *known])
    return tuple(ids)[:_MAX_ENDINGS]


def _rope(metadata: _Metadata, family: str, factors: TensorInfo | None, head_dim: int) -> RopeConfig:
    theta = metadata.get(f"{family}.rope.freq_base", float) or 10000.0
    named = metadata.get(f"{family}.rope.scaling.type", str)
    kind = named or "linear"  # llama.cpp's default
    scaling: RopeScaling | None = None
    if kind == "linear":
        factor = metadata.get(f"{family}.rope.scale_linear", float)  # as the key was called once
        if f"{family}.rope.scaling.factor" in metadata.values or (named and factor is None):
            factor = metadata.need(f"{family}.rope.scaling.factor", float)
        # To llama.cpp 0 is no scaling as well.
        if factor not in (None, 0.0, 1.0):
            scaling = LinearScaling(factor)
    elif kind != "none":
        raise UnsupportedModel(f"rope scaling {kind!r} is not supported")
    if factors is not None:
        if scaling is not None:
            raise UnsupportedModel(f"rope scaling {kind!r} together with {_ROPE_FACTORS} is not supported")
        if factors.shape != (head_dim // 2,):
            raise CheckpointError(f"{metadata.file}: tensor {_ROPE_FACTORS} has shape {factors.shape}")
        values = _read(metadata.file, _ROPE_FACTORS, factors, None)
        scaling = FrequencyFactors(tuple(float(value) for value in values.ravel()))
    return RopeConfig(theta, scaling)


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; a name without a counterpart is kept."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _stored_tensor(file: Path, name: str, info: TensorInfo, config: ModelConfig) -> StoredTensor:
    heads = None
    if config.family == "llama":
        # The converter of llama.cpp reorders the rows of q and k for interleaved rotary pairs, in this family alone.
        heads = {"attn_q": config.num_q_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2])
    blocks = None
    if info.type in _BLOCK_BITS:
        blocks = StoredBlocks(_BLOCK_BITS[info.type], partial(_read_blocks, file, name, info, heads))
    return StoredTensor(file, info.shape, partial(_read, file, name, info, heads), blocks)


def _read_raw(file: Path, name: str, info: TensorInfo, interleaved_heads: int | None) -> np.ndarray:
    """Rows of bytes, those of interleaved heads put back in order: even elements, then odd ones."""
    raw = read_bytes(file, info.offset, info.size, name)
    raw = raw.reshape(*info.shape[:-1], -1)
    if interleaved_heads is not None:
        rows = raw.reshape(interleaved_heads, -1, 2, raw.shape[-1])
        raw = rows.swapaxes(1, 2).reshape(raw.shape)
    return raw


def _read(file: Path, name: str, info: TensorInfo, interleaved_heads: int | None) -> np.ndarray:
    """Floating point of `info.shape`."""
    if info.type not in TYPES:
        raise CheckpointError(f"{file}: tensor {name} has the unsupported type {info.type.name}")
    raw = _read_raw(file, name, info, interleaved_heads)
    if info.type == GGMLQuantizationType.F32:
        return raw.view(np.float32)
    if info.type == GGMLQuantizationType.F16:
        return raw.view(np.float16)
    return _dequantize(raw, info.type).reshape(info.shape)


def _read_blocks(file: Path, name: str, info: TensorInfo, interleaved_heads: int | None) -> np.ndarray:
    """The blocks of a tensor whose type is in `_BLOCK_BITS`; see `StoredBlocks`."""
    # Imported here: who asks only what a file says of itself needs no JAX.
    from pallas_kernels.block_quantization import with_minimums

    raw = _read_raw(file, name, info, interleaved_heads)
    if info.type == GGMLQuantizationType.Q4_1:
        return raw
    blocks = raw.reshape(raw.shape[0], -1, GGML_QUANT_SIZES[info.type][1])
    scales, numbers = blocks[..., :2].copy().view(np.float16)[..., 0], blocks[..., 2:]
    if info.type == GGMLQuantizationType.Q8_0:
        return with_minimums(scales, numbers ^ 0x80, zero=128).reshape(raw.shape[0], -1)
    return with_minimums(scales, numbers, zero=8).reshape(raw.shape[0], -1)


def _dequantize(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """float32 of whole rows of blocks, in another shape.

    The gguf package works through 16 rows at a time, which is all overhead where rows are short: rows are joined, still
    in order, until 16 of them are a megabyte of float32 or so.
    """
    block, block_bytes = GGML_QUANT_SIZES[kind]
    num_rows, row_bytes = math.prod(raw.shape[:-1]), raw.shape[-1]
    joined = max(1, min(num_rows, _JOINED_ELEMENTS * block_bytes // (row_bytes * block)))
    while num_rows % joined:
        joined -= 1
    return quants.dequantize(raw.reshape(-1, joined * row_bytes), kind)


def tokenizer_source(file: Path, header: Header, config: ModelConfig) -> TokenizerSource:
    """The tokenizer in a GGUF header. Raises CheckpointError."""
    metadata = _Metadata(file, header.metadata)

    def key(name: str) -> str:
        return f"tokenizer.ggml.{name}"

    tokens = metadata.need(key("tokens"), list)
    types: list[int] = list(metadata.get(key("token_type"), list) or ())
    for id, token in enumerate(tokens[: len(types)]):
        if token in _ENDINGS:
            types[id] = TokenType.CONTROL
    special = {}
    for name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(key(f"{gguf_name}_token_id"), int)
        if token is not None:
            if not 0 <= token < len(tokens):
                raise CheckpointError(f"{file}: {key(f'{gguf_name}_token_id')} is {token} of {len(tokens)} tokens")
            special[f"{name}_token"] = tokens[token]
    return TokenizerSource(
        tokenizer=GGUFTokenizer(
            model=metadata.need(key("model"), str),
            pre=metadata.get(key("pre"), str),
            tokens=tuple(tokens),
            token_types=tuple(types),
            scores=tuple(metadata.get(key("scores"), list) or ()),
            merges=tuple(metadata.get(key("merges"), list) or ()),
            unknown_id=metadata.get(key("unknown_token_id"), int),
            padding_id=metadata.get(key("padding_token_id"), int),
            add_space_prefix=metadata.get(key("add_space_prefix"), bool),
        ),
        vocab_size=config.vocab_size,
        bos_id=config.bos_id,
        eos_ids=config.eos_ids,
        add_bos=metadata.get(key("add_bos_token"), bool),
        add_eos=metadata.get(key("add_eos_token"), bool),
        chat_template=metadata.get("tokenizer.chat_template", str),
        special_tokens=special,
        tool_template=metadata.get("tokenizer.chat_template.tool_use", str),
    )
