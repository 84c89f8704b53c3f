"""The parameters of a model by name, as `layers.3.attention.qkv.weight`."""

from collections.abc import Mapping
from typing import Any

from flax import nnx


def named_parameters(params: nnx.State) -> dict[str, Any]:
    """Each parameter's array, or its shape and dtype where `params` is abstract. They are shared, not copied."""
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(params)}


def with_values(structure: nnx.State, values: Mapping[str, Any]) -> nnx.State:
    """`structure`, abstract or not, with each parameter's array from `values`. Raises KeyError for one missing."""
    variables = nnx.to_flat_state(structure)
    return nnx.from_flat_state({path: variable.replace(values[_name(path)]) for path, variable in variables})


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
