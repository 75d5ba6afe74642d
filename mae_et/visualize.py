"""Pictures of what the model sees and what it makes of it.

Shapes: n images, C channels, S px.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae_et.lowfreq import crop_and_normalize
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.targets import denormalize_patches, patchify, unpatchify

GAP, HEADER, LINE = 4, 22, 15  # px
FOOTER_FONT = 11
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


def ladder(
    model: MaskedAutoencoder,
    image: Tensor,
    bandwidths: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    mask_ratio: float = 0.75,
    centered: bool = True,
    seed: int = 0,
    title: str = "",
    tile: int = 160,
) -> Image.Image:
    """Draws one image at each bandwidth: what the model gets of it, what stays after masking, what the model makes of that.

    Args:
        model: in eval mode.
        image: [C, S, S] uint8.
        bandwidths: in px, multiples of the patch size, at most S; a row for each.
        mean, std, mask_ratio, centered, seed: as in `reconstruct`.
        title: the line at the top.
        tile: px of each picture.
    """
    rows = [
        list(reconstruct(model, image[None], b, mean, std, mask_ratio, centered, seed).values()) for b in bandwidths
    ]
    original, *kinds = ([pictures[0] for pictures in column] for column in zip(*rows, strict=True))
    norm_pix = model.norm_pix_loss
    captions = (
        "low frequencies",
        f"masked {mask_ratio:.0%}",
        "reconstruction (norm-pix)" if norm_pix else "reconstruction",
    )
    footer = "Visible patches are shown as they went in."
    return picture_grid(
        {"original": [original[0]] + [None] * (len(rows) - 1), **dict(zip(captions, kinds, strict=True))},
        f"{NORM_PIX_FOOTER} {footer}" if norm_pix else footer,
        tile,
        title,
        [f"bandwidth {b} px" for b in bandwidths],
    )


def picture_grid(
    columns: Mapping[str, Tensor | Sequence[Tensor | None]],
    footer: str = "",
    tile: int = 160,
    title: str = "",
    row_names: Sequence[str] = (),
) -> Image.Image:
    """Lays pictures out, a row for each image and a captioned column for each kind.

    Args:
        columns: caption -> [n, C, side, side] in [0, 1], or n pictures of [C, side, side]; sides may differ, and None
            leaves a place free.
        footer: a line below, broken where it is too long.
        tile: px of each picture.
        title: a line above.
        row_names: n words at the left, written upwards.
    """
    n = len(next(iter(columns.values())))
    left_edge = HEADER if row_names else GAP
    width = left_edge + len(columns) * (tile + GAP)
    lines = _broken(footer, width - 2 * GAP)
    top_edge = GAP + HEADER * (2 if title else 1)
    bottom = top_edge + n * (tile + GAP)
    sheet = Image.new("RGB", (width, bottom + (len(lines) * LINE + GAP if lines else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        font = _font_that_fits(draw, title, width - 2 * GAP)
        draw.text((width / 2, GAP + HEADER / 2), title, "black", font, anchor="mm")
    for i, line in enumerate(lines):
        draw.text(
            (width / 2, bottom + (i + 0.5) * LINE), line, "black", ImageFont.load_default(FOOTER_FONT), anchor="mm"
        )
    for j, name in enumerate(row_names):
        strip = Image.new("RGB", (tile, HEADER), "white")
        brush = ImageDraw.Draw(strip)
        brush.text((tile / 2, HEADER / 2), name, "black", _font_that_fits(brush, name, tile), anchor="mm")
        sheet.paste(strip.transpose(Image.Transpose.ROTATE_90), (0, top_edge + j * (tile + GAP)))
    for i, (caption, pictures) in enumerate(columns.items()):
        left = left_edge + i * (tile + GAP)
        font = _font_that_fits(draw, caption, tile)
        draw.text((left + tile / 2, top_edge - HEADER / 2), caption, fill="black", font=font, anchor="mm")
        for j, picture in enumerate(pictures):
            if picture is not None:
                shown = to_pil(picture).resize((tile, tile), Image.Resampling.BICUBIC)
                sheet.paste(shown, (left, top_edge + j * (tile + GAP)))
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


def _broken(text: str, width: int) -> list[str]:
    """Breaks a text into lines of at most `width` px, between words."""
    draw, font = ImageDraw.Draw(Image.new("L", (1, 1))), ImageFont.load_default(FOOTER_FONT)
    lines: list[str] = []
    for word in text.split():
        if lines and draw.textlength(f"{lines[-1]} {word}", font=font) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _font_that_fits(draw: ImageDraw.ImageDraw, text: str, width: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    for size in (13, 12, 11, 10, 9, 8):
        font = ImageFont.load_default(size)
        if draw.textlength(text, font=font) <= width:
            break
    return font


def draw_confusion(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draws a confusion matrix, rows normalised, with names where they fit.

    Args:
        confusion: [C, C] counts, a row for each true class.
        class_names: C names.
        path: of the PNG.
    """
    from matplotlib.figure import Figure  # a second to import, and only needed here

    num_classes = len(class_names)
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(12.0, 3.5 + 0.35 * num_classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if num_classes <= 50:
        axes.set_xticks(range(num_classes), class_names, rotation=90)
        axes.set_yticks(range(num_classes), class_names)
    if num_classes <= 20:
        for i in range(num_classes):
            for j in range(num_classes):
                share = float(shares[i, j])
                axes.text(
                    j,
                    i,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if share > 0.6 else "white",
                )
    figure.savefig(path, dpi=120)
