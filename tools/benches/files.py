"""Generated image files to read."""

from __future__ import annotations

from pathlib import Path

from mae_et.data.sources.source import load_picture
from mae_et.data.sources.spec import open_source


def write_images(folder: Path, num_images: int, size: int | str, quality: int = 90) -> Path:
    """Writes scenes as JPEG files in a folder for each class; the size is a side in px, or HxW."""
    source = open_source(f"scenes:{num_images}@{size},seed=1")
    assert source.labels is not None
    for i in range(num_images):
        path = folder / f"class_{source.labels[i]}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        load_picture(source, i).save(path, quality=quality)
    return folder
