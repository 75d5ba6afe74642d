"""Pictures of a masked autoencoder's inputs and predictions, and of confusion matrices.

Shapes: n images, C channels, H x W px.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_et.evaluation.drawing import Drawing, drawing_note
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.hog import hog_cells
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.masks import RANDOM_MASKS, Masks, mask_order, num_uniform
from mae_et.models.sizes import Size, as_size, size_text
from mae_et.models.targets import denormalize_patches, patchify, unpatchify
from mae_et.storage.atomic import atomic_path

if TYPE_CHECKING:  # matplotlib takes a second to import, so the functions that draw import it
    from matplotlib.figure import Figure

TILE, GAP = 1.6, 0.04  # inches: side of a picture of a grid, space between two
FONT_SIZE = 9  # points
GREY = 0.5  # of removed patches


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder,
    images: Tensor,
    size: int | Size,
    mean: Sequence[float],
    std: Sequence[float],
    mask_ratio: float = 0.75,
    centered: bool = True,
    seed: int = 0,
    masks: Masks = RANDOM_MASKS,
    channels: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Masks images and reconstructs them with the model.

    Args:
        model: in eval mode.
        images: [n, C, H, W] uint8, or float32 in [0, 1].
        size: of the model's input, px: the bandwidth B of a square, or (h, w).
        mean, std: of the training data.
        mask_ratio: fraction of the patches removed.
        centered: as in `low_frequency_crop`.
        seed: of the masks.
        masks: as in `mask_order`.
        channels: one or three to draw, c of C; see `Drawing`.
    Returns:
        Pictures by caption, in display order, [n, c, h, w] in [0, 1]. The last one shows the predictions in place
        of the removed patches. Predictions of normalised patches are denormalised with the mean and deviation of the
        original patches. If the model predicts HOG descriptors, the last two are `hog_picture`s of target and prediction.
    """
    device = model.cls_token.device
    height, width = as_size(size)
    inputs = crop_and_normalize(images.to(device), (height, width), mean, std, centered)
    patch, grid = model.patch_size, (height // model.patch_size, width // model.patch_size)
    uniform = torch.rand(len(images), num_uniform(masks, grid), generator=torch.Generator().manual_seed(seed))
    noise = mask_order(masks, uniform.to(device), grid, mask_ratio)
    predicted, mask = model.predict(inputs, mask_ratio, noise)
    originals = patchify(inputs, patch)
    removed = mask[..., None].bool()

    drawing = Drawing(mean, std, images.is_floating_point(), channels)
    means, deviations = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def shown(patches: Tensor) -> Tensor:
        pixels = unpatchify(patches, patch, grid).float()
        return drawing((pixels * deviations.to(device) + means.to(device)).cpu())

    grey = (GREY * drawing.contrast + drawing.black - means) / deviations
    grey = patchify(grey.view(1, -1, 1, 1).expand(inputs.shape), patch)
    pictures = {
        "original": drawing(images.cpu()),
        f"input, bandwidth {size_text(size)}": shown(originals),
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
    """Draws HOG descriptors as strokes along the edges. A stronger gradient gives a brighter stroke.

    Args:
        cells: [n, C, 9, rows, columns], as from `hog_cells`; the mean over the channels is drawn.
        side: px of a cell.
    Returns:
        [n, 1, rows side, columns side] in [0, 1].
    """
    strengths = cells.float().cpu().mean(dim=1).clamp(0, 1)
    n, num_bins, rows, columns = strengths.shape
    offsets = torch.arange(side) - (side - 1) / 2
    down, right = offsets[:, None], offsets[None, :]
    angles = (
        (torch.arange(num_bins) + 0.5) * math.pi / num_bins
    )  # of the gradients, which are perpendicular to the edges
    distances = (right * angles.sin().view(-1, 1, 1) + down * angles.cos().view(-1, 1, 1)).abs()
    inside = (right**2 + down**2).sqrt() <= side / 2
    strokes = (1.2 - distances).clamp(0, 1) * inside  # [9, side, side], about 2 px wide
    glyphs = (strengths[..., None, None] * strokes[:, None, None]).amax(dim=1)
    return glyphs.permute(0, 1, 3, 2, 4).reshape(n, 1, rows * side, columns * side)


def picture_footer(model: MaskedAutoencoder, images: Tensor, channels: Sequence[int] | None = None) -> str:
    """Returns a footer that explains how target, channels and contrast are drawn; empty for plain RGB or grey pixels.

    Args:
        model: whose predictions are drawn.
        images, channels: as in `reconstruct`.
    """
    lines = []
    if model.target == "hog":
        lines.append("The model predicts histograms of oriented gradients, drawn as strokes along the edges.")
    elif model.norm_pix_loss:
        lines.append("The model predicts normalised patches, drawn with the mean and contrast of the original patches.")
    lines.append(drawing_note(model.in_chans, images.is_floating_point(), channels))
    return " ".join(line for line in lines if line)


def ladder(
    model: MaskedAutoencoder,
    image: Tensor,
    sizes: Sequence[int | Size],
    mean: Sequence[float],
    std: Sequence[float],
    mask_ratio: float = 0.75,
    centered: bool = True,
    seed: int = 0,
    title: str = "",
    tile: int = 160,
    masks: Masks = RANDOM_MASKS,
    channels: Sequence[int] | None = None,
) -> Figure:
    """Draws one image at several bandwidths: the model's input, the masked input and the prediction.

    Args:
        model: in eval mode.
        image: [C, H, W] uint8, or float32 in [0, 1].
        sizes: of the model's inputs as in `reconstruct`, multiples of the patch size, at most H x W; a row for each.
        mean, std, mask_ratio, centered, seed, masks, channels: as in `reconstruct`.
        title, tile: as in `picture_grid`.
    """
    rows = [
        list(reconstruct(model, image[None], size, mean, std, mask_ratio, centered, seed, masks, channels).values())
        for size in sizes
    ]
    original, *kinds = ([pictures[0] for pictures in column] for column in zip(*rows, strict=True))
    captions = ["low frequencies", f"masked {mask_ratio:.0%}"]
    if model.target == "hog":
        captions += ["HOG target", "HOG prediction"]
    else:
        captions.append("reconstruction (norm-pix)" if model.norm_pix_loss else "reconstruction")
    visible = "their target" if model.target == "hog" else "their input"
    return picture_grid(
        {"original": [original[0]] + [None] * (len(rows) - 1), **dict(zip(captions, kinds, strict=True))},
        f"{picture_footer(model, image, channels)} Visible patches show {visible}.".strip(),
        tile,
        title,
        [f"bandwidth {size_text(size)} px" for size in sizes],
    )


def picture_grid(
    columns: Mapping[str, Tensor | Sequence[Tensor | None]],
    footer: str = "",
    tile: int = 160,
    title: str = "",
    row_names: Sequence[str] = (),
) -> Figure:
    """Draws pictures in a grid with a row for each image and a captioned column for each kind.

    Args:
        columns: caption -> [n, C, h, w] in [0, 1], or n pictures [C, h, w], C = 1 or 3. The sizes may differ;
            None leaves a place empty.
        footer: text below; long texts are wrapped.
        tile: px of the width of each picture in the saved file. The text scales with it.
        title: text above.
        row_names: n texts at the left.
    """
    from matplotlib.figure import Figure

    num_rows, num_columns = len(next(iter(columns.values()))), len(columns)
    drawn = [picture for pictures in columns.values() for picture in pictures if picture is not None]
    tile_height = TILE * max(picture.shape[-2] / picture.shape[-1] for picture in drawn)
    width, height = num_columns * (TILE + GAP) - GAP, num_rows * (tile_height + GAP) - GAP
    figure = Figure(figsize=(width, height), dpi=tile / TILE)
    spacing = {"wspace": GAP / TILE, "hspace": GAP / tile_height, "left": 0, "right": 1, "bottom": 0, "top": 1}
    axes = figure.subplots(num_rows, num_columns, squeeze=False, gridspec_kw=spacing)
    style: dict[str, Any] = {"fontsize": FONT_SIZE, "parse_math": False}  # "$" is part of a name
    captions = [_fill(caption, TILE) for caption in columns]
    for j, pictures in enumerate(columns.values()):
        axes[0, j].set_title(captions[j], pad=4, **style)
        for i, picture in enumerate(pictures):
            axes[i, j].set_axis_off()
            if picture is not None:
                pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
                axes[i, j].imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
    for i, name in enumerate(row_names):
        at = axes[i, 0].transAxes
        axes[i, 0].text(-0.03, 0.5, name, transform=at, rotation=90, ha="right", va="center", **style)
    # The saved file is extended to the texts outside of the figure's box.
    num_lines = max(caption.count("\n") + 1 for caption in captions)
    above = 1 + (num_lines * 1.2 * FONT_SIZE + 6) / 72 / height
    figure.text(0.5, above, _fill(title, width), ha="center", va="bottom", **style)
    figure.text(0.5, -0.06 / height, _fill(footer, width), ha="center", va="top", **style)
    return figure


def save_picture(figure: Figure, path: Path) -> np.ndarray:
    """Writes a figure as a PNG file and returns its pixels for TensorBoard, [H, W, 3] uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.06)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _fill(text: str, inches: float) -> str:
    """Wraps a text so that its lines fit into a width at the default font's mean width of a character."""
    return fill(text, max(8, int(inches * 72 / (0.56 * FONT_SIZE))), break_on_hyphens=False)


def draw_confusion(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draws a confusion matrix as shares of the true class.

    The colour scale is the square root of the share, so that rare confusions stay visible. Class names are shown up to
    120 classes, shares as text up to 20.

    Args:
        confusion: [C, C] counts, a row for each true class; a row without images is grey.
        class_names: C names.
        path: of the PNG file.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    num_classes, counts = len(class_names), confusion.double()
    shares = (counts / counts.sum(dim=1, keepdim=True)).numpy()  # 0 / 0 is NaN, which shows the grey of the axes
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
        style: dict[str, Any] = {"fontsize": min(10, 0.85 * cell), "parse_math": False}  # "$" is part of a name
        axes.set_xticks(range(num_classes), names, rotation=90, **style)
        axes.set_yticks(range(num_classes), names, **style)
        axes.tick_params(length=2 if num_classes <= 50 else 0)
    if num_classes <= 20:
        for i, j in np.argwhere(shares >= 0.005).tolist():
            color = "white" if shares[i, j] > 0.35 else "black"
            axes.text(j, i, f"{shares[i, j]:.0%}", ha="center", va="center", fontsize=8, color=color)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight", pad_inches=0.15)
