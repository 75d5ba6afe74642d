"""Configs of detection and segmentation at the smallest sizes that keep their structure, and a batch for them."""

from __future__ import annotations

import numpy as np
import torch

SMALL_VIT = {"embed_dim": 16, "num_heads": 2, "depth": 4, "global_blocks": None, "out_indices": (0, 1, 2, 3)}
SMALL_HEADS = {"channels": 8, "feat_channels": 8, "out_channels": 8, "conv_out_channels": 8, "fc_out_channels": 8}


def read(path):
    from mmengine.registry import init_default_scope

    from downstream import run

    config = run.read_config(path)
    run.prepare(config)
    init_default_scope(config.default_scope)
    return config


def build(config):
    from mmdet.registry import MODELS as DETECTORS
    from mmseg.registry import MODELS as SEGMENTORS

    return {"mmdet": DETECTORS, "mmseg": SEGMENTORS}[config.default_scope].build(config.model)


def shrink(node):
    """Makes all parts of a model small."""
    if isinstance(node, dict):
        if node.get("type") in ("ViTDet", "ViTSeg"):
            node.update({key: value for key, value in SMALL_VIT.items() if key in node})
            node.img_size = 64
        if node.get("type") == "TimmFeatures":
            return
        for key, value in node.items():
            if key in SMALL_HEADS and isinstance(value, int):
                node[key] = SMALL_HEADS[key]
            elif key == "in_channels" and value == 256:
                node[key] = 8
            shrink(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            shrink(value)


def batch(config):
    """Two images of 64 px, the second one without objects."""
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    if config.default_scope == "mmseg":
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples = [SegDataSample(metainfo={"img_shape": (64, 64), "ori_shape": (64, 64)}) for _ in images]
        labels = [torch.randint(0, 150, (1, 64, 64)), torch.full((1, 64, 64), 255)]
        for sample, label in zip(samples, labels, strict=True):
            sample.gt_sem_seg = PixelData(data=label)
        return {"inputs": images, "data_samples": samples}
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    samples = []
    for num in (2, 0):
        corners = torch.rand(num, 2) * 30
        boxes = torch.cat([corners, corners + 8 + torch.rand(num, 2) * 20], dim=1)
        masks = np.zeros((num, 64, 64), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        meta = {"img_shape": (64, 64), "ori_shape": (64, 64), "pad_shape": (64, 64), "scale_factor": (1.0, 1.0)}
        sample = DetDataSample(metainfo={**meta, "batch_input_shape": (64, 64)})
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(num), masks=BitmapMasks(masks, 64, 64))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}
