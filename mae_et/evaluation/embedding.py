"""Puts features onto a plane with UMAP, and draws the plane.

Shapes: n images, D width.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_et.errors import UserError
from mae_et.storage.atomic import atomic_path

log = logging.getLogger(__name__)

NUM_NEIGHBOURS = 15  # UMAP's default
MIN_IMAGES = 10  # UMAP starts from eigenvectors of the graph, which need some more images than dimensions
MAX_CLASSES = 20  # with a colour of their own


def check_umap() -> None:
    """Raises UserError if the package of UMAP is missing."""
    if importlib.util.find_spec("umap") is None:
        raise UserError("UMAP needs umap-learn: pip install 'mae_et[umap]'")


def umap_plane(features: Tensor, seed: int) -> np.ndarray:
    """Maps features to a plane so that similar ones stay neighbours. Distances between groups have no meaning.

    Args:
        features: [n, D].
        seed: results are equal for equal seeds, features and versions.
    Returns:
        [n, 2] float32.
    Raises:
        UserError: if the package is missing, or there are too few images.
    Source: UMAP (arXiv 1802.03426), with the cosine distance.
    """
    check_umap()
    if len(features) < MIN_IMAGES:
        raise UserError(f"{len(features)} images are too few for UMAP: give {MIN_IMAGES} or more")
    neighbours = min(NUM_NEIGHBOURS, len(features) - 1)
    if neighbours < NUM_NEIGHBOURS:
        log.warning("%d images: UMAP uses %d neighbours in place of %d", len(features), neighbours, NUM_NEIGHBOURS)
    num_threads = torch.get_num_threads()
    try:
        import umap

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="n_jobs value .* overridden")  # that a seed needs one thread
            reducer = umap.UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, n_jobs=1)
            return np.asarray(reducer.fit_transform(features.float().numpy()), np.float32)
    finally:
        torch.set_num_threads(num_threads)  # numba sets it to the number of cores, which changes sums of torch


def draw_plane(
    points: np.ndarray, labels: Sequence[int] | None, class_names: Sequence[str], footer: str, path: Path
) -> None:
    """Draws points of a plane, coloured by label.

    Args:
        points: [n, 2].
        labels: class of each point; None: all points have one colour.
        class_names: shown in a legend, up to `MAX_CLASSES`; more classes share colours of a continuous scale.
        footer: text below.
        path: of the PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8))
    axes = figure.subplots()
    size = float(np.clip(4000 / len(points), 2, 40))  # points^2
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.8}
    if labels is None:
        axes.scatter(*points.T, **style)
    else:
        few = len(class_names) <= MAX_CLASSES
        colors = colormaps["tab20" if few else "turbo"]
        for label in sorted(set(labels)):
            chosen = points[np.asarray(labels) == label]
            color = colors(label) if few else colors(label / (len(class_names) - 1))
            axes.scatter(*chosen.T, color=color, label=class_names[label].replace("$", r"\$"), **style)
        if few:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=max(1, 6 / size**0.5))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", "datalim")
    axes.set_xlabel(footer, fontsize=9, parse_math=False, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", pad_inches=0.1)
