"""What of a state dict does not fit a model, key by key: the one place that says so, for all that loads weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Misfit:
    """Keys that do not fit, with their shapes; false where all do.

    Args:
        missing: keys that the model has and the state lacks.
        unexpected: keys that the state has and the model lacks.
        other_shape: keys of both whose shapes differ, with the two.
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
    """Compares a state dict with a model's own.

    Args:
        state: what is to be loaded, under the model's names.
        own: the model's state dict.
        may_miss: tells whether the state may lack a key.
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
    """Names the first few of many."""
    return ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
