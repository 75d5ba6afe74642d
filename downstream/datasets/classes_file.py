"""A data set whose classes stand in a file: the layout of ADE20K with a `classes.json` in its root. Needs mmseg."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS
from PIL import Image

from mae_et.errors import DataError

IGNORED = 255  # as a label of a mask: unlabelled, like 0
NUM_CHECKED = 200  # masks that are read at the start, spread over the set


@DATASETS.register_module()
class ClassesFileDataset(BaseSegDataset):
    """Images `.jpg`, masks `.png` with 0 or 255 for unlabelled and v for classes[v - 1] of DATA_ROOT/classes.json.

    Args:
        num_classes: that the model's heads have.
        data_root: the folder with classes.json.
        **options: as for BaseSegDataset.
    Raises:
        DataError: if there is no such file, it lists another number of classes, or a mask is unreadable, of
            another size than its image, or has labels outside of them.
    """

    def __init__(self, num_classes: int, data_root: str, **options: Any) -> None:
        path = Path(data_root) / "classes.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            classes = list(content["classes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} does not list the classes ({error}): it should hold {{'classes': [...]}}"
            ) from error
        if len(classes) != num_classes:
            raise DataError(
                f"{path} lists {len(classes)} classes, the config says num_classes = {num_classes}: set it there for data set "
                "and heads"
            )
        palette = content.get("palette") or np.random.default_rng(0).integers(0, 256, (num_classes, 3)).tolist()
        super().__init__(
            img_suffix=".jpg",
            seg_map_suffix=".png",
            reduce_zero_label=True,
            data_root=data_root,
            metainfo={"classes": classes, "palette": palette},
            **options,
        )
        self._check_masks(num_classes)

    def _check_masks(self, num_classes: int) -> None:
        if not len(self):
            raise DataError(f"no images in {self.data_prefix['img_path']}")
        for index in range(0, len(self), max(1, len(self) // NUM_CHECKED)):
            info = self.get_data_info(index)
            path = info["img_path"]
            try:
                with Image.open(path) as image:
                    size = image.size
                path = info["seg_map_path"]
                with Image.open(path) as image:
                    mask = np.asarray(image)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error}") from error
            if mask.ndim != 2:
                raise DataError(f"{path} has {mask.shape[-1]} channels: a mask has one, with the class of each pixel")
            if mask.shape[::-1] != size:
                raise DataError(f"{path} is {mask.shape[1]} x {mask.shape[0]} px, its image {size[0]} x {size[1]}")
            highest = int(mask[mask != IGNORED].max(initial=0))
            if highest > num_classes:
                raise DataError(
                    f"{path} has label {highest}, but the classes end at {num_classes}: mend the mask or classes.json"
                )
