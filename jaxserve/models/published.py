"""Shapes of published models, by name: for plans and measurements that need no weights.

As in the config.json that each publisher put beside the weights on Hugging Face.
"""

from jaxserve.models.config import Llama3Scaling, ModelConfig, RopeConfig


def _llama3(hidden: int, wide: int, layers: int, q_heads: int, head_dim: int, factor: float, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=wide,
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=8,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope=RopeConfig(500000.0, Llama3Scaling(factor, 1.0, 4.0, 8192)),
        max_context=131072,
        tie_embeddings=tied,
        eos_ids=(128001, 128008, 128009),
        bos_id=128000,
    )


def _qwen3(hidden: int, wide: int, layers: int, q_heads: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=wide,
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope=RopeConfig(1000000.0),
        max_context=40960,
        tie_embeddings=tied,
        qk_norm=True,
        eos_ids=(151645, 151643),
    )


PUBLISHED: dict[str, ModelConfig] = {
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 64, 32.0, True),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 128, 8.0, False),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 128, 8.0, False),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
    "smollm2-135m": ModelConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_q_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(100000.0),
        max_context=8192,
        tie_embeddings=True,
        eos_ids=(2, 0),
        bos_id=1,
    ),
}
