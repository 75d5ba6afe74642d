"""COCO's annotations and AP where mmdetection's own classes give a wrong result or none. Needs mmdet."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS
from mmengine.logging import MMLogger
from pycocotools import mask as mask_tools

from downstream.checks.coco import has_area

ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


class CocoByNames(COCO):
    """Reads annotations so that neither their order nor optional fields matter.

    - Category ids come in the order of the names asked for. pycocotools gives them in the order of the json, which shifts
      all labels where `metainfo.classes` has another order.
    - `iscrowd` defaults to 0, `area` to the mask's or else the box's.
    - Annotation ids count from 1. COCO's evaluation takes an object of id 0 for unmatched.

    `downstream.checks.coco` counts what is completed here.
    """

    def __init__(self, annotation_file: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # progress of pycocotools, which names no file
            super().__init__(annotation_file)

    def createIndex(self) -> None:
        """Completes the annotations before pycocotools indexes them."""
        images = {image["id"]: image for image in self.dataset["images"]}
        for number, item in enumerate(self.dataset["annotations"], 1):
            item["id"] = number
            item["iscrowd"] = int(item.get("iscrowd") or 0)
            if not has_area(item):
                item["area"] = computed_area(item, images[item["image_id"]])
        super().createIndex()

    def get_cat_ids(
        self, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (), cat_ids: Sequence[int] = ()
    ) -> list[int]:
        """Returns category ids, in the order of `cat_names` where they are given."""
        names = [cat_names] if isinstance(cat_names, str) else list(cat_names)
        found = super().get_cat_ids(names, list(sup_names), list(cat_ids))
        return sorted(found, key=lambda category: names.index(self.cats[category]["name"])) if names else found


def computed_area(item: dict[str, Any], image: dict[str, Any]) -> float:
    """Returns the area of an object in px: of its mask if it has one, else of its box."""
    outline, height, width = item.get("segmentation"), image["height"], image["width"]
    if isinstance(outline, list):
        outline = [polygon for polygon in outline if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if outline:
        if isinstance(outline, list):
            runs = mask_tools.merge(mask_tools.frPyObjects(outline, height, width))
        elif isinstance(outline["counts"], list):
            runs = mask_tools.frPyObjects(outline, height, width)
        else:
            runs = outline
        if area := float(mask_tools.area(runs)):
            return area
    return float(item["bbox"][2] * item["bbox"][3])


@DATASETS.register_module()
class CocoDatasetByNames(CocoDataset):
    """mmdetection's CocoDataset with labels that follow `metainfo.classes`; see `CocoByNames`."""

    COCOAPI = CocoByNames


@METRICS.register_module()
class CocoMetricByNames(CocoMetric):
    """mmdetection's CocoMetric with labels that follow `metainfo.classes`, and an AP of 0 where nothing was detected.

    Without a single detection mmdetection's gives no numbers: the log repeats those of the validation before, and choosing
    a best checkpoint fails. An AP over objects of a size that the set does not have is left out, in place of -1.
    """

    def __init__(self, ann_file: str | None = None, sort_categories: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if ann_file is not None:
            self._coco_api = CocoByNames(ann_file)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Computes the metrics of all results, without the prints of pycocotools."""
        with contextlib.redirect_stdout(io.StringIO()):
            metrics = super().compute_metrics(results)
        if not self.format_only:
            for kind in self.metrics:
                if kind in ("bbox", "segm"):
                    for item in self.metric_items or ITEMS:
                        metrics.setdefault(f"{kind}_{item}", 0.0)
        undefined = [name for name, value in metrics.items() if value == -1]
        if undefined:
            MMLogger.get_current_instance().info(f"no such objects in the set, so no {', '.join(undefined)}")
        return {name: value for name, value in metrics.items() if name not in undefined}
