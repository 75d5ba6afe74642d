"""A data set whose classes stand in a file: images, masks of the same stems and a `classes.json`. Needs mmseg."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmcv
import mmengine.fileio
import numpy as np
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS, TRANSFORMS

from mae_et.data.mask_files import mask_options, pair_files, read_classes
from mae_et.errors import DataError

_NO_LABEL = -1


@TRANSFORMS.register_module()
class LoadMappedMask(LoadAnnotations):
    """Loads a mask, and turns its values into labels by a table.

    Args:
        labels: value -> label, 255 for unlabelled.
        **options: see `LoadAnnotations`.
    """

    def __init__(self, labels: Mapping[int, int], **options: Any) -> None:
        super().__init__(**options)
        self.table = np.full(256, _NO_LABEL, np.int16)
        for value, label in labels.items():
            self.table[value] = label

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        content = mmengine.fileio.get(results["seg_map_path"], backend_args=self.backend_args)
        mask = mmcv.imfrombytes(content, flag="unchanged", backend=self.imdecode_backend).squeeze().astype(np.int64)
        labels = self.table[mask.clip(0, 255)]
        wrong = (labels == _NO_LABEL) | (mask > 255)
        if wrong.any():
            raise DataError(
                f"{results['seg_map_path']} has the value {mask[wrong][0]}, which classes.json does not list. Add it to a class "
                "or to 'ignore'"
            )
        results["gt_seg_map"] = labels.astype(np.uint8)
        results["seg_fields"].append("gt_seg_map")


@DATASETS.register_module()
class ClassesFileDataset(BaseSegDataset):
    """Images and masks of any common suffix, with the classes of DATA_ROOT/classes.json.

    The forms of that file: `mae_et.data.mask_files.LAYOUT`. `downstream.checks.masks` inspects the files before a run.

    Args:
        num_classes: number of classes of the model's heads.
        data_root: the folder with classes.json.
        pipeline: its LoadAnnotations become `LoadMappedMask`.
        **options: as for BaseSegDataset.
    Raises:
        DataError: if there is no such file, it lists another number of classes, or images and masks do not pair.
    """

    def __init__(self, num_classes: int, data_root: str, pipeline: list[Any] | None = None, **options: Any) -> None:
        path = Path(data_root) / "classes.json"
        classes = read_classes(path)
        if len(classes.names) != num_classes:
            raise DataError(
                f"{path} lists {len(classes.names)} classes, the config has num_classes = {num_classes}. Set it in the config "
                "for data sets and heads"
            )
        random_colors = np.random.default_rng(0).integers(0, 256, (num_classes, 3)).tolist()
        self._folders = mask_options({**options, "data_root": data_root})
        super().__init__(
            data_root=data_root,
            metainfo={"classes": list(classes.names), "palette": classes.palette or random_colors},
            pipeline=_with_labels(pipeline or [], dict(classes.labels)),
            **options,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        """Returns one entry for each image with its mask."""
        pairs = pair_files(*self._folders)
        if pairs.lonely_images:
            raise DataError(
                f"{len(pairs.lonely_images)} images have no mask in {self._folders[1]}, e.g. {pairs.lonely_images[0]}. "
                "Add masks or remove these images"
            )
        if not pairs.files:
            raise DataError(f"no images in {self._folders[0]}")
        common = {"label_map": None, "reduce_zero_label": False}
        return [
            {"img_path": str(image), "seg_map_path": str(mask), "seg_fields": [], **common}
            for image, mask in pairs.files
        ]


def _with_labels(steps: Any, labels: dict[int, int]) -> Any:
    """Replaces LoadAnnotations in a pipeline, also within TestTimeAug."""
    if isinstance(steps, (list, tuple)):
        return type(steps)(_with_labels(step, labels) for step in steps)
    if not isinstance(steps, Mapping):
        return steps
    if str(steps.get("type")).rpartition(".")[2] == "LoadAnnotations":
        kept = {key: value for key, value in steps.items() if key not in ("type", "reduce_zero_label")}
        return {**kept, "type": "LoadMappedMask", "labels": labels}
    return {key: _with_labels(value, labels) for key, value in steps.items()}
