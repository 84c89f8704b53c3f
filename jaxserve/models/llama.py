"""The Llama family as one definition: Llama 2 and 3, Mistral, SmolLM2, Qwen2 and Qwen3 differ in `ModelConfig` only.

Attention is a callback: the step gives one over the paged KV cache, a test a dense one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jaxserve.config import Matmul, Quantization
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Linear, LinearForm, RMSNorm, Rotation, project, rotation, split_heads
from jaxserve.models.shards import UNSHARDED, Shards
from pallas_kernels import linear as packed
from pallas_kernels.linear import LiveRows

LayerCache = Any
"""What attention keeps of a layer, a pytree: the paged keys and values in the engine, nothing in a test."""


@runtime_checkable
class Caches(Protocol):
    """What attention keeps of all layers."""

    def layer(self, index: int) -> LayerCache:
        """Of one layer."""
        ...

    def with_layer(self, index: int, cache: LayerCache) -> Any:
        """All of them, with what attention gave back for one."""
        ...


class Uncached:
    """For an `attend` that keeps nothing."""

    def layer(self, index: int) -> None:
        """Nothing."""

    def with_layer(self, index: int, cache: None) -> "Uncached":
        """Nothing still."""
        return self


Attend = Callable[[Array, Array, Array, LayerCache], tuple[Array, LayerCache]]
"""(q [token q_head head_dim], k [token kv_head head_dim], v as k, cache) -> ([token q_head head_dim], cache). q and k
are normed and rotated, not scaled."""


class Attention(nnx.Module):
    """Norm, projections around the `attend` callback, and the residual; q, k and v are one product."""

    def __init__(self, config: ModelConfig, form: LinearForm):
        self.config = config
        rows = config.q_size + 2 * config.kv_size
        self.shards = form.shards
        self.qkv = Linear(config.hidden_size, rows, form, bias=config.qkv_bias, gathers=False)
        self.out = Linear(config.q_size, config.hidden_size, form)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "token hidden"],
        norm: RMSNorm,
        by: Rotation,
        attend: Attend,
        cache: LayerCache,
        live: LiveRows | None,
    ) -> tuple[Float[Array, "token hidden"], LayerCache]:
        """x plus what attention adds to it, and the layer's cache with the tokens in it."""
        qkv = self.qkv(x, norm=norm, live=live)
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        shards = self.shards.count
        q_heads, kv_heads = self.config.num_q_heads // shards, self.config.num_kv_heads // shards
        q, k, v = split_heads(qkv, by, q_heads, kv_heads, norms, matmul=self.qkv.matmul, live=live)
        attended, cache = attend(q, k, v, cache)
        attended = self.shards.gather(attended.reshape(x.shape[0], self.config.q_size // shards))
        return self.out(attended, residual=x, live=live), cache


class FeedForward(nnx.Module):
    """Norm, SwiGLU and the residual; gate and up are one product."""

    def __init__(self, config: ModelConfig, form: LinearForm):
        self.gate_up = Linear(config.hidden_size, config.intermediate_size, form, gated=True)
        self.down = Linear(config.intermediate_size, config.hidden_size, form)

    def __call__(
        self, x: Float[Array, "token hidden"], norm: RMSNorm, live: LiveRows | None
    ) -> Float[Array, "token hidden"]:
        """x plus what the feed-forward adds to it."""
        return self.down(self.gate_up(x, norm=norm, live=live), residual=x, live=live)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward on the residual stream."""

    def __init__(self, config: ModelConfig, form: LinearForm):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, form)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config, form)

    def __call__(
        self,
        x: Float[Array, "token hidden"],
        by: Rotation,
        attend: Attend,
        cache: LayerCache,
        live: LiveRows | None,
    ) -> tuple[Float[Array, "token hidden"], LayerCache]:
        """The residual stream after this layer, and the layer's cache."""
        x, cache = self.attention(x, self.attention_norm, by, attend, cache, live)
        return self.feed_forward(x, self.feed_forward_norm, live), cache


class Llama(nnx.Module):
    """A decoder of the Llama family. Made with zeros for parameters, which a checkpoint gives.

    Args:
        config: the model.
        dtype: of the embedding, the activations and, where not quantized, the weights.
        quantization: int8 makes each linear map int8, the lm head too (of a tied one, an int8 copy). int4 makes each 4
            bits in blocks, the lm head 8.
        matmul: native packs the linear maps, and the embedding where it is also the lm head, for CPU.
        shards: devices that share the model. Parameters are made whole; a call is given each device's share of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        quantization: Quantization = "none",
        matmul: Matmul = "xla",
        *,
        shards: Shards = UNSHARDED,
    ):
        form = LinearForm(jnp.dtype(dtype), quantization, matmul, shards)
        self.config, self.shards = config, shards
        embedding = jnp.zeros((config.vocab_size, config.hidden_size), form.dtype)
        own_head = not config.tie_embeddings or quantization != "none"
        self.packs_embedding = matmul == "native" and not own_head
        self.embedding = nnx.Param(packed.pack(embedding) if self.packs_embedding else embedding)
        self.layers = nnx.List(DecoderLayer(config, form) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, form, block_bits=8) if own_head else None

    def hidden[C: Caches](
        self,
        token_ids: Int32[Array, " token"],
        positions: Int32[Array, " token"],
        attend: Attend,
        caches: C,
        live: LiveRows | None = None,
    ) -> tuple[Float[Array, "token hidden"], C]:
        """The last layer's residual stream, for `logits`, and the caches. Tokens meet only in `attend`.

        `live` names the tokens that count, None for all: the others may cost nothing and give anything finite.
        """

        # All layers look alike: one is traced and called for each, which makes lowering a step three times faster.
        @partial(jax.jit, static_argnums=0)
        def run_layer(graphdef, params, x, by, cache, live):
            return nnx.merge(graphdef, params)(x, by, attend, cache, live)

        if self.packs_embedding:
            x = packed.rows(self.embedding[...], token_ids, self.config.hidden_size)
        else:
            x = self.shards.rows(self.embedding[...], token_ids)
        by = rotation(positions, self.config.rope, self.config.head_dim)
        for index, layer in enumerate(self.layers):
            x, cache = run_layer(*nnx.split(layer), x, by, caches.layer(index), live)
            caches = caches.with_layer(index, cache)
        return x, caches

    def logits(
        self, hidden: Float[Array, "token hidden"], live: LiveRows | None = None
    ) -> Float32[Array, "token vocab"]:
        """Scores of the next token after the final norm, in float32; `hidden` and `live` as of `hidden`."""
        float32 = jnp.dtype(jnp.float32)
        if self.lm_head is not None:
            return self.lm_head(hidden, norm=self.norm, live=live, dtype=float32)
        embedding, vocab_size = self.embedding[...], self.config.vocab_size
        if self.packs_embedding:
            norm = {"norm": self.norm.weight[...], "epsilon": self.norm.epsilon}
            return packed.linear(hidden, embedding, vocab_size, live=live, dtype=float32, **norm)
        return self.shards.gather(project(self.norm(hidden), embedding, None, float32))


def abstract_llama(
    config: ModelConfig,
    dtype: DTypeLike,
    quantization: Quantization = "none",
    matmul: Matmul = "xla",
    shards: Shards = UNSHARDED,
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure, and its parameters as shapes and dtypes: nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: Llama(config, dtype, quantization, matmul, shards=shards)))
