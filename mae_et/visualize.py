"""Pictures of what the model sees and what it makes of it.

Shapes: n images, C channels, S px.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae_et.lowfreq import crop_and_normalize
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.targets import denormalize_patches, patchify, unpatchify

GAP, HEADER = 4, 22  # px
GREY = 0.5


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder,
    images: Tensor,
    bandwidth: int,
    mean: Sequence[float],
    std: Sequence[float],
    mask_ratio: float = 0.75,
    centered: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Masks images and lets the model fill them in.

    Args:
        model: in eval mode.
        images: [n, C, S, S] uint8.
        bandwidth: B in px.
        mean, std: of the training data.
        mask_ratio: fraction of the patches removed.
        centered: as in `low_frequency_crop`.
        seed: of the masks.
    Returns:
        Pictures by caption, in the order to show them, [n, C, side, side] in [0, 1]. In the last, the removed patches are
        the model's; predictions of normalised patches get the original patches' own mean and deviation back.
    """
    device = model.cls_token.device
    inputs = crop_and_normalize(images.to(device), bandwidth, mean, std, centered)
    patch, grid = model.patch_size, (bandwidth // model.patch_size,) * 2
    noise = torch.rand(len(images), grid[0] * grid[1], generator=torch.Generator().manual_seed(seed)).to(device)
    predicted, mask = model.predict(inputs, mask_ratio, noise)
    originals = patchify(inputs, patch)
    predicted = predicted.float()
    if model.norm_pix_loss:
        predicted = denormalize_patches(predicted, originals)
    removed = mask[..., None].bool()

    def shown(patches: Tensor) -> Tensor:
        pixels = unpatchify(patches, patch, grid).float()
        scale = torch.tensor(std, device=device).view(-1, 1, 1)
        return (pixels * scale + torch.tensor(mean, device=device).view(-1, 1, 1)).clamp(0, 1).cpu()

    grey = patchify(((GREY - torch.tensor(mean)) / torch.tensor(std)).view(1, -1, 1, 1).expand(inputs.shape), patch)
    return {
        "original": images.float().cpu() / 255,
        f"input, bandwidth {bandwidth}": shown(originals),
        f"masked {mask_ratio:.0%}": shown(torch.where(removed, grey.to(device), originals)),
        "reconstruction": shown(torch.where(removed, predicted, originals)),
    }


NORM_PIX_FOOTER = "The model predicts normalised patches: each removed patch got its own mean and contrast back."


def picture_grid(columns: dict[str, Tensor], footer: str = "", tile: int = 160) -> Image.Image:
    """Lays pictures out, a row for each image and a captioned column for each kind.

    Args:
        columns: caption -> [n, C, side, side] in [0, 1]; sides may differ.
        footer: a line below.
        tile: px of each picture.
    """
    n = len(next(iter(columns.values())))
    width, height = len(columns) * (tile + GAP) + GAP, n * (tile + GAP) + GAP + HEADER
    sheet = Image.new("RGB", (width, height + (HEADER if footer else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text(
        (width / 2, height + HEADER / 2 - GAP), footer, "black", _font_that_fits(draw, footer, width), anchor="mm"
    )
    for i, (caption, pictures) in enumerate(columns.items()):
        left = GAP + i * (tile + GAP)
        font = _font_that_fits(draw, caption, tile)
        draw.text((left + tile / 2, GAP + HEADER / 2), caption, fill="black", font=font, anchor="mm")
        for j, picture in enumerate(pictures):
            sheet.paste(
                to_pil(picture).resize((tile, tile), Image.Resampling.BICUBIC), (left, GAP + HEADER + j * (tile + GAP))
            )
    return sheet


def to_pil(picture: Tensor) -> Image.Image:
    """[C, H, W] in [0, 1] -> RGB."""
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels)


def save_picture(picture: Image.Image, path: Path) -> np.ndarray:
    """Writes a PNG and returns it as [H, W, 3] uint8, for TensorBoard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return np.asarray(picture)


def _font_that_fits(draw: ImageDraw.ImageDraw, text: str, width: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    for size in (13, 12, 11, 10, 9, 8):
        font = ImageFont.load_default(size)
        if draw.textlength(text, font=font) <= width:
            break
    return font
