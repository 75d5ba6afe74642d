"""Lets the data preprocessors of mmdet and mmseg normalize images of any number of channels.

mmengine refuses a mean that has not 1 or 3 values, although its arithmetic holds for any number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.model import ImgDataPreprocessor


def allow_any_channels() -> None:
    """Replaces the constructor of mmengine's ImgDataPreprocessor, once."""
    original = ImgDataPreprocessor.__init__
    if not hasattr(original, "__wrapped__"):
        ImgDataPreprocessor.__init__ = _with_any_channels(original)


def _with_any_channels(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def construct(
        self: ImgDataPreprocessor,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if mean is None or std is None or len(mean) in (1, 3) or len(mean) != len(std):
            return original(self, mean, std, *args, **kwargs)
        original(self, [0.0], [1.0], *args, **kwargs)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), False)
        return None

    return construct
