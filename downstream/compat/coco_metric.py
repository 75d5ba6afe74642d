"""COCO's AP, also where nothing was detected. Needs mmdet."""

from __future__ import annotations

from typing import Any

from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS

ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


@METRICS.register_module()
class CocoMetricOrZero(CocoMetric):
    """mmdet's CocoMetric, but without a single detection the AP is 0.

    mmdet's gives no numbers then: the log goes on showing those of the validation before, and choosing a best checkpoint
    fails.
    """

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        metrics = super().compute_metrics(results)
        if not self.format_only:
            for kind in self.metrics:
                if kind in ("bbox", "segm"):
                    for item in self.metric_items or ITEMS:
                        metrics.setdefault(f"{kind}_{item}", 0.0)
        return metrics
