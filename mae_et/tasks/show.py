"""Pictures of features: principal components, attention, similarity, neighbours, near-duplicates and UMAP.

Shapes: n images, C channels, S px, gh x gw patches, D width.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_et.data.decoding import BadImageError
from mae_et.data.sources.named_files import open_files
from mae_et.data.sources.source import ImageSource
from mae_et.errors import UserError
from mae_et.evaluation.contact_sheet import THUMBNAIL, Cell, thumbnail, write_sheet
from mae_et.evaluation.embedding import check_umap, draw_plane, umap_plane
from mae_et.evaluation.neighbours import nearest, similar_pairs
from mae_et.evaluation.patches import HIGH, LOW, cls_attention, principal_colors, similarity_maps
from mae_et.evaluation.pictures import picture_grid, save_picture
from mae_et.models.sizes import Size, plain_size
from mae_et.runs.output import open_output
from mae_et.storage.atomic import atomic_path
from mae_et.tasks.predict import write_json
from mae_et.tasks.viewer import ShowOptions, Viewer, open_labelled, opened

log = logging.getLogger(__name__)

ROWS_OF_SHEET = 8  # images of a PNG file
MAX_PAIRS_DRAWN = 200  # pairs in the HTML file of duplicates; the CSV file has all
FOLDER_OF_SHEETS = "pictures"


def show_pca(backbone: str, images: Sequence[str], out: Path, options: ShowOptions) -> dict[str, Any]:
    """Draws the first three principal components of all patches as RGB; see `principal_colors` for sign and scale.

    Returns:
        The record, as in show.json.
    """
    viewer, source = opened(backbone, images, out, options, OWNED)
    features, places, inputs = viewer.look(source, viewer.patches)
    colors = principal_colors(features)
    shares = ", ".join(f"{share:.0%}" for share in colors.shares)
    footer = (
        f"Red, green and blue are components 1 to 3 of the patch features of all {len(places)} images: {shares} of the variance. "
        f"Each runs from its {LOW:.0%} to its {HIGH:.0%} quantile; its largest loading is positive."
    )
    columns = {"image": inputs, "PCA of the patches": _enlarged(colors.pictures, viewer.image_size)}
    _save_sheets(columns, viewer, source, places, footer, out)
    return _record("pca", viewer, source, places, out, variance_shares=colors.shares)


def show_attention(
    backbone: str, images: Sequence[str], out: Path, options: ShowOptions, block: int = -1
) -> dict[str, Any]:
    """Draws the attention of the cls token to the patches: the mean over the heads and each head.

    Args:
        block: index of the block; negative ones count from the last.
    Returns:
        The record, as in show.json.
    Raises:
        UserError: if the backbone has no cls token.
    """
    viewer, source = opened(backbone, images, out, options, OWNED)
    weights, places, inputs = viewer.look(source, lambda batch: cls_attention(viewer.model, batch, block))
    maps = torch.cat([weights.mean(dim=1, keepdim=True), weights], dim=1)  # [n, 1 + H, gh, gw]
    drawn = _heat(maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12), viewer.image_size)
    names = ["mean of heads", *(f"head {i}" for i in range(weights.shape[1]))]
    columns = {"image": inputs, **{name: drawn[:, i] for i, name in enumerate(names)}}
    number = block % len(viewer.model.blocks)
    token = "cls token" if getattr(viewer.model, "num_cls_tokens", 1) == 1 else "cls tokens (mean)"
    footer = f"Attention of the {token} in block {number}. Each map runs from 0 (dark) to its own maximum (bright)."
    _save_sheets(columns, viewer, source, places, footer, out)
    return _record("attention", viewer, source, places, out, block=number)


def show_similarity(
    backbone: str, images: Sequence[str], out: Path, options: ShowOptions, patch: tuple[int, int]
) -> dict[str, Any]:
    """Draws the cosine similarity of a patch of the first image with all patches of all images.

    Args:
        patch: (row, column) from 0, of the first image that can be read.
    Returns:
        The record, as in show.json.
    Raises:
        UserError: if there is no such patch.
    """
    viewer, source = opened(backbone, images, out, options, OWNED)
    features, places, inputs = viewer.look(source, viewer.patches)
    maps = similarity_maps(features, patch)
    low = float(maps.min())
    drawn = _heat((maps - low) / max(1 - low, 1e-12), viewer.image_size)
    pictures = inputs.expand(-1, 3, -1, -1).clone()  # for the frame, which is red
    _frame(pictures[0], patch, tuple(features.shape[1:3]))
    footer = (
        f"Cosine similarity with the patch in row {patch[0]}, column {patch[1]} of the first image (red frame), "
        f"from {low:.2f} (dark, the lowest of all images) to 1 (bright)."
    )
    _save_sheets({"image": pictures, "similarity": drawn}, viewer, source, places, footer, out)
    return _record("similarity", viewer, source, places, out, patch=list(patch), lowest=low)


def show_neighbours(
    backbone: str, images: Sequence[str], out: Path, options: ShowOptions, folder: str, k: int = 8
) -> dict[str, Any]:
    """Writes the nearest neighbours of images in a folder: neighbours.csv and a contact sheet, neighbours.html.

    An image of the folder that is a query is not its own neighbour.

    Args:
        images: the queries.
        folder: or a glob pattern, of the images to search.
        k: neighbours of each query.
    Returns:
        The record, as in show.json.
    Raises:
        UserError: if k is out of range.
    """
    if k < 1:
        raise UserError(f"k = {k} must be 1 or more")
    viewer, queries = opened(backbone, images, out, options, OWNED)
    searched = open_files([folder], viewer.in_chans, viewer.value_range)
    bank, bank_places, _ = viewer.look(searched, viewer.embedding, keep_inputs=False)
    wanted, places, _ = viewer.look(queries, viewer.embedding, keep_inputs=False)
    rows_of = {os.path.realpath(searched.paths[place]): row for row, place in enumerate(bank_places)}
    own = torch.tensor([rows_of.get(os.path.realpath(queries.paths[place]), -1) for place in places])
    available = len(bank) - int((own >= 0).any())
    if not available:
        raise UserError(f"{folder} holds no other image than the query: name a folder with more images")
    if k > available:
        log.warning("%s holds %d other images: %d neighbours in place of %d", folder, available, available, k)
        k = available
    values, rows = nearest(bank, wanted, k, own)
    lines, cells = [], []
    for place, similarities, found in zip(places, values.tolist(), rows.tolist(), strict=True):
        names = [searched.name(bank_places[row]) for row in found]
        lines += [
            [queries.name(place), rank, name, f"{value:.6f}"]
            for rank, (name, value) in enumerate(zip(names, similarities, strict=True), 1)
        ]
        neighbours = [
            Cell(name, f"{value:.3f}", _thumbnail(viewer, searched, bank_places[row]))
            for name, value, row in zip(names, similarities, found, strict=True)
        ]
        cells.append([Cell(queries.name(place), "query", _thumbnail(viewer, queries, place)), *neighbours])
    _write_csv(out / "neighbours.csv", ("image", "rank", "neighbour", "similarity"), lines)
    note = f"Cosine similarity of the mean patch features of {viewer.name}, among {len(bank)} images of {folder}."
    note = f"{note} {viewer.drawing.note}".strip()
    write_sheet(out / "neighbours.html", "Nearest neighbours", note, cells, mark_first=True)
    return _record("neighbours", viewer, queries, places, out, folder=folder, num_searched=len(bank), k=k)


def show_duplicates(
    backbone: str, images: Sequence[str], out: Path, options: ShowOptions, threshold: float = 0.98
) -> dict[str, Any]:
    """Writes the pairs of images whose features are nearly equal: duplicates.csv and a contact sheet, duplicates.html.

    Args:
        threshold: lowest cosine similarity of a pair. What is nearly equal depends on the backbone: look at the sheet.
    Returns:
        The record, as in show.json.
    Raises:
        UserError: if the threshold is out of range.
    """
    if not -1 <= threshold <= 1:
        raise UserError(f"threshold = {threshold} must be a cosine similarity, from -1 to 1")
    viewer, source = opened(backbone, images, out, options, OWNED)
    features, places, _ = viewer.look(source, viewer.embedding, keep_inputs=False)
    pairs = similar_pairs(features, threshold)
    lines = [[source.name(places[i]), source.name(places[j]), f"{value:.6f}"] for i, j, value in pairs]
    _write_csv(out / "duplicates.csv", ("first", "second", "similarity"), lines)
    cells = [
        [Cell(source.name(places[row]), f"{value:.4f}", _thumbnail(viewer, source, places[row])) for row in (i, j)]
        for i, j, value in pairs[:MAX_PAIRS_DRAWN]
    ]
    drawn = f" The first {MAX_PAIRS_DRAWN} are shown." if len(pairs) > MAX_PAIRS_DRAWN else ""
    note = (
        f"{len(pairs)} pairs of {len(places)} images have a cosine similarity of {threshold:g} or more in the mean patch "
        f"features of {viewer.name}.{drawn} {viewer.drawing.note}"
    )
    write_sheet(out / "duplicates.html", "Near-duplicates", note, cells)
    return _record("duplicates", viewer, source, places, out, threshold=threshold, num_pairs=len(pairs))


def show_umap(backbone: str, images: Sequence[str], out: Path, options: ShowOptions, seed: int = 0) -> dict[str, Any]:
    """Puts the mean patch features of images onto a plane with UMAP: umap.csv and umap.png.

    The points are coloured by label where the images are one source with labels, such as a folder for each class.

    Args:
        images: as for the other kinds, or one source as in mae_et/data/sources/spec.py.
        seed: of UMAP.
    Returns:
        The record, as in show.json.
    Raises:
        UserError: if umap-learn is missing, or there are too few images.
    """
    check_umap()  # before the features are computed
    viewer = Viewer(backbone, options)
    source = open_labelled(images, viewer)
    open_output(out, options.overwrite, OWNED)
    features, places, _ = viewer.look(source, viewer.embedding, keep_inputs=False)
    points = umap_plane(features, seed)
    labels, names = None, list(source.class_names or ())
    if source.labels is not None and names:
        labels = [int(source.labels[place]) for place in places]
    else:
        log.info("the images have no labels (%s): all points get one colour", " ".join(images))
    lines = [
        [source.name(place), f"{x:.5f}", f"{y:.5f}", "" if labels is None else names[labels[row]]]
        for row, (place, (x, y)) in enumerate(zip(places, points.tolist(), strict=True))
    ]
    _write_csv(out / "umap.csv", ("image", "x", "y", "label"), lines)
    footer = f"UMAP of the mean patch features of {viewer.name}, {len(places)} images, cosine distance, seed {seed}."
    draw_plane(points, labels, names, footer, out / "umap.png")
    return _record("umap", viewer, source, places, out, seed=seed, num_classes=len(names) if labels else None)


OWNED = (
    FOLDER_OF_SHEETS, "show.json", "neighbours.csv", "neighbours.html", "duplicates.csv", "duplicates.html",
    "umap.csv", "umap.png",
)  # fmt: skip


def _enlarged(pictures: Tensor, size: Size) -> Tensor:
    """Repeats pixels: [..., gh, gw] -> [..., H, W]. Nothing is interpolated, so the patches stay visible."""
    rows = torch.arange(size[0]) * pictures.shape[-2] // size[0]
    columns = torch.arange(size[1]) * pictures.shape[-1] // size[1]
    return pictures[..., rows, :][..., columns]


def _heat(maps: Tensor, size: Size) -> Tensor:
    """Colours values in [0, 1] from dark to bright: [..., gh, gw] -> [..., 3, H, W]."""
    import matplotlib

    colors = matplotlib.colormaps["inferno"](maps.clamp(0, 1).numpy())[..., :3]
    return _enlarged(torch.from_numpy(colors).float().movedim(-1, -3), size)


def _frame(picture: Tensor, patch: tuple[int, int], grid: tuple[int, ...]) -> None:
    """Draws a red frame around a patch, in place: [3, H, W]."""
    (top, bottom), (left, right) = (
        (place * side // count, (place + 1) * side // count)
        for place, side, count in zip(patch, picture.shape[-2:], grid, strict=True)
    )
    width = max(2, picture.shape[-1] // 100)
    inside = picture[:, top:bottom, left:right].clone()
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    picture[:, max(0, top - width) : bottom + width, max(0, left - width) : right + width] = red
    picture[:, top:bottom, left:right] = inside


def _save_sheets(
    columns: Mapping[str, Tensor], viewer: Viewer, source: ImageSource, places: Sequence[int], footer: str, out: Path
) -> None:
    footer = f"{footer} {viewer.drawing.note}".strip()
    for number, start in enumerate(range(0, len(places), ROWS_OF_SHEET)):
        part = slice(start, start + ROWS_OF_SHEET)
        names = [_short(Path(source.name(place)).name) for place in places[part]]
        figure = picture_grid({key: rows[part] for key, rows in columns.items()}, footer, 192, row_names=names)
        save_picture(figure, out / FOLDER_OF_SHEETS / f"{number:03d}.png")


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else f"…{name[-limit + 1 :]}"


def _thumbnail(viewer: Viewer, source: ImageSource, index: int) -> str:
    try:
        return thumbnail(viewer.drawing.image(source.load(index), THUMBNAIL))
    except BadImageError as error:  # changed since its features were computed
        log.warning("no picture of %s: %s", source.name(index), error)
        return ""


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _record(
    kind: str, viewer: Viewer, source: ImageSource, places: Sequence[int], out: Path, **more: Any
) -> dict[str, Any]:
    record = {
        "kind": kind,
        "backbone": viewer.name,
        "image_size": plain_size(viewer.image_size),
        "crop_ratio": viewer.crop_ratio,
        "channels": viewer.drawing.channels,
        "images": [source.name(place) for place in places],
        "num_unreadable": len(source) - len(places),
        **more,
    }
    write_json(record, out / "show.json")
    return record
