"""Compares a state dict with a model key by key, for every loader of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Misfit:
    """Holds the keys that do not fit, with their shapes. Is false if all keys fit.

    Args:
        missing: keys of the model that the state does not have.
        unexpected: keys of the state that the model does not have.
        other_shape: keys of both with different shapes, with both shapes.
        keys_missing: `missing` without the shapes.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    other_shape: list[str] = field(default_factory=list)
    keys_missing: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.other_shape)

    def __str__(self) -> str:
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.other_shape))
        return "; ".join(f"{len(keys)} {kind}: {some(keys)}" for kind, keys in kinds if keys)


def misfit(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], may_miss: Callable[[str], bool] = lambda key: False
) -> Misfit:
    """Compares a state dict with that of a model.

    Args:
        state: the tensors to load, under the names of the model.
        own: the state dict of the model.
        may_miss: returns whether a key may be absent from the state.
    """
    found = Misfit()
    for key, value in own.items():
        if key not in state:
            if not may_miss(key):
                found.missing.append(f"{key} {tuple(value.shape)}")
                found.keys_missing.append(key)
        elif state[key].shape != value.shape:
            found.other_shape.append(f"{key} {tuple(state[key].shape)}, the model has {tuple(value.shape)}")
    found.unexpected = [f"{key} {tuple(value.shape)}" for key, value in state.items() if key not in own]
    return found


def some(keys: Sequence[str]) -> str:
    """Joins the first six keys, followed by an ellipsis if there are more."""
    return ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
