"""timm's Swin Transformer with the windows of the published detectors and segmentors.

Shapes: N images, H x W the grid of a stage, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn


class PadThenShiftBlock(SwinTransformerBlock):
    """timm's block, but the grid is padded to whole windows before it is shifted.

    timm shifts first, so that the shift wraps around the unpadded grid. The two orders differ on every grid that is not a
    multiple of the window.
    Source: Swin Transformer (arXiv 2103.14030), as in its code for object detection and in mmdetection.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        return super()._attn(x)[:, :height, :width].contiguous()


def pad_before_shift(model: nn.Module) -> None:
    """Makes every Swin block of a model pad before it shifts, in place."""
    for module in model.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = PadThenShiftBlock  # timm gives no other way in: it builds the blocks itself
