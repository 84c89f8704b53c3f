"""config.json of published models of each family, and what is refused."""

from typing import Any

import pytest

from jaxserve.models.config import LinearScaling, Llama3Scaling, ModelConfig, RopeConfig, UnsupportedModel
from jaxserve.models.huggingface_config import from_hf_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008],
}
SCALING = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096}


def test_llama3_in_the_layout_of_transformers_4_and_of_5():
    scaling = Llama3Scaling(32.0, 1.0, 4.0, 8192)
    old = from_hf_config({**LLAMA, "rope_scaling": SCALING})
    parameters = {**SCALING, "rope_theta": 500000.0}
    new = from_hf_config({**LLAMA, "rope_theta": None, "rope_parameters": parameters})
    assert old == new
    assert old.rope == RopeConfig(500000.0, scaling)
    assert (old.family, old.head_dim, old.num_kv_heads, old.tie_embeddings) == ("llama", 64, 8, True)


def test_rope_scaling_comes_before_rope_parameters():
    parameters = {"rope_type": "default", "rope_theta": 20000.0}
    both = {**LLAMA, "rope_parameters": parameters, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert from_hf_config(both).rope == RopeConfig(500000.0, LinearScaling(4.0))
    without = {name: value for name, value in both.items() if name != "rope_theta"}
    assert from_hf_config(without).rope == RopeConfig(10000.0, LinearScaling(4.0))
    assert from_hf_config({**both, "rope_scaling": None}).rope == RopeConfig(20000.0)


def test_the_original_context_beside_the_rope_parameters_comes_before_theirs():
    scaled = {**LLAMA, "rope_scaling": SCALING, "original_max_position_embeddings": 4096}
    assert from_hf_config(scaled).rope.scaling == Llama3Scaling(32.0, 1.0, 4.0, 4096)


def test_llama2_without_optional_fields():
    config = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "rope_theta")}
    config |= {"tie_word_embeddings": False, "eos_token_id": 2, "rope_scaling": {"type": "linear", "factor": 2.0}}
    model = from_hf_config(config)
    assert model.num_kv_heads == 32
    assert model.rope == RopeConfig(10000.0, LinearScaling(2.0))
    assert model.eos_ids == (2,)


def test_end_of_sequence_ids_of_both_files_are_merged():
    model = from_hf_config(LLAMA, {"eos_token_id": [128001, 128009]})
    assert model.eos_ids == (128001, 128008, 128009)
    assert model.bos_id == 128000


def test_mistral_has_a_window_and_its_own_head_size():
    config = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    assert from_hf_config({**config, "head_dim": 128}).head_dim == 128
    assert from_hf_config(config).sliding_window == 4096
    assert from_hf_config({**config, "sliding_window": None}).sliding_window is None


def test_a_window_that_is_not_named_is_that_of_transformers():
    mistral = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert from_hf_config(mistral).sliding_window == 4096
    qwen2 = {name: value for name, value in QWEN2.items() if name != "sliding_window"} | {"use_sliding_window": True}
    assert from_hf_config({**qwen2, "max_window_layers": 0}).sliding_window == 4096
    assert from_hf_config({**qwen2, "num_hidden_layers": 28}).sliding_window is None
    with pytest.raises(UnsupportedModel, match="sliding and full attention"):
        from_hf_config({**qwen2, "num_hidden_layers": 29})


def test_mistral_has_its_window_where_its_layer_types_say_so():
    config = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    assert from_hf_config({**config, "layer_types": ["sliding_attention"] * 16}).sliding_window == 4096
    assert from_hf_config({**config, "layer_types": ["full_attention"] * 16}).sliding_window is None
    with pytest.raises(UnsupportedModel, match="sliding and full attention"):
        from_hf_config({**config, "layer_types": ["full_attention", "sliding_attention"] * 8})


def test_qwen2_has_biases_and_a_window_only_where_it_is_used():
    assert from_hf_config(QWEN2).qkv_bias
    assert from_hf_config(QWEN2).sliding_window is None
    used = {**QWEN2, "use_sliding_window": True}
    assert from_hf_config({**used, "max_window_layers": 16}).sliding_window is None
    assert from_hf_config({**used, "max_window_layers": 0}).sliding_window == 4096
    with pytest.raises(UnsupportedModel, match="sliding and full attention"):
        from_hf_config({**used, "max_window_layers": 8})


def test_qwen3_has_normed_heads():
    config = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
    model = from_hf_config(config)
    assert model.qk_norm
    assert not model.qkv_bias
    assert model.head_dim == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3'"),
        ({"model_type": None}, "model_type None"),
        ({"auto_map": {"AutoModel": "code.py"}}, "auto_map"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by kind of layer"),
        ({"hidden_act": "gelu"}, "hidden_act of 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_attention_heads": "32"}, "num_attention_heads"),
        ({"num_key_value_heads": 7}, "32 query heads do not share 7"),
        ({"head_dim": 63}, "head_dim"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"architectures": 1}, "architectures must be a list, got 1"),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": 1}, "layer_types must be a list, got 1"),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": [[]]}, "layer_types"),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": "8"}, "max_window_layers must be a whole number"),
        ({"model_type": "mistral", "sliding_window": 8, "num_hidden_layers": 2**60}, "num_layers must be in"),
        ({"eos_token_id": ["a"]}, "token ids"),
        ({"eos_token_id": [2, 128256]}, r"eos_token_id must be in \[0, 128255\], got 128256"),
        ({"bos_token_id": 128256}, r"bos_token_id must be in \[0, 128255\], got 128256"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(UnsupportedModel, match=message):
        from_hf_config({**LLAMA, **change})


@pytest.mark.parametrize("rope", [{}, {"rope_scaling": SCALING}, {"rope_scaling": {"type": "linear", "factor": 2}}])
def test_a_configuration_survives_json(rope):
    model = from_hf_config({**LLAMA, **rope})
    assert ModelConfig.from_json(model.to_json()) == model


def test_a_damaged_stored_configuration_is_refused():
    data = from_hf_config(LLAMA).to_json()
    with pytest.raises(UnsupportedModel):
        ModelConfig.from_json({**data, "surprise": 1})
    with pytest.raises(UnsupportedModel):
        ModelConfig.from_json({**data, "family": "gpt2"})
    for damaged in (None, {**data, "rope": None}, {**data, "rope": {**data["rope"], "scaling": [1]}}):
        with pytest.raises(UnsupportedModel, match="is not a model configuration"):
            ModelConfig.from_json(damaged)
