"""timm's Swin Transformer with the windows of the published detectors and segmentors.

Shapes: N images, H x W the grid of a stage, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition
from torch import Tensor, nn

from downstream.backbones.attention import merge, partition


class PadThenShiftBlock(SwinTransformerBlock):
    """timm's block, but the grid is padded to whole windows before it is shifted.

    timm shifts first, so that the shift wraps around the unpadded grid. The two orders differ on every grid that is not a
    multiple of the window.
    Source: Swin Transformer (arXiv 2103.14030), as in its code for object detection and in mmdetection.
    """

    def _attn(self, x: Tensor) -> Tensor:
        (height, width), (rows, columns), shift = x.shape[1:3], self.window_size, self.shift_size
        down, across = (height + rows - 1) // rows, (width + columns - 1) // columns
        x = F.pad(x, (0, 0, 0, across * columns - width, 0, down * rows - height))
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        mask = self.shift_mask(x) if getattr(self, "dynamic_mask", False) else self.attn_mask
        windows, counts = partition(x, rows, columns)
        attended = self.attn(windows.flatten(1, 2), mask=mask).view(windows.shape)
        x = merge(attended, counts, (x.shape[0], x.shape[1], x.shape[2], x.shape[3]))
        if any(shift):
            x = torch.roll(x, tuple(shift), (1, 2))
        return x[:, :height, :width].contiguous()

    def shift_mask(self, x: Tensor) -> Tensor | None:
        """Returns timm's `get_attn_mask`, computed without assignments to slices, which torch.export traces for minutes.

        Args:
            x: [N, H, W, C], padded to whole windows and shifted.
        Returns:
            [windows, tokens, tokens]: 0, or -100 where two tokens were not neighbours before the shift; None without a shift.
        """
        if not any(self.shift_size):
            return None
        regions = []
        for size, window, shift in zip(x.shape[1:3], self.window_size, self.shift_size, strict=True):
            position = torch.arange(size, device=x.device)
            regions.append((position >= size - window).to(x.dtype) + (position >= size - shift).to(x.dtype))
        region = (3 * regions[0][:, None] + regions[1])[None, ..., None]
        tokens = window_partition(region, self.window_size).view(-1, self.window_area)
        return -100.0 * (tokens[:, None] != tokens[:, :, None]).to(x.dtype)


def pad_before_shift(model: nn.Module) -> None:
    """Makes every Swin block of a model pad before it shifts, in place."""
    for module in model.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = PadThenShiftBlock  # timm gives no other way in: it builds the blocks itself
