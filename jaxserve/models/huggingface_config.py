"""From the config.json of a Hugging Face folder to a `ModelConfig`. What is not implemented is refused by name."""

import math
from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import (
    FAMILIES,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    UnsupportedModel,
)

_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    "quantization_config": None,
}
"""Fields of which one value is implemented."""


def from_hf_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """The model that a config.json describes, with the end-of-sequence ids of generation_config.json added.

    Takes the layout of transformers 4 (`rope_theta`, `rope_scaling`) and of 5 (`rope_parameters`). Raises
    UnsupportedModel naming the field and its value.
    """
    if "auto_map" in config:
        raise UnsupportedModel("auto_map asks for code from the model's folder, which is never run")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModel(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
    for architecture in _list(config, "architectures"):
        if not str(architecture).endswith("ForCausalLM"):
            raise UnsupportedModel(f"architecture {architecture!r} is not a causal language model")
    for name, value in _FIXED.items():
        if config.get(name, value) not in (value, None):
            raise UnsupportedModel(f"{name} of {config[name]!r} is not supported, only {value!r}")
    hidden_size, num_q_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim = config.get("head_dim") or (128 if family == "qwen3" else hidden_size // num_q_heads)
    return ModelConfig(
        family=family,
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=_size(config, "num_hidden_layers"),
        num_q_heads=num_q_heads,
        num_kv_heads=_size(config, "num_key_value_heads", num_q_heads),
        head_dim=_size({"head_dim": head_dim}, "head_dim"),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope=_rope(config),
        max_context=_size(config, "max_position_embeddings"),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(config, family),
        eos_ids=_merged_ids(config.get("eos_token_id"), (generation or {}).get("eos_token_id")),
        bos_id=next(iter(_merged_ids(config.get("bos_token_id"), (generation or {}).get("bos_token_id"))), None),
    )


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise UnsupportedModel(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def _list(config: Mapping[str, Any], name: str) -> list[Any]:
    value = config.get(name) or []
    if not isinstance(value, list):
        raise UnsupportedModel(f"{name} must be a list, got {value!r}")
    return value


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    # Where a folder has both, transformers 5 takes nothing of `rope_parameters`, its `rope_theta` neither.
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise UnsupportedModel(f"rope parameters must be an object, got {parameters!r}")
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            raise UnsupportedModel(f"rope parameters by kind of layer ({name}) are not supported")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor of {parameters['partial_rotary_factor']!r} is not supported")
    theta = _number({"rope_theta": parameters.get("rope_theta", config.get("rope_theta"))}, "rope_theta", 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    scaling: RopeScaling | None = None
    if kind == "linear":
        scaling = LinearScaling(_number(parameters, "factor"))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=_number(parameters, "factor"),
            low_freq_factor=_number(parameters, "low_freq_factor"),
            high_freq_factor=_number(parameters, "high_freq_factor"),
            # Where both have it, transformers takes the one beside the parameters.
            original_context=_size({**parameters, **config}, "original_max_position_embeddings"),
        )
    elif kind != "default":
        raise UnsupportedModel(f"rope scaling {kind!r} is not supported (default, linear and llama3 are)")
    return RopeConfig(theta, scaling)


def _sliding_window(config: Mapping[str, Any], family: str) -> int | None:
    """One window for all layers. Qwen uses one only with `use_sliding_window`, from layer `max_window_layers` on. A
    Mistral with `layer_types` is Ministral to transformers, whose layers may differ as Qwen's."""
    window = config.get("sliding_window", 4096)  # as transformers, unless it is null
    if family == "llama" or window is None:
        return None
    if family != "mistral" and not config.get("use_sliding_window", False):
        return None
    num_layers = _size(config, "num_hidden_layers")
    first = 0 if family == "mistral" else config.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise UnsupportedModel(f"max_window_layers must be a whole number, got {first!r}")
    # One of each kind that there is: a damaged file may claim a billion layers.
    by_number = ["full_attention"] * (first > 0) + ["sliding_attention"] * (first < num_layers)
    kinds = _list(config, "layer_types") or by_number
    if all(kind == "sliding_attention" for kind in kinds):
        return _size({"sliding_window": window}, "sliding_window")
    if all(kind == "full_attention" for kind in kinds):
        return None
    raise UnsupportedModel("layer_types: sliding and full attention in one model are not supported")


def _merged_ids(*given: int | list[int] | None) -> tuple[int, ...]:
    """Token ids, each either absent, one, or a list, in order and without repetition."""
    ids: list[int] = []
    for value in given:
        ids += value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
        raise UnsupportedModel(f"token ids must be whole numbers, got {ids!r}")
    return tuple(dict.fromkeys(ids))
