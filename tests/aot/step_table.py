"""The engine's steps over published shapes and devices, compiled: what `test_steps.py` holds the committed table to.

    python tests/aot/step_table.py [CELL ...]       writes step_table.json anew, or the named cells of it

A cell takes half a minute to two, for two programs of a whole model.
"""

import functools
import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxserve.config import EngineConfig
from jaxserve.device.ahead_of_time import choosing_figures, forward_figures, placement_on
from jaxserve.device.allocation import allocate
from jaxserve.device.devices import DEVICES
from jaxserve.device.kv_cache import page_bytes
from jaxserve.device.roofline import ModelCost, model_cost
from jaxserve.models.published import PUBLISHED
from pallas_kernels import AttentionNeeds, select

TABLE = Path(__file__).with_name("step_table.json")
SLOTS, CHUNK, CONTEXT = 64, 512, 8192


@dataclass(frozen=True)
class Cell:
    """A model on devices."""

    model: str
    device: str
    tensor_parallel: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.device}-{self.tensor_parallel}"

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(slots=SLOTS, max_context=CONTEXT, tensor_parallel=self.tensor_parallel)

    @functools.cache  # noqa: B019
    def cost(self) -> ModelCost:
        """What the floors are computed from."""
        model, config = PUBLISHED[self.model], self.config
        per_token = page_bytes(model, self.attention(), config) / config.page_size
        return model_cost(model, config.dtype, config.quantization, per_token, self.tensor_parallel)

    def attention(self):
        return select(DEVICES[self.device].platform, None, AttentionNeeds(self.config.dtype))


CELLS = {
    cell.name: cell
    for cell in (
        *(
            Cell(model, device, shares)
            for model in ("llama-3.1-8b", "qwen3-8b")
            for device, shares in (("v5e", 4), ("v6e", 1), ("v6e", 4), ("tpu7x", 1), ("h100", 1))
        ),
        *(Cell("smollm2-135m", device, 1) for device in ("v5e", "v6e", "tpu7x", "h100")),
    )
}
COVERING = ("llama-3.1-8b v5e-4", "smollm2-135m h100-1")
"""Those that every run takes: one that is shared, and one of each compiler."""


_STATED = re.compile(r"CostEstimate\(flops=(\d+).*?bytes_accessed=(\d+).*?name=(jaxserve_\w+)", re.DOTALL)
"""Operations, bytes and name of a call of a kernel in the text of a jaxpr."""


def floors(cell: Cell) -> dict[str, float]:
    """By hand: operations of the products, and bytes of weights that a step reads, on each device. Attention comes on
    top, by the live context, which no compiler knows."""
    cost = cell.cost()
    decode, mixed = (n * cost.flops_per_token + SLOTS * cost.flops_per_logits for n in (SLOTS, SLOTS + CHUNK))
    return {"decode_flops": decode, "mixed_flops": mixed, "bytes": cost.read_bytes}


def derived(cell: Cell) -> dict[str, object]:
    """What of the cell's figures needs no compiler: of a cell that is older than what made it, these may differ."""
    model, config, attention, weights = PUBLISHED[cell.model], cell.config, cell.attention(), cell.cost().weight_bytes
    pages = allocate(model, attention, config, limit=DEVICES[cell.device].memory, weights=weights).num_pages
    return {"attention": attention.name, "pages": pages, "weights": weights, "floors": floors(cell)}


def stated_work(cell: Cell, chunk: int) -> dict[str, dict[str, int]]:
    """Calls of each TPU kernel in a step, and the operations and bytes of one, as attention is traced now."""
    model, config, attention = PUBLISHED[cell.model], cell.config, cell.attention()
    shape, tokens = jax.ShapeDtypeStruct, SLOTS + chunk
    q_heads, kv_heads = (heads // cell.tensor_parallel for heads in (model.num_q_heads, model.num_kv_heads))
    q, k = (shape((tokens, heads, model.head_dim), config.dtype) for heads in (q_heads, kv_heads))
    cache = attention.cache_layout(2, config.page_size, kv_heads, model.head_dim, config.dtype)
    sizes = ((SLOTS, CONTEXT // config.page_size), (tokens,), (tokens,))
    ints = [shape(size, jnp.int32) for size in sizes]
    attend = functools.partial(attention.write_and_attend, scale=1.0, sliding_window=model.sliding_window)
    calls = _STATED.findall(str(jax.make_jaxpr(attend)(q, k, k, cache, *ints)))
    count = Counter(name for *_, name in calls)
    return {
        name: {"calls": model.num_layers * count[name], "flops": int(flops), "bytes_accessed": int(size)}
        for flops, size, name in calls
    }


def figures(cell: Cell) -> dict[str, object]:
    """Of the forwards of the cell's decode and mixed step, and of the second half of both, with as many pages as the
    device has room for."""
    jax.config.update("jax_platforms", "cpu")
    model, config, attention = PUBLISHED[cell.model], cell.config, cell.attention()
    placement = placement_on(DEVICES[cell.device], cell.tensor_parallel)
    found = derived(cell)
    return found | {
        "decode": asdict(forward_figures(model, config, attention, placement, found["pages"], 0)),
        "mixed": asdict(forward_figures(model, config, attention, placement, found["pages"], CHUNK)),
        "choosing": [asdict(program) for program in choosing_figures(model, config, placement)],
    }


if __name__ == "__main__":
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for name in sys.argv[1:] or CELLS:
        print(name, file=sys.stderr, flush=True)
        table[name] = figures(CELLS[name])
        TABLE.write_text(json.dumps({name: table[name] for name in CELLS if name in table}, indent=1) + "\n")
