"""What distinguishes one model of the Llama family from another, as data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3")


class UnsupportedModel(ValueError):
    """A model that this package does not implement; the message names the part that it lacks."""


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every angle divided by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between them."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int
    """Tokens of context that the model was first trained with."""


@dataclass(frozen=True)
class FrequencyFactors:
    """A divisor for each of the head_dim / 2 frequencies: the form in which GGUF files keep a scaling."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | FrequencyFactors
_SCALINGS = {kind.__name__: kind for kind in (LinearScaling, Llama3Scaling, FrequencyFactors)}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding."""

    theta: float = 10000.0
    """Base of the wavelengths."""
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A model of the Llama family. Sizes are in elements."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_context: int
    """Tokens of prompt and output together."""
    tie_embeddings: bool
    """The lm head is the embedding."""
    qkv_bias: bool = False
    """The q, k and v projections have a bias (Qwen2)."""
    qk_norm: bool = False
    """q and k are normed in each head before they are rotated (Qwen3)."""
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window - 1` before it; None sees all."""
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UnsupportedModel(f"architecture {self.family!r} is not one of {', '.join(FAMILIES)}")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_q_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_context"):
            value = getattr(self, name)
            if not 1 <= value <= 2**31 - 1:
                raise UnsupportedModel(f"{name} must be in [1, 2^31 - 1], got {value}")
        # A token that is never drawn ends nothing, and the masks of constraints have no place for it.
        for name, id in (("bos_token_id", self.bos_id), *(("eos_token_id", id) for id in self.eos_ids)):
            if id is not None and not 0 <= id < self.vocab_size:
                raise UnsupportedModel(f"{name} must be in [0, {self.vocab_size - 1}], got {id}")
        if self.num_q_heads % self.num_kv_heads:
            raise UnsupportedModel(f"{self.num_q_heads} query heads do not share {self.num_kv_heads} key heads evenly")
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim must be even, got {self.head_dim}")
        scaling = self.rope.scaling
        if isinstance(scaling, FrequencyFactors) and len(scaling.factors) != self.head_dim // 2:
            raise UnsupportedModel(f"{len(scaling.factors)} frequency factors for a head_dim of {self.head_dim}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UnsupportedModel(f"sliding_window must be at least 1, got {self.sliding_window}")

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_q_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    def to_json(self) -> dict[str, Any]:
        """As plain data; the kind of rope scaling is its class name under `kind`."""
        data = asdict(self)
        if self.rope.scaling is not None:
            data["rope"]["scaling"]["kind"] = type(self.rope.scaling).__name__
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_json`. Raises UnsupportedModel where a field is missing, unknown or out of range."""
        try:
            fields = with_tuples(data)
            rope = with_tuples(fields.pop("rope"))
            scaling = rope.pop("scaling")
            if scaling is not None:
                scaling = with_tuples(scaling)
                scaling = _SCALINGS[scaling.pop("kind")](**scaling)
            return ModelConfig(**fields, rope=RopeConfig(**rope, scaling=scaling))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedModel(f"is not a model configuration: {error}") from None


def with_tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass from JSON, which has lists where it has tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
