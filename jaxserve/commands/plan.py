"""`jaxserve plan`: whether a model fits a device that is not there yet, and the speed that no engine can exceed."""

from dataclasses import asdict, replace
from typing import Any

from jaxserve.commands.start import CommandError, model_errors
from jaxserve.config import EngineConfig
from jaxserve.device.allocation import allocate, attention_needs, context_pages, full_context
from jaxserve.device.devices import DEVICES, Device
from jaxserve.device.errors import AllocationError
from jaxserve.device.kv_cache import page_bytes
from jaxserve.device.roofline import ModelCost, model_cost
from jaxserve.device.sharding import check_shares
from jaxserve.models.config import ModelConfig
from pallas_kernels import PagedAttention, select

Plan = dict[str, Any]

_SHARES = (1, 2, 4, 8, 16, 32)
"""Numbers of devices that are tried for what would fit."""


def make_plan(model: ModelConfig, config: EngineConfig, device: Device, count: int) -> Plan:
    """What `config` comes to on `count` devices, `config.tensor_parallel` of which share each replica.

    Sizes are in bytes, of one device where they are under `memory`; floors are least times. Raises CommandError where
    the configuration itself cannot be: too few devices, or heads that they cannot share.
    """
    if count % config.tensor_parallel:
        raise CommandError(f"tensor_parallel: must divide the {count} devices, got {config.tensor_parallel}")
    attention, cost = _attention_and_cost(model, config, device)
    replicas = count // config.tensor_parallel
    plan: Plan = {
        "device": {**asdict(device), "count": count},
        "tensor_parallel": config.tensor_parallel,
        "replicas": replicas,
        "attention": attention.name,
        "weights_bytes": model_cost(model, config.dtype, config.quantization, 0, 1).weight_bytes,
        "cache_bytes_per_token": page_bytes(model, attention, replace(config, tensor_parallel=1)) / config.page_size,
        "context": full_context(model, config),
    }
    try:
        plan["memory"] = _memory(model, config, device, attention, cost)
        plan["fits"] = True
    except AllocationError as error:
        return {**plan, "fits": False, "reason": str(error), "would_fit": would_fit(model, config, device)}
    most_rows = plan["memory"]["requests_at_full_context"]
    return {**plan, **_floors(config, device, cost, plan["context"], replicas, most_rows)}


def would_fit(model: ModelConfig, config: EngineConfig, device: Device) -> list[str]:
    """Options that make it fit, the nearest first: more devices to share it, int8 weights, another kind of device."""
    found: dict[tuple[str, str], str] = {}
    tries = [(device, shares, config.quantization) for shares in _SHARES if shares > config.tensor_parallel]
    tries += [(device, shares, "int8") for shares in _SHARES if config.quantization == "none"]
    tries += [(other, config.tensor_parallel, config.quantization) for other in DEVICES.values() if other != device]
    for kind, shares, quantization in tries:
        changed = replace(config, tensor_parallel=shares, quantization=quantization)
        if (kind.kind, quantization) not in found and _fits(model, changed, kind):
            options = f"--device {kind.kind}-{shares} --tensor-parallel {shares}"
            options += f" --quantization {quantization}" if quantization != config.quantization else ""
            found[kind.kind, quantization] = options
    return list(found.values())


def _fits(model: ModelConfig, config: EngineConfig, device: Device) -> bool:
    try:
        _memory(model, config, device, *_attention_and_cost(model, config, device))
    except (AllocationError, CommandError):
        return False
    return True


def _attention_and_cost(model: ModelConfig, config: EngineConfig, device: Device) -> tuple[PagedAttention, ModelCost]:
    """Raises CommandError where devices of the kind cannot have the model so."""
    try:
        check_shares(model, config.tensor_parallel)
        attention = select(device.platform, config.attention, attention_needs(model, config, device.jax_kind))
        per_token = page_bytes(model, attention, config) / config.page_size
    except ValueError as error:
        raise CommandError(str(error)) from error
    return attention, model_cost(model, config.dtype, config.quantization, per_token, config.tensor_parallel)


def _memory(
    model: ModelConfig, config: EngineConfig, device: Device, attention: PagedAttention, cost: ModelCost
) -> dict[str, int]:
    """Who has how much of a device. Raises AllocationError unless one request at full context has room."""
    found = allocate(model, attention, config, limit=device.memory, weights=cost.weight_bytes)
    pages = context_pages(model, config)
    if found.num_pages - 1 < pages:
        raise AllocationError(
            f"does not fit: {found.num_pages - 1} pages of {config.page_size} tokens have room, and one request at "
            f"full context takes {pages}"
        )
    return {
        **asdict(found),
        "cache": found.cache,
        "tokens": (found.num_pages - 1) * config.page_size,
        "requests_at_full_context": (found.num_pages - 1) // pages,
    }


def _floors(config: EngineConfig, device: Device, cost: ModelCost, context: int, replicas: int, most_rows: int) -> Plan:
    decode = []
    for rows in sorted({1, 8, 32, config.slots}):
        if rows > config.slots:
            continue
        seconds = cost.decode_floor(device, rows, context)
        decode.append(
            {
                "rows": rows,
                "context": context,
                "fits": rows <= most_rows,
                "bytes": cost.decode_bytes(rows, context),
                "flops": cost.decode_flops(rows, context),
                "floor_ms": seconds * 1e3,
                "tokens_per_s": replicas * rows / seconds,
            }
        )
    seconds = cost.prefill_floor(device, context)
    prefill = {"tokens": context, "floor_ms": seconds * 1e3, "tokens_per_s": replicas * context / seconds}
    return {"decode": decode, "prefill": prefill}


def plan_text(plan: Plan) -> str:
    """The plan to be read."""
    device = plan["device"]
    lines = [
        f"{plan['replicas']} x {plan['tensor_parallel']} {device['kind']}, each {_size(device['memory'])} of memory "
        f"for programs, {device['bandwidth'] / 1e9:,.0f} GB/s, {device['flops'] / 1e12:,.0f} TFLOP/s in bfloat16, "
        f"{device['int8_ops'] / 1e12:,.0f} in int8",
        f"weights {_size(plan['weights_bytes'])}; cache {plan['cache_bytes_per_token'] / 1024:,.1f} KiB a token; "
        f"attention {plan['attention']}",
    ]
    if not plan["fits"]:
        fitting = [f"  {options}" for options in plan["would_fit"]] or ["  nothing that was tried"]
        return "\n".join([*lines, plan["reason"], "would fit:", *fitting])
    memory = plan["memory"]
    parts = ", ".join(
        f"{name} {_size(memory[name])}" for name in ("weights", "state", "temporaries", "headroom", "cache")
    )
    lines += [
        f"fits; of each device: {parts}",
        f"{memory['num_pages'] - 1:,} pages, {memory['tokens']:,} tokens: "
        f"{memory['requests_at_full_context']} requests at the full context of {plan['context']:,} at once",
        f"floor of a decode step at {plan['context']:,} tokens of context (bytes over bandwidth, or operations):",
    ]
    lines += [
        f"  {row['rows']:>5} rows  {row['floor_ms']:9.3f} ms  at most {row['tokens_per_s']:>10,.0f} tokens/s"
        + ("" if row["fits"] else "  (their cache does not fit)")
        for row in plan["decode"]
    ]
    prefill = plan["prefill"]
    lines.append(
        f"floor of a prompt of {prefill['tokens']:,} tokens: {prefill['floor_ms']:.1f} ms, "
        f"at most {prefill['tokens_per_s']:,.0f} tokens/s"
    )
    return "\n".join(lines + [_compiled_text(step) for step in plan.get("compiled", ())])


def _compiled_text(step: Plan) -> str:
    name = f"{step['program']} of {step['rows']} rows"
    name += f" and {step['chunk']} prompt tokens" if step["chunk"] else ""
    talk = ", ".join(f"{count} {kind}" for kind, count in step["collectives"].items()) or "none"
    text = f"compiled {name}: temporaries {_size(step['temporaries'])}, collectives {talk}"
    if step["cache"]:
        text += ", cache in place" if step["cache_is_aliased"] and not step["cache_copies"] else ", CACHE COPIED"
    return text + (f", {step['recomputed']} OPERATIONS COMPUTED TWICE" if step["recomputed"] else "")


def compiled_steps(model: ModelConfig, config: EngineConfig, device: Device, num_pages: int) -> list[dict[str, object]]:
    """What the compiler says of the largest decode and mixed step, as `ahead_of_time.StepFigures` has it. Raises
    CommandError where there is no compiler for the device."""
    import jax

    from jaxserve.device.ahead_of_time import CannotCompile, choosing_figures, forward_figures, placement_on

    jax.config.update("jax_platforms", "cpu")  # or the compilers' plugins look for devices
    attention, _ = _attention_and_cost(model, config, device)
    try:
        placement = placement_on(device, config.tensor_parallel)
    except CannotCompile as error:
        raise CommandError(str(error)) from error
    chunks = (0, max(config.prefill_chunks))
    figures = [forward_figures(model, config, attention, placement, num_pages, chunk) for chunk in chunks]
    return [asdict(found) for found in (*figures, *choosing_figures(model, config, placement))]


def plan(config: EngineConfig, device: Device, count: int, *, compiles: bool = False) -> Plan:
    """`make_plan` of the model that `config.model` names, with what its compiled steps need if `compiles`. No weights
    are read. Raises CommandError."""
    with model_errors():
        from jaxserve.checkpoints.description import as_stored, describe_config

        model, config = describe_config(config.model), as_stored(config)
    found = make_plan(model, config, device, count)
    if compiles and found["fits"]:
        found["compiled"] = compiled_steps(model, config, device, found["memory"]["num_pages"])
    return found


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
