"""`jaxserve info`: what a checkpoint holds and what it will take, read from its headers."""

import math
from dataclasses import asdict

from jaxserve.commands.start import CommandError, model_errors
from jaxserve.config import EngineConfig


def stored_dtype(model: str) -> dict[str, str]:
    """`dtype` of a folder of the native format; nothing of another format, which is cast as it is loaded. Raises
    CommandError."""
    with model_errors():
        from jaxserve.checkpoints.description import resolve
        from jaxserve.checkpoints.native_folder import DESCRIPTION, describe_folder

        path = resolve(model)
        return {"dtype": describe_folder(path)[2]} if (path / DESCRIPTION).exists() else {}


def describe(config: EngineConfig) -> dict[str, dict[str, object]]:
    """The model's configuration, its tokenizer, and sizes under `config`. No weights are read. Raises CommandError."""
    with model_errors():
        from jaxserve.checkpoints.description import as_stored, describe_model
        from jaxserve.device.allocation import allocate, attention_needs, context_pages, device_limit, full_context
        from jaxserve.device.kv_cache import page_bytes
        from jaxserve.device.roofline import model_cost
        from jaxserve.device.sharding import Placement
        from jaxserve.models.llama import abstract_llama
        from jaxserve.models.parameters import named_parameters
        from jaxserve.tokenizing.tokenizer import Tokenizer
        from pallas_kernels import select
        from pallas_kernels.native_build import NativeUnavailable

        config = as_stored(config)
        model, source = describe_model(config.model)
        tokenizer = Tokenizer.from_source(source)
        # Quantized weights have scales, a head of their own and, of 4 bits, two in an element: those are no parameters.
        _, floating = abstract_llama(model, config.dtype)
        placement = Placement.of_replica(0, config.replicas, config.tensor_parallel)
        placement.check(model)
        # On a CPU the form that needs no compiler: both hold a page in as many bytes.
        named = config.attention or ("cpu_xla" if placement.platform == "cpu" else None)
        try:
            attention = select(placement.platform, named, attention_needs(model, config))
            a_page = page_bytes(model, attention, config)
        except (NativeUnavailable, ValueError) as error:
            raise CommandError(str(error)) from error
        weights = model_cost(model, config.dtype, config.quantization, 0, config.tensor_parallel).weight_bytes
        allocation = allocate(model, attention, config, limit=device_limit(placement), weights=weights)
    context = full_context(model, config)
    pages = context_pages(model, config)
    return {
        "model": asdict(model),
        "tokenizer": {
            "kind": type(source.tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_ids": list(tokenizer.eos_ids),
            "chat_template": source.chat_template is not None,
        },
        "weights": {
            "dtype": config.dtype,
            "quantization": config.quantization,
            "parameters": sum(math.prod(array.shape) for array in named_parameters(floating).values()),
            "bytes": model_cost(model, config.dtype, config.quantization, 0, 1).weight_bytes,
        },
        "cache": {
            "page_tokens": config.page_size,
            "page_bytes": a_page,
            "context_tokens": context,
            "context_pages": pages,
            "context_bytes": pages * a_page,
        },
        "allocation": {
            "device_bytes": allocation.limit,
            "slots": config.slots,
            "pages": allocation.num_pages - 1,
            "pages_for_all_slots": allocation.wanted_pages - 1,
            "cache_bytes": allocation.cache,
        },
    }


def as_text(description: dict[str, dict[str, object]]) -> str:
    """One line a fact, under its heading."""
    lines = []
    for heading, facts in description.items():
        lines.append(heading)
        lines += [f"  {name:18} {_shown(value)}" for name, value in facts.items()]
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
