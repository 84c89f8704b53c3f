"""Configuration of an engine: one frozen dataclass, each field with its unit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Dtype = Literal["bfloat16", "float32"]
KVDtype = Literal["bfloat16", "float32", "int8", "float8_e4m3fn"]
Quantization = Literal["none", "int8", "int4"]
Matmul = Literal["xla", "native"]
CoreKind = Literal["thread", "process"]

_NUMBERS: Mapping[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    int | None: (int | None, "a whole number or None"),
    float: (int | float, "a number"),
    float | None: (int | float | None, "a number or None"),
}
"""By a field's type: the types of its values, and what they are called."""


@dataclass(frozen=True)
class EngineConfig:
    """Everything that shapes an engine. Nothing is read from the environment."""

    model: str = "smollm2-135m"
    """A name (smollm2-135m), a Hugging Face folder, a `.gguf` file, or what `jaxserve convert` wrote."""
    served_model_name: str | None = None
    """The name clients use; None takes the last part of `model`."""
    dtype: Dtype = "bfloat16"
    """Of weights, activations and the KV cache. Norms, softmax and logits are float32 in either."""
    kv_dtype: KVDtype | None = None
    """Of the KV cache; None takes `dtype`. The 8-bit ones keep a float32 scale for each token and head."""
    quantization: Quantization = "none"
    """int8: weights per output channel, activations per row. int4: blocks of 32 inputs with a scale and a minimum, of 4
    bits a weight and 8 in the lm head; GGUF's Q4_0 and Q4_1, in the lm head Q8_0, as they are, other weights rounded;
    for few requests on a CPU. none: what `jaxserve convert` has quantized stays so."""
    tensor_parallel: int = 1
    """Devices that share each weight and the KV cache; divides the model's kv heads."""
    replicas: int = 1
    """Copies of the model, each with devices, slots and a cache of its own; a request goes to the least loaded."""
    slots: int = 32
    """Requests that decode together, in rows of a step."""
    small_slots: int = 8
    """Rows of the step used while no more than this many requests are live; 8 is the least that is fast and exact where
    XLA multiplies. With native products a single request has a step of one row."""
    prefill_chunks: tuple[int, ...] = (128, 512)
    """Prompt tokens that ride along in one mixed step; a larger chunk while as many requests wait for their prompt as
    decode."""
    max_context: int | None = None
    """Tokens of prompt and output together; None takes the model's limit, at most 8,192."""
    page_size: int = 16
    """Tokens in a page of the KV cache."""
    num_pages: int | None = None
    """Pages of the KV cache; None takes enough for every slot at full context, within `cache_bytes`."""
    cache_bytes: int | None = None
    """Upper bound of the KV cache of a device where `num_pages` is None, in bytes; None takes what an accelerator's
    memory has left, and 2 GiB on a CPU."""
    host_cache_bytes: int = 1 << 30
    """Bound of host memory for the pages of preempted requests, in bytes; what finds no room there is recomputed."""
    attention: str | None = None
    """Name of the attention implementation; None takes the platform's own."""
    matmul: Matmul | None = None
    """How weights are multiplied: by XLA, or on a CPU by the native kernel; None takes that where it can be built."""
    prefix_cache: bool = True
    """Reuse the pages of equal prompt prefixes."""
    pipeline_depth: int = 1
    """Steps dispatched ahead of the one being read; 0 is synchronous."""
    publish_ahead: int = 8
    """Steps whose tokens may wait to be delivered; past it the step loop waits, so that none is ever much older."""
    max_waiting: int = 1024
    """Requests accepted beyond those that hold a slot; past it QueueFull is raised."""
    max_tenant_requests: int | None = None
    """Requests of one tenant in flight at once, where a server has keys; None bounds only all tenants together."""
    watchdog_seconds: float | None = 120.0
    """Seconds without a finished step, while there is work, after which the engine is unhealthy: more than its longest
    step takes. None watches nothing."""
    max_n: int = 128
    """Most sequences of one request; never more than slots and queue hold together."""
    resumable_streams: int = 256
    """Streams kept for readers to take up again; past it those that ended first are forgotten, then QueueFull is
    raised."""
    resumable_bytes: int = 64 << 20
    """Bound of what the events of those streams take, about; past it the ended ones go, then the largest is aborted."""
    resumable_seconds: float = 60.0
    """Seconds for which a stream is kept after its end, and for which a request runs on without a reader."""
    stream_buffer_tokens: int = 8192
    """Tokens a client may leave unread before its request is aborted."""
    max_constraint_bytes: int = 64 << 10
    """Longest constraint (schema, regular expression, grammar, all choices together) of a request, in bytes."""
    constraint_cpu_seconds: float = 1.0
    """Processor time that compiling a request's constraint may take, in seconds; past it the request is refused."""
    core: CoreKind = "thread"
    """Where the step loop runs: a thread of this process, or a process of its own (a served engine)."""
    simulated_step_ms: float | None = None
    """Replaces the device by one that takes this many milliseconds a step and gives scripted tokens."""
    compilation_cache: str | None = "~/.cache/jaxserve/xla"
    """Folder of the persistent compilation cache; None turns it off."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field and the limit."""
        for field in fields(self):
            if field.type in _NUMBERS:
                value, (kind, what) = getattr(self, field.name), _NUMBERS[field.type]
                _require(field.name, value, isinstance(value, kind) and not isinstance(value, bool), what)
        counts = ("slots", "small_slots", "page_size", "publish_ahead", "max_n", "stream_buffer_tokens")
        for name in (*counts, "tensor_parallel", "replicas", "resumable_streams", "resumable_bytes"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("resumable_seconds", self.resumable_seconds, self.resumable_seconds > 0, "above 0")
        watched = self.watchdog_seconds
        _require("watchdog_seconds", watched, watched is None or watched > 0, "above 0")
        _require("cache_bytes", self.cache_bytes, self.cache_bytes is None or self.cache_bytes >= 1, "at least 1")
        _require("max_constraint_bytes", self.max_constraint_bytes, self.max_constraint_bytes >= 1, "at least 1")
        seconds = self.constraint_cpu_seconds
        _require("constraint_cpu_seconds", seconds, 0 < seconds <= 60, "above 0 and at most 60")
        simulated = self.simulated_step_ms
        _require(
            "simulated_step_ms", simulated, simulated is None or 0 <= simulated < math.inf, "finite and at least 0"
        )
        _require("pipeline_depth", self.pipeline_depth, 0 <= self.pipeline_depth <= 4, "in [0, 4]")
        for name in ("max_waiting", "host_cache_bytes"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        chunks = self.prefill_chunks
        _require(
            "prefill_chunks", chunks, chunks and chunks[0] >= 1 and sorted(set(chunks)) == list(chunks), "ascending"
        )
        for name, least in (("max_context", 2), ("num_pages", 2), ("max_tenant_requests", 1)):
            value = getattr(self, name)
            _require(name, value, value is None or value >= least, f"at least {least}")
        _require("dtype", self.dtype, self.dtype in ("bfloat16", "float32"), "bfloat16 or float32")
        kv_dtypes = (None, *get_args(KVDtype))
        _require("kv_dtype", self.kv_dtype, self.kv_dtype in kv_dtypes, "bfloat16, float32, int8 or float8_e4m3fn")
        _require("quantization", self.quantization, self.quantization in get_args(Quantization), "none, int8 or int4")
        _require("matmul", self.matmul, self.matmul in (None, "xla", "native"), "xla or native")
        packs = self.matmul == "native" and self.tensor_parallel > 1
        _require("matmul", self.matmul, not packs, f"xla with tensor_parallel of {self.tensor_parallel}")
        _require("core", self.core, self.core in ("thread", "process"), "thread or process")

    @property
    def total_slots(self) -> int:
        """Slots of all replicas."""
        return self.slots * self.replicas

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "EngineConfig":
        """The configuration that `dataclasses.asdict` and JSON made of one."""
        return EngineConfig(**{**data, "prefill_chunks": tuple(data["prefill_chunks"])})


def _require(name: str, value: object, holds: object, what: str) -> None:
    if not holds:
        raise ValueError(f"{name}: must be {what}, got {value!r}")
