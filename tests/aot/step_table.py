"""The engine's steps over published shapes and devices, compiled: what `test_steps.py` holds the committed table to.

    python tests/aot/step_table.py [CELL ...]       writes step_table.json anew, or the named cells of it

A cell takes half a minute to two, for two or three programs of a whole model.
"""

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxserve.config import EngineConfig
from jaxserve.device.ahead_of_time import choose_figures, forward_figures, placement_on
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


def floors(cell: Cell) -> dict[str, float]:
    """By hand: operations of the products, and bytes of weights that a step reads, on each device. Attention comes on
    top, by the live context, which no compiler knows."""
    cost = cell.cost()
    decode, mixed = (n * cost.flops_per_token + SLOTS * cost.flops_per_logits for n in (SLOTS, SLOTS + CHUNK))
    return {"decode_flops": decode, "mixed_flops": mixed, "bytes": cost.read_bytes}


def figures(cell: Cell, pages: int | None = None) -> dict[str, object]:
    """Of the cell's decode step, its mixed step and its choose; None takes as many pages as the device has room for."""
    jax.config.update("jax_platforms", "cpu")
    model, config, device, attention = PUBLISHED[cell.model], cell.config, DEVICES[cell.device], cell.attention()
    placement = placement_on(device, cell.tensor_parallel)
    weights = cell.cost().weight_bytes
    if pages is None:
        pages = allocate(model, attention, config, limit=device.memory, weights=weights).num_pages
    return {
        "attention": attention.name,
        "pages": pages,
        "weights": weights,
        "floors": floors(cell),
        "decode": forward_figures(model, config, attention, placement, pages, 0).to_json(),
        "mixed": forward_figures(model, config, attention, placement, pages, CHUNK).to_json(),
        "choose": choose_figures(model, config, placement).to_json(),
    }


if __name__ == "__main__":
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for name in sys.argv[1:] or CELLS:
        print(name, file=sys.stderr, flush=True)
        table[name] = figures(CELLS[name])
        TABLE.write_text(json.dumps({name: table[name] for name in CELLS if name in table}, indent=1) + "\n")
