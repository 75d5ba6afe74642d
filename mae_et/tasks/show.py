"""Pictures of features: principal components, attention, similarity, nearest neighbours and near-duplicates.

Shapes: n images, C channels, S px, gh x gw patches, D width.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from mae_et.data.decoding import BadImageError
from mae_et.data.sources.named_files import NamedFiles, open_files
from mae_et.data.sources.source import load_picture
from mae_et.data.stream import choose_num_workers, eval_loader, reading
from mae_et.errors import CheckpointError, UserError
from mae_et.evaluation.contact_sheet import Cell, thumbnail, write_sheet
from mae_et.evaluation.neighbours import nearest, similar_pairs
from mae_et.evaluation.patches import HIGH, LOW, cls_attention, principal_colors, similarity_maps
from mae_et.evaluation.pictures import picture_grid, save_picture
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.resize import change_input_size
from mae_et.models.sizes import Size, as_size, plain_size, recorded_size
from mae_et.models.strict import misfit
from mae_et.models.timm_backbone import create_backbone
from mae_et.runs.output import open_output
from mae_et.storage.atomic import atomic_path
from mae_et.storage.metadata import stored_range
from mae_et.storage.weights import find_weights, read_stored
from mae_et.tasks.features import FeatureOptions, check_reading, normalisation, open_encoder
from mae_et.tasks.predict import report_bad_images, write_json

log = logging.getLogger(__name__)

ROWS_OF_SHEET = 8  # images of a PNG file
MAX_PAIRS_DRAWN = 200  # pairs in the HTML file of duplicates; the CSV file has all
FOLDER_OF_SHEETS = "pictures"


@dataclass(frozen=True)
class ShowOptions:
    """Options that all pictures share."""

    image_size: int | Size | None = None  # px, side or (H, W); None: the backbone's, else 224
    crop_ratio: float | None = None  # share of the shorter side that is kept; None: the backbone's, else 0.875
    batch_size: int = 32
    num_workers: int | None = None  # loader processes; None: from the cores
    device: str | None = None  # "cpu" or "cuda"; None: CUDA where there is one
    overwrite: bool = False  # replace earlier results in the output folder

    def __post_init__(self) -> None:
        check_reading(self.batch_size, self.num_workers, self.image_size, self.crop_ratio)


class Viewer:
    """A backbone that looks at image files.

    Args:
        backbone: a file or folder of any ViT, the backbone of a supervised run, or "random".
        options: how images are prepared.
    Raises:
        CheckpointError: if the file holds no backbone of a known kind.
    """

    def __init__(self, backbone: str, options: ShowOptions) -> None:
        self.name, self.options = backbone, options
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, metadata, self.image_size, self.in_chans = _open_any(backbone, options.image_size)
        self.model: Any = model.to(self.device).eval()
        self.mean, self.std = normalisation(metadata, self.in_chans)
        self.value_range = stored_range(metadata)
        recorded = float(metadata.get("eval_crop_ratio", 0.875))
        self.crop_ratio = recorded if options.crop_ratio is None else options.crop_ratio

    @torch.inference_mode()
    def look(
        self, source: NamedFiles, function: Callable[[Tensor], Tensor], keep_inputs: bool = True
    ) -> tuple[Tensor, list[int], Tensor]:
        """Applies a function to all readable images; the others are logged.

        Args:
            source: the images.
            function: [n, C, H, W] normalised -> [n, ...].
            keep_inputs: return the inputs too.
        Returns:
            The outputs in float32 on the CPU, the indices of their images, and the inputs [n, C, H, W] uint8, or none.
        Raises:
            DataError: if no image can be read.
        """
        workers = choose_num_workers(self.options.num_workers, 1, self.device.type == "cuda")
        loader = eval_loader(
            source, range(len(source)), self.image_size, self.options.batch_size, workers, self.crop_ratio
        )
        outputs, places, inputs, bad = [], [], [], {}
        with reading(loader) as batches, tqdm(total=len(source), unit="image", desc="features", disable=None) as bar:
            for batch in batches:
                bad.update({image.index: image.reason for image in batch.bad_images})
                if len(batch.images):
                    pixels = batch.images.to(self.device)
                    normal = crop_and_normalize(pixels, self.image_size, self.mean, self.std)
                    outputs.append(function(normal).float().cpu())
                    places += batch.places.tolist()
                    inputs.append(batch.images if keep_inputs else batch.images[:0])
                bar.update(len(batch.labels) + len(batch.bad_images))
        report_bad_images(source, bad)
        found = torch.cat(outputs)
        if not found.isfinite().all():
            raise UserError(f"a feature of {self.name} is not finite: the backbone may be damaged")
        return found, places, torch.cat(inputs)

    def patches(self, images: Tensor) -> Tensor:
        """Returns the features of the patches after the final norm, [n, gh, gw, D]; the last map of a convolutional net."""
        if isinstance(self.model, VisionTransformer):
            tokens = self.model.forward_features(images)[:, self.model.num_prefix_tokens :]
            return tokens.unflatten(1, tuple(self.model.patch_embed.grid_size))
        maps = self.model.forward_intermediates(images, 1, norm=True, output_fmt="NCHW", intermediates_only=True)
        return maps[-1].permute(0, 2, 3, 1)

    def embedding(self, images: Tensor) -> Tensor:
        """Returns the mean of the patch features, [n, D], as in the kNN accuracy of a pre-training."""
        return self.patches(images).mean(dim=(1, 2))


def show_pca(backbone: str, images: Sequence[str], out: Path, options: ShowOptions) -> dict[str, Any]:
    """Draws the first three principal components of all patches as RGB; see `principal_colors` for sign and scale.

    Returns:
        The record, as in show.json.
    """
    viewer, source = _opened(backbone, images, out, options)
    features, places, inputs = viewer.look(source, viewer.patches)
    colors = principal_colors(features)
    shares = ", ".join(f"{share:.0%}" for share in colors.shares)
    footer = (
        f"Red, green and blue are components 1 to 3 of the patch features of all {len(places)} images: {shares} of the variance. "
        f"Each runs from its {LOW:.0%} to its {HIGH:.0%} quantile; its largest loading is positive."
    )
    columns = {"image": inputs.float() / 255, "PCA of the patches": _enlarged(colors.pictures, viewer.image_size)}
    _save_sheets(columns, source, places, footer, out)
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
    viewer, source = _opened(backbone, images, out, options)
    weights, places, inputs = viewer.look(source, lambda batch: cls_attention(viewer.model, batch, block))
    maps = torch.cat([weights.mean(dim=1, keepdim=True), weights], dim=1)  # [n, 1 + H, gh, gw]
    drawn = _heat(maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12), viewer.image_size)
    names = ["mean of heads", *(f"head {i}" for i in range(weights.shape[1]))]
    columns = {"image": inputs.float() / 255, **{name: drawn[:, i] for i, name in enumerate(names)}}
    number = block % len(viewer.model.blocks)
    footer = f"Attention of the cls token in block {number}. Each map runs from 0 (dark) to its own maximum (bright)."
    _save_sheets(columns, source, places, footer, out)
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
    viewer, source = _opened(backbone, images, out, options)
    features, places, inputs = viewer.look(source, viewer.patches)
    maps = similarity_maps(features, patch)
    low = float(maps.min())
    drawn = _heat((maps - low) / max(1 - low, 1e-12), viewer.image_size)
    pictures = inputs.float() / 255
    pictures = pictures.expand(-1, 3, -1, -1).clone() if pictures.shape[1] == 1 else pictures
    _frame(pictures[0], patch, tuple(features.shape[1:3]))
    footer = (
        f"Cosine similarity with the patch in row {patch[0]}, column {patch[1]} of the first image (red frame), "
        f"from {low:.2f} (dark, the lowest of all images) to 1 (bright)."
    )
    _save_sheets({"image": pictures, "similarity": drawn}, source, places, footer, out)
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
    viewer, queries = _opened(backbone, images, out, options)
    searched = open_files([folder], viewer.in_chans)
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
            Cell(name, f"{value:.3f}", _thumbnail(searched, bank_places[row]))
            for name, value, row in zip(names, similarities, found, strict=True)
        ]
        cells.append([Cell(queries.name(place), "query", _thumbnail(queries, place)), *neighbours])
    _write_csv(out / "neighbours.csv", ("image", "rank", "neighbour", "similarity"), lines)
    note = f"Cosine similarity of the mean patch features of {viewer.name}, among {len(bank)} images of {folder}."
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
    viewer, source = _opened(backbone, images, out, options)
    features, places, _ = viewer.look(source, viewer.embedding, keep_inputs=False)
    pairs = similar_pairs(features, threshold)
    lines = [[source.name(places[i]), source.name(places[j]), f"{value:.6f}"] for i, j, value in pairs]
    _write_csv(out / "duplicates.csv", ("first", "second", "similarity"), lines)
    cells = [
        [Cell(source.name(places[row]), f"{value:.4f}", _thumbnail(source, places[row])) for row in (i, j)]
        for i, j, value in pairs[:MAX_PAIRS_DRAWN]
    ]
    drawn = f" The first {MAX_PAIRS_DRAWN} are shown." if len(pairs) > MAX_PAIRS_DRAWN else ""
    note = (
        f"{len(pairs)} pairs of {len(places)} images have a cosine similarity of {threshold:g} or more in the mean patch "
        f"features of {viewer.name}.{drawn}"
    )
    write_sheet(out / "duplicates.html", "Near-duplicates", note, cells)
    return _record("duplicates", viewer, source, places, out, threshold=threshold, num_pairs=len(pairs))


OWNED = (
    FOLDER_OF_SHEETS, "show.json", "neighbours.csv", "neighbours.html", "duplicates.csv", "duplicates.html",
)  # fmt: skip


def _opened(backbone: str, images: Sequence[str], out: Path, options: ShowOptions) -> tuple[Viewer, NamedFiles]:
    viewer = Viewer(backbone, options)
    if viewer.in_chans not in (1, 3) or viewer.value_range is not None:
        raise UserError(
            f"{backbone} takes images of {viewer.in_chans} channels, value range {viewer.value_range}, but this command draws "
            "8-bit RGB or grey images only: use mae-et extract and mae-et reconstruct"
        )
    source = open_files(images, viewer.in_chans)
    open_output(out, options.overwrite, OWNED)
    return viewer, source


def _open_any(backbone: str, image_size: int | Size | None) -> tuple[nn.Module, Mapping[str, str], Size, int]:
    """Builds a plain ViT, or the timm model of a supervised run without its head.

    Returns:
        The model, the metadata of its file, (H, W) and C.
    """
    if backbone != "random":
        path = find_weights(backbone)
        state, metadata, _ = read_stored(path)
        if metadata.get("objective") == "supervised" and "architecture" in metadata:
            size, channels = recorded_size(metadata), int(metadata.get("in_chans", 3))
            options = json.loads(metadata.get("model_options", "{}"))
            timm_model = create_backbone(metadata["architecture"], size, num_classes=0, in_chans=channels, **options)
            wanted = timm_model.state_dict()
            if faults := misfit({key: value for key, value in state.items() if key in wanted}, wanted):
                raise CheckpointError(f"{path} does not fit its metadata; {faults}")
            timm_model.load_state_dict(state, strict=False)  # a classifier has a head as well
            change_input_size(timm_model, None, None, image_size or size)
            return timm_model, metadata, as_size(image_size or size), channels
    encoder, recorded = open_encoder(backbone, FeatureOptions(image_size=image_size))
    return encoder, recorded, as_size(encoder.patch_embed.img_size), encoder.in_chans


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
    columns: Mapping[str, Tensor], source: NamedFiles, places: Sequence[int], footer: str, out: Path
) -> None:
    for number, start in enumerate(range(0, len(places), ROWS_OF_SHEET)):
        part = slice(start, start + ROWS_OF_SHEET)
        names = [_short(Path(source.name(place)).name) for place in places[part]]
        figure = picture_grid({key: rows[part] for key, rows in columns.items()}, footer, 192, row_names=names)
        save_picture(figure, out / FOLDER_OF_SHEETS / f"{number:03d}.png")


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else f"…{name[-limit + 1 :]}"


def _thumbnail(source: NamedFiles, index: int) -> str:
    try:
        return thumbnail(load_picture(source, index))
    except BadImageError as error:  # changed since its features were computed
        log.warning("no picture of %s: %s", source.name(index), error)
        return ""


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _record(
    kind: str, viewer: Viewer, source: NamedFiles, places: Sequence[int], out: Path, **more: Any
) -> dict[str, Any]:
    record = {
        "kind": kind,
        "backbone": viewer.name,
        "image_size": plain_size(viewer.image_size),
        "crop_ratio": viewer.crop_ratio,
        "images": [source.name(place) for place in places],
        "num_unreadable": len(source) - len(places),
        **more,
    }
    write_json(record, out / "show.json")
    return record
