"""Pictures of what the model sees and what it makes of it.

Shapes: n images, C channels, S px.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae_et.lowfreq import crop_and_normalize
from mae_et.models.hog import hog_cells
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
        the model's; predictions of normalised patches get the original patches' own mean and deviation back. Where the
        model predicts HOG descriptors, the last two are `hog_picture`s of the target and of the prediction.
    """
    device = model.cls_token.device
    inputs = crop_and_normalize(images.to(device), bandwidth, mean, std, centered)
    patch, grid = model.patch_size, (bandwidth // model.patch_size,) * 2
    noise = torch.rand(len(images), grid[0] * grid[1], generator=torch.Generator().manual_seed(seed)).to(device)
    predicted, mask = model.predict(inputs, mask_ratio, noise)
    originals = patchify(inputs, patch)
    removed = mask[..., None].bool()

    def shown(patches: Tensor) -> Tensor:
        pixels = unpatchify(patches, patch, grid).float()
        scale = torch.tensor(std, device=device).view(-1, 1, 1)
        return (pixels * scale + torch.tensor(mean, device=device).view(-1, 1, 1)).clamp(0, 1).cpu()

    grey = patchify(((GREY - torch.tensor(mean)) / torch.tensor(std)).view(1, -1, 1, 1).expand(inputs.shape), patch)
    pictures = {
        "original": images.float().cpu() / 255,
        f"input, bandwidth {bandwidth}": shown(originals),
        f"masked {mask_ratio:.0%}": shown(torch.where(removed, grey.to(device), originals)),
    }
    predicted = predicted.float()
    if model.target == "hog":
        target = model.targets(inputs)
        filled = torch.where(removed, predicted, target)
        drawn = (hog_picture(hog_cells(patches, model.in_chans, grid)) for patches in (target, filled))
        return pictures | dict(zip(("HOG target", "HOG prediction"), drawn, strict=True))
    if model.norm_pix_loss:
        predicted = denormalize_patches(predicted, originals)
    return pictures | {"reconstruction": shown(torch.where(removed, predicted, originals))}


def hog_picture(cells: Tensor, side: int = 15) -> Tensor:
    """Draws descriptors as strokes along the edges, the brighter the stronger.

    Args:
        cells: [n, C, 9, rows, columns], as from `hog_cells`; drawn are the means over the channels.
        side: px of a cell.
    Returns:
        [n, 1, rows side, columns side] in [0, 1].
    """
    strengths = cells.float().cpu().mean(dim=1).clamp(0, 1)
    n, num_bins, rows, columns = strengths.shape
    offsets = torch.arange(side) - (side - 1) / 2
    down, right = offsets[:, None], offsets[None, :]
    angles = (torch.arange(num_bins) + 0.5) * math.pi / num_bins  # of the gradients; edges are at right angles to them
    distances = (right * angles.sin().view(-1, 1, 1) + down * angles.cos().view(-1, 1, 1)).abs()
    inside = (right**2 + down**2).sqrt() <= side / 2
    strokes = (1.2 - distances).clamp(0, 1) * inside  # [9, side, side], about 2 px wide
    glyphs = (strengths[..., None, None] * strokes[:, None, None]).amax(dim=1)
    return glyphs.permute(0, 1, 3, 2, 4).reshape(n, 1, rows * side, columns * side)


NORM_PIX_FOOTER = "The model predicts normalised patches: each removed patch got its own mean and contrast back."
HOG_FOOTER = "The model predicts histograms of oriented gradients, drawn as strokes along the edges."


def target_footer(model: MaskedAutoencoder) -> str:
    """Says what the reader of a picture has to know of the model's target."""
    if model.target == "hog":
        return HOG_FOOTER
    return NORM_PIX_FOOTER if model.norm_pix_loss else ""


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
    captions = ["low frequencies", f"masked {mask_ratio:.0%}"]
    if model.target == "hog":
        captions += ["HOG target", "HOG prediction"]
    else:
        captions.append("reconstruction (norm-pix)" if model.norm_pix_loss else "reconstruction")
    footer = "Visible patches are shown as they went in."
    if model.target == "hog":
        footer = "Visible patches are shown as they went in, in the prediction with their target."
    return picture_grid(
        {"original": [original[0]] + [None] * (len(rows) - 1), **dict(zip(captions, kinds, strict=True))},
        f"{target_footer(model)} {footer}".strip(),
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
    """Draws a confusion matrix as shares of the true class, with the classes' names where there is room for them.

    Colours go with the square root of the share, so that what is rarely taken for something else can still be seen.

    Args:
        confusion: [C, C] counts, a row for each true class; a row without images is grey.
        class_names: C names.
        path: of the PNG.
    """
    from matplotlib.colors import PowerNorm  # a second to import, and only needed here
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    num_classes, counts = len(class_names), confusion.double()
    shares = (counts / counts.sum(dim=1, keepdim=True)).numpy()  # 0 / 0 is NaN, which is drawn in the colour for that
    side = min(12.0, 2.5 + 0.45 * num_classes)
    figure = Figure(figsize=(side + 1.2, side))
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="none")
    bar = figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.045, pad=0.02)
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    total = int(counts.sum())
    right = float(counts.diagonal().sum()) / max(1, total)
    axes.set_title(f"{right:.2%} of {total} images are right", fontsize=10)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    cell = 0.77 * side * 72 / num_classes  # points
    if num_classes <= 120:
        names = [name if len(name) <= 24 else f"{name[:23]}…" for name in class_names]
        names = [name.replace("$", r"\$") for name in names]  # which would begin a formula
        axes.set_xticks(range(num_classes), names, rotation=90, fontsize=min(10, 0.85 * cell))
        axes.set_yticks(range(num_classes), names, fontsize=min(10, 0.85 * cell))
        axes.tick_params(length=2 if num_classes <= 50 else 0)
    if num_classes <= 20:
        for i, j in np.argwhere(shares >= 0.005).tolist():
            color = "white" if shares[i, j] > 0.35 else "black"
            axes.text(j, i, f"{shares[i, j]:.0%}", ha="center", va="center", fontsize=8, color=color)
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.15)
