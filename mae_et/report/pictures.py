"""Pictures that runs left, made small enough to lie inside the page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mae_et.report.benchmark import Benchmark
from mae_et.report.records import Run

MOST_WIDTH = 1000  # px
MOST_HEIGHT = 1400  # px
MOST_BYTES = 2_500_000  # of all pictures together, as they stand in the page
OF_EACH = {"pretrain": 1, "detection": 3, "segmentation": 3, "reconstructions": 4}
TITLES = {
    "pretrain": "Reconstructions",
    "reconstructions": "Reconstructions of chosen images",
    "detection": "Detections",
    "segmentation": "Segmentations",
}


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI."""

    kind: str
    run: str
    caption: str
    uri: str
    width: int
    height: int


def collect(benchmark: Benchmark) -> tuple[list[Picture], list[str]]:
    """Returns the last pictures of each run shown, and what was left out and why."""
    pictures: list[Picture] = []
    notes: list[str] = []
    size = num_more = 0
    for kind in OF_EACH:
        for run in benchmark.of_kind(kind):
            for path in _newest(run):
                if size >= MOST_BYTES:
                    num_more += 1
                    continue
                try:
                    picture = _read(run, path)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    notes.append(f"{run.name}: {path.name} cannot be read: {type(error).__name__}")
                    continue
                size += len(picture.uri)
                pictures.append(picture)
    if num_more:
        notes.append(f"{num_more} more pictures lie in the run folders; with them the page would be too large")
    return pictures, notes


def _newest(run: Run) -> Iterable[Path]:
    if run.kind == "reconstructions":
        return run.pictures[: OF_EACH[run.kind]]
    steps = [re.findall(r"\d+", path.stem)[-1:] for path in run.pictures]
    last = [path for path, step in zip(run.pictures, steps, strict=True) if step == steps[-1]]
    few = run.pictures if len(last) < OF_EACH[run.kind] else last
    return few[-OF_EACH[run.kind] :]


def _read(run: Run, path: Path) -> Picture:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((MOST_WIDTH, MOST_HEIGHT))
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=82, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
    return Picture(run.kind, run.name, path.stem.replace("_", " "), uri, *image.size)
