"""The Llama family as one definition: Llama 2 and 3, Mistral, SmolLM2, Qwen2 and Qwen3 differ in `ModelConfig` only.

Attention is a callback: the step gives one that threads the paged KV cache through, a test a dense one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import LINEAR, Quantization, RMSNorm, Rotation, initial, project, rotate, rotation

Attend = Callable[[int, Array, Array, Array], Array]
"""(layer, q [token q_head head_dim], k [token kv_head head_dim], v as k) -> [token q_head head_dim]. q and k are normed
and rotated, not scaled."""


class Attention(nnx.Module):
    """Projections around the `attend` callback; q, k and v are one product."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, quantization: Quantization, rngs: nnx.Rngs | None):
        linear = LINEAR[quantization]
        self.config = config
        rows = config.q_size + 2 * config.kv_size
        self.qkv = linear(config.hidden_size, rows, dtype, rngs, bias=config.qkv_bias)
        self.out = linear(config.q_size, config.hidden_size, dtype, rngs)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def __call__(
        self, x: Float[Array, "token hidden"], by: Rotation, attend: Attend, layer: int
    ) -> Float[Array, "token hidden"]:
        q_size, kv_size, head_dim = self.config.q_size, self.config.kv_size, self.config.head_dim
        q, k, v = (
            part.reshape(x.shape[0], -1, head_dim) for part in jnp.split(self.qkv(x), (q_size, q_size + kv_size), -1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.out(attend(layer, rotate(q, by), rotate(k, by), v).reshape(x.shape[0], q_size))


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202); gate and up are one product."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, quantization: Quantization, rngs: nnx.Rngs | None):
        linear = LINEAR[quantization]
        self.gate_up = linear(config.hidden_size, 2 * config.intermediate_size, dtype, rngs)
        self.down = linear(config.intermediate_size, config.hidden_size, dtype, rngs)

    def __call__(self, x: Float[Array, "token hidden"]) -> Float[Array, "token hidden"]:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, quantization: Quantization, rngs: nnx.Rngs | None):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, dtype, quantization, rngs)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config, dtype, quantization, rngs)

    def __call__(
        self, x: Float[Array, "token hidden"], by: Rotation, attend: Attend, layer: int
    ) -> Float[Array, "token hidden"]:
        x = x + self.attention(self.attention_norm(x), by, attend, layer)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nnx.Module):
    """A decoder of the Llama family.

    Args:
        config: the model.
        dtype: of the embedding, the activations and, where not quantized, the weights.
        quantization: int8 makes each linear map an `Int8Linear`, the lm head too (of a tied one, an int8 copy).
        rngs: of random initial weights; None makes them zero.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str | jnp.dtype,
        quantization: Quantization = "none",
        *,
        rngs: nnx.Rngs | None = None,
    ):
        dtype = jnp.dtype(dtype)
        self.config = config
        self.embedding = nnx.Param(initial(rngs, (config.vocab_size, config.hidden_size), dtype))
        self.layers = nnx.List(DecoderLayer(config, dtype, quantization, rngs) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        own_head = not config.tie_embeddings or quantization != "none"
        head = LINEAR[quantization]
        self.lm_head = head(config.hidden_size, config.vocab_size, dtype, rngs) if own_head else None

    def hidden(
        self, token_ids: Int32[Array, " token"], positions: Int32[Array, " token"], attend: Attend
    ) -> Float[Array, "token hidden"]:
        """The final normed hidden state of each token. Tokens meet only in `attend`."""
        x = self.embedding[...][token_ids]
        by = rotation(positions, self.config.rope, self.config.head_dim)
        for index, layer in enumerate(self.layers):
            x = layer(x, by, attend, index)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "token hidden"]) -> Float32[Array, "token vocab"]:
        """Scores of the next token, in float32."""
        if self.lm_head is None:
            return project(hidden, self.embedding[...], None, jnp.dtype(jnp.float32))
        return self.lm_head(hidden, jnp.dtype(jnp.float32))


def abstract_llama(
    config: ModelConfig, dtype: str | jnp.dtype, quantization: Quantization = "none"
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure, and its parameters as shapes and dtypes: nothing is allocated."""
    model = nnx.eval_shape(lambda: Llama(config, dtype, quantization))
    graphdef, params = nnx.split(model)
    return graphdef, params
