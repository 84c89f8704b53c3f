"""Dataclasses that JAX may take apart and rebuild."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import jax


def pytree_dataclass[Cls](cls: type[Cls]) -> type[Cls]:
    """Registers a frozen dataclass, all of whose fields are arrays or trees of them, as a pytree.

    JAX rebuilds trees of anything (shapes, shardings, placeholders) in place of arrays, so rebuilding skips `__init__`,
    where run-time checks of the fields' types would refuse them.
    """
    names = [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]

    def flatten(value: object) -> tuple[list[tuple[Any, object]], None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names], None

    def unflatten(_: None, children: Iterable[object]) -> object:
        value = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls
