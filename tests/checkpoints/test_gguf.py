"""GGUF files of every tensor type and family, whole and damaged."""

import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType, quants
from gguf_writing import gguf_name, interleaved, write_gguf
from safetensors.numpy import load_file

from jaxserve.checkpoints.gguf import TYPES, open_gguf
from jaxserve.checkpoints.huggingface import open_huggingface
from jaxserve.checkpoints.loading import LoadedModel, load_model
from jaxserve.checkpoints.tensors import CheckpointError
from jaxserve.models.config import FrequencyFactors, LinearScaling, ModelConfig, RopeConfig
from jaxserve.models.layers import inverse_frequencies
from jaxserve.models.parameters import named_parameters
from jaxserve.tokenizing.tokenizer_source import GGUFTokenizer
from pallas_kernels.block_quantization import dequantize_blocks

FAMILIES = Path(__file__).parent.parent / "fixtures" / "families"
SMALL = ModelConfig("qwen3", 64, 256, 256, 1, 4, 2, 64, 1e-6, RopeConfig(), 64, tie_embeddings=True, qk_norm=True)
"""As small as blocks of 256 elements allow."""
SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Byte offsets in a block of the float16 that scale it (ggml-common.h)."""


def small_tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {
        "attn_norm": (256,),
        "attn_q": (256, 256),
        "attn_k": (128, 256),
        "attn_v": (128, 256),
        "attn_q_norm": (64,),
        "attn_k_norm": (64,),
        "attn_output": (256, 256),
        "ffn_norm": (256,),
        "ffn_gate": (256, 256),
        "ffn_up": (256, 256),
        "ffn_down": (256, 256),
    }
    names = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    names |= {"token_embd.weight": (64, 256), "output_norm.weight": (256,)}
    return {name: random.standard_normal(shape, np.float32) for name, shape in names.items()}


def raw_blocks(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Blocks of `kind`: of the values where the gguf package quantizes to it, else random ones with sane scales."""
    if kind.name not in SCALES_AT:
        return quants.quantize(values, kind)
    block, size = GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(values.size)
    blocks = random.integers(0, 256, (values.size // block, size), np.uint8)
    for offset in SCALES_AT[kind.name]:
        scales = random.uniform(0.001, 0.01, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*values.shape[:-1], -1)


def parameter(model: LoadedModel, name: str) -> np.ndarray:
    return np.asarray(named_parameters(model.params)[name])


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_tensor_type_is_read(tmp_path, kind):
    tensors = small_tensors()
    matrices = [name for name, values in tensors.items() if values.ndim == 2]
    floats = {"F32": np.float32, "F16": np.float16}
    expected = dict(tensors)
    for name in matrices:
        if kind.name in floats:
            tensors[name] = tensors[name].astype(floats[kind.name])
            expected[name] = tensors[name].astype(np.float32)
        else:
            tensors[name] = raw_blocks(tensors[name], kind)
            expected[name] = quants.dequantize(tensors[name], kind)
    types = {} if kind.name in floats else {name: kind for name in matrices}
    write_gguf(tmp_path / "small.gguf", SMALL, tensors, types)
    model = load_model(str(tmp_path / "small.gguf"), "float32")
    np.testing.assert_array_equal(parameter(model, "embedding"), expected["token_embd.weight"])
    fused = [expected[f"blk.0.attn_{name}.weight"] for name in "qkv"]
    np.testing.assert_array_equal(parameter(model, "layers.0.attention.qkv.weight"), np.concatenate(fused))
    fused = [expected[f"blk.0.ffn_{name}.weight"] for name in ("gate", "up")]
    np.testing.assert_array_equal(parameter(model, "layers.0.feed_forward.gate_up.weight"), np.concatenate(fused))
    np.testing.assert_array_equal(
        parameter(model, "layers.0.feed_forward.down.weight"), expected["blk.0.ffn_down.weight"]
    )
    np.testing.assert_array_equal(parameter(model, "norm.weight"), tensors["output_norm.weight"])


@pytest.mark.parametrize(("kind", "tolerance"), [("Q8_0", 0.02), ("Q4_0", 0.5), ("Q4_1", 0.3), ("BF16", 0.02)])
def test_quantized_values_are_near_the_originals(tmp_path, kind, tolerance):
    original = small_tensors()
    quantization = GGMLQuantizationType[kind]
    tensors = {n: raw_blocks(v, quantization) if v.ndim == 2 else v for n, v in original.items()}
    write_gguf(tmp_path / "small.gguf", SMALL, tensors, {n: quantization for n, v in original.items() if v.ndim == 2})
    loaded = parameter(load_model(str(tmp_path / "small.gguf"), "float32"), "embedding")
    assert np.abs(loaded - original["token_embd.weight"]).max() < tolerance


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_blocks_of_4_bits_are_served_as_they_are(tmp_path, kind):
    """Layers in 4 bits, the embedding in Q8_0: with int4 the weights are those of the file, rows of q and k in order."""
    config = ModelConfig("llama", 64, 256, 256, 1, 4, 2, 64, 1e-6, RopeConfig(), 64, tie_embeddings=True)
    tensors = {name: values for name, values in small_tensors().items() if "_norm" not in name or "attn_norm" in name}
    tensors |= {"blk.0.ffn_norm.weight": np.ones(256, np.float32), "output_norm.weight": np.ones(256, np.float32)}
    kinds = {n: GGMLQuantizationType[kind] for n, values in tensors.items() if values.ndim == 2}
    kinds["token_embd.weight"] = GGMLQuantizationType.Q8_0
    tensors |= {name: quants.quantize(tensors[name], of) for name, of in kinds.items()}
    write_gguf(tmp_path / "small.gguf", config, tensors, kinds)
    floats = named_parameters(load_model(str(tmp_path / "small.gguf"), "float32").params)
    blocks = named_parameters(load_model(str(tmp_path / "small.gguf"), "bfloat16", "int4").params)
    in_blocks = {name for name, value in blocks.items() if value.dtype == np.uint8}
    maps = ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down")
    assert in_blocks == {"lm_head.weight", *(f"layers.0.{name}.weight" for name in maps)}
    for name in in_blocks:
        value = floats["embedding" if name == "lm_head.weight" else name]
        np.testing.assert_array_equal(dequantize_blocks(blocks[name], value.shape[1]), value)
    down = np.asarray(dequantize_blocks(blocks["layers.0.feed_forward.down.weight"], 256))
    np.testing.assert_array_equal(down, quants.dequantize(tensors["blk.0.ffn_down.weight"], GGMLQuantizationType[kind]))


@pytest.fixture(params=["llama3", "smollm2", "qwen2", "qwen3"])
def family_gguf(request, tmp_path) -> tuple[str, Path]:
    """A fixture's Hugging Face folder as a GGUF file in float32."""
    folder = FAMILIES / request.param
    config = open_huggingface(folder).config
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        for name, values in load_file(shard).items():
            values = values.astype(np.float32)
            if config.family == "llama" and ".q_proj" in name:
                values = interleaved(values, config.num_q_heads)
            if config.family == "llama" and ".k_proj" in name:
                values = interleaved(values, config.num_kv_heads)
            tensors[gguf_name(name)] = values
    write_gguf(tmp_path / "model.gguf", config, tensors)
    return request.param, tmp_path / "model.gguf"


def test_a_family_has_the_parameters_of_its_hugging_face_folder(family_gguf):
    name, file = family_gguf
    ours, theirs = load_model(str(file), "float32"), load_model(str(FAMILIES / name), "float32")
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    for field in ("family", "head_dim", "tie_embeddings", "qkv_bias", "qk_norm", "sliding_window", "max_context"):
        assert getattr(ours.config, field) == getattr(theirs.config, field), field


def test_llama3_scaling_becomes_frequency_factors(tmp_path):
    config = open_huggingface(FAMILIES / "llama3").config
    tensors = {"token_embd.weight": np.zeros((config.vocab_size, config.hidden_size), np.float32)}
    write_gguf(tmp_path / "model.gguf", config, tensors)
    rope = open_gguf(tmp_path / "model.gguf").config.rope
    assert isinstance(rope.scaling, FrequencyFactors)
    expected = inverse_frequencies(config.rope, config.head_dim)
    np.testing.assert_allclose(inverse_frequencies(rope, config.head_dim), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({}, None),
        ({"scaling.factor": 4.0}, LinearScaling(4.0)),
        ({"scaling.factor": 1.0}, None),
        ({"scale_linear": 4.0}, LinearScaling(4.0)),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, LinearScaling(4.0)),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
    ],
)
def test_a_rope_factor_without_a_type_scales_linearly(tmp_path, metadata, scaling):
    named = {f"qwen3.rope.{name}": value for name, value in metadata.items()}
    write_gguf(tmp_path / "small.gguf", SMALL, small_tensors(), metadata=named)
    assert open_gguf(tmp_path / "small.gguf").config.rope.scaling == scaling


def test_the_tokenizer_is_read_from_the_metadata(tmp_path):
    metadata = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.chat_template.tool_use": "{{ tools }}"}
    write_gguf(tmp_path / "small.gguf", SMALL, small_tensors(), metadata=metadata)
    source = load_model(str(tmp_path / "small.gguf"), "float32").tokenizer_source
    assert isinstance(source.tokenizer, GGUFTokenizer)
    assert (source.tokenizer.model, source.tokenizer.pre) == ("gpt2", "smollm")
    assert source.tokenizer.tokens[63] == "token63"
    assert source.tokenizer.merges == ("t o", "to k")
    assert (source.bos_id, source.eos_ids, source.add_bos) == (1, (0, 5), True)
    assert source.special_tokens == {"bos_token": "token1", "eos_token": "token0"}
    assert (source.chat_template, source.tool_template) == ("{{ messages }}", "{{ tools }}")


@pytest.mark.parametrize(
    ("named", "control", "ids"),
    [
        ({}, {}, (0,)),
        ({"eot": 5, "eom": 6}, {}, (0, 5, 6)),
        ({}, {7: "<|im_start|>"}, (0,)),
        ({"eot": 8}, {7: "<|endoftext|>", 8: "<|im_end|>"}, (0, 8, 7)),
        # However many there are, requests keep stop ids of their own.
        ({"eom": 9}, {5: "<EOT>", 6: "</s>", 7: "<|eot_id|>", 8: "<|end|>", 9: "<|eom_id|>"}, (0, 9, 5, 6)),
    ],
)
def test_a_sequence_ends_at_the_ids_that_are_named_and_at_control_tokens_that_are_known_to_end_one(
    tmp_path, named, control, ids
):
    metadata = {f"tokenizer.ggml.{name}_token_id": id for name, id in named.items()}
    write_gguf(tmp_path / "small.gguf", SMALL, small_tensors(), metadata=metadata, control=control)
    assert open_gguf(tmp_path / "small.gguf").config.eos_ids == ids


@pytest.mark.parametrize("kind", [TokenType.NORMAL, TokenType.USER_DEFINED])
def test_a_token_that_is_known_to_end_a_sequence_is_a_control_token_whatever_the_file_calls_it(tmp_path, kind):
    tokens = {7: "<|im_end|>", 8: "<|im_start|>"}
    write_gguf(tmp_path / "small.gguf", SMALL, small_tensors(), control=tokens, control_type=kind)
    source = open_gguf(tmp_path / "small.gguf").tokenizer_source
    assert isinstance(source.tokenizer, GGUFTokenizer)
    assert source.eos_ids == (0, 7)
    assert source.tokenizer.token_types[6:9] == (1, TokenType.CONTROL, kind)


@pytest.fixture
def small_file(tmp_path) -> Path:
    write_gguf(tmp_path / "small.gguf", SMALL, small_tensors())
    return tmp_path / "small.gguf"


@pytest.mark.parametrize("keep", [0, 3, 10, 24, 40, 300, 1500, 3000])
def test_a_file_cut_off_in_the_header_is_refused(small_file, keep):
    small_file.write_bytes(small_file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"small\.gguf"):
        load_model(str(small_file), "float32")


def test_a_file_cut_off_in_the_data_names_the_tensor(small_file):
    small_file.write_bytes(small_file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"small\.gguf: tensor output_norm\.weight .* truncated"):
        load_model(str(small_file), "float32")


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (0, "<I", 0, "is not a GGUF file"),
        (4, "<I", 99, "version 99"),
        (8, "<Q", 2**63, "tensors, more than fit"),
        (16, "<Q", 2**63, "metadata values, more than fit"),
        (24, "<Q", 2**63, "truncated, or its length"),
    ],
)
def test_a_wrong_number_in_the_header_is_refused_before_anything_is_allocated(small_file, offset, form, value, message):
    data = bytearray(small_file.read_bytes())
    struct.pack_into(form, data, offset, value)
    small_file.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(small_file), "float32")


@pytest.mark.parametrize(
    ("at", "form", "value", "message"),
    [
        (4, "<Q", 2**62, r"tensor token_embd\.weight of shape \(64, 4611686018427387904\)"),
        (4, "<Q", 2**63 + 256, r"tensor token_embd\.weight of shape"),
        (20, "<I", 250, r"tensor token_embd\.weight has the unknown type 250"),
        (24, "<Q", 2**63, r"tensor token_embd\.weight .* wrong shape or offset"),
        (0, "<I", 900, r"tensor token_embd\.weight has 900 dimensions"),
    ],
)
def test_a_wrong_entry_in_the_tensor_table_names_the_tensor(small_file, at, form, value, message):
    data = bytearray(small_file.read_bytes())
    # An entry: name, number of dimensions (4 bytes), dimensions (8 each), type (4), offset (8).
    start = data.index(b"token_embd.weight") + len(b"token_embd.weight")
    struct.pack_into(form, data, start + at, value)
    small_file.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(small_file), "float32")


def test_a_missing_a_misshapen_and_a_needless_tensor_are_named(tmp_path):
    file, tensors = tmp_path / "small.gguf", small_tensors()
    without = {name: values for name, values in tensors.items() if name != "blk.0.ffn_up.weight"}
    write_gguf(file, SMALL, without)
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight is missing"):
        load_model(str(file), "float32")
    write_gguf(file, SMALL, {**tensors, "blk.0.attn_k.weight": np.zeros((64, 256), np.float32)})
    with pytest.raises(CheckpointError, match=r"k_proj\.weight has shape \(64, 256\).* \(128, 256\)"):
        load_model(str(file), "float32")
    write_gguf(file, SMALL, {**tensors, "blk.0.attn_q.bias": np.zeros(256, np.float32)})
    with pytest.raises(CheckpointError, match=r"q_proj\.bias has no place"):
        load_model(str(file), "float32")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"qwen3.block_count": 10**9}, "tensors for 1000000000 layers"),
        ({"qwen3.embedding_length": 2**32 - 1}, "hidden_size"),
        ({"qwen3.attention.head_count": 0}, "head_count is 0"),
        ({"qwen3.attention.head_count": "four"}, "head_count is not of type int"),
        ({"qwen3.rope.dimension_count": 32}, "rope.dimension_count of 32"),
        ({"qwen3.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"qwen3.rope.scaling.type": "linear"}, "rope.scaling.factor is missing"),
        ({"qwen3.expert_count": 8}, "experts"),
        ({"split.count": 3}, "one of several split files"),
        ({"general.architecture": "mamba"}, "architecture 'mamba'"),
        ({"tokenizer.ggml.eos_token_id": 64}, r"eos_token_id must be in \[0, 63\], got 64"),
        ({"tokenizer.ggml.padding_token_id": 64}, "padding_token_id is 64 of 64"),
        ({"general.alignment": 0}, "alignment is 0"),
    ],
)
def test_metadata_that_does_not_fit_is_refused_by_name(tmp_path, metadata, message, monkeypatch):
    # The writer refuses a key twice; here the later one is meant to win.
    add = GGUFWriter.add_key_value

    def replace(writer, key, value, kind, *rest, **options):
        for shard in writer.kv_data:
            shard.pop(key, None)
        add(writer, key, value, kind, *rest, **options)

    monkeypatch.setattr(GGUFWriter, "add_key_value", replace)
    write_gguf(tmp_path / "small.gguf", SMALL, small_tensors(), metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(tmp_path / "small.gguf"), "float32")
