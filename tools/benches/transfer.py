"""One training iteration of Mask R-CNN and of UperNet with ViT-B; needs the packages of requirements-mm.txt.

The references: the same detector with ViTDet's attention, and mmsegmentation's own MAE backbone in its own config.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benches.attention import explicit_attention
from benches.measuring import Comparison, Variants, compare, measure
from benches.memory import compare_memory, peak_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIDE = 512  # px


def detection_step(form: str) -> Callable[[], None]:
    """Mask R-CNN with ViT-B at 512 px, one image; "explicit": the same model with ViTDet's attention."""
    config = _model_config("detection/mask_rcnn_vitdet_base_coco_100e.py", {"model.backbone.img_size": SIDE})
    step = _training_step(config, "mmdet", num_classes=80, num_images=1)
    return step if form == "ours" else _with_explicit_attention(step)


def segmentation_step(form: str) -> Callable[[], None]:
    """UperNet with ViT-B at 512 px, two images; "mmseg": the library's own MAE and neck."""
    if form == "ours":
        config = _model_config("segmentation/upernet_vit_base_ade20k_160k.py", {})
    else:
        import mmseg

        own = Path(mmseg.__file__).parent / ".mim/configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py"
        config = _model_config(own, {"model.pretrained": None})
    return _training_step(config, "mmseg", num_classes=150, num_images=2)


def bench_transfer(rounds: int) -> list[Comparison]:
    rows = []
    for title, step, reference in (
        ("Mask R-CNN ViT-B, 512 px, 1 image, against ViTDet's attention", detection_step, "explicit"),
        ("UperNet ViT-B, 512 px, 2 images, against mmsegmentation's MAE", segmentation_step, "mmseg"),
    ):
        variants: Variants = {form: step(form) for form in ("ours", reference)}
        row = compare(title, measure(variants, rounds), "ours", reference, None)
        peaks = {form: peak_of(step, form) for form in ("ours", reference)}
        rows.append({**row, **compare_memory(peaks, "ours", reference, None)})
    return rows


def _model_config(path: str | Path, overrides: dict[str, Any]) -> Any:
    from downstream.run import prepare, read_config

    config = read_config(CONFIGS / path, overrides)
    prepare(config)
    return config


def _training_step(config: Any, scope: str, num_classes: int, num_images: int) -> Callable[[], None]:
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope

    MMLogger.get_current_instance().setLevel("WARNING")  # else it lists every parameter's first value
    init_default_scope(scope)
    if scope == "mmdet":
        from mmdet.registry import MODELS
    else:
        from mmseg.registry import MODELS
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    model.train()
    data = (_detection_data if scope == "mmdet" else _segmentation_data)(num_images, num_classes)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        init_default_scope(scope)
        torch.manual_seed(0)  # the same proposals and paths are dropped each time
        inputs = model.data_preprocessor(data, training=True)
        loss, _ = model.parse_losses(model(**inputs, mode="loss"))
        torch.autograd.grad(loss, parameters, allow_unused=True)

    return run


def _detection_data(num_images: int, num_classes: int) -> dict[str, Any]:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(num_images):
        corner = torch.randint(0, SIDE // 2, (8, 2), generator=generator)
        size = torch.randint(32, SIDE // 2, (8, 2), generator=generator)
        masks = torch.zeros(8, SIDE, SIDE, dtype=torch.uint8)
        for mask, (x, y), (w, h) in zip(masks, corner.tolist(), size.tolist(), strict=True):
            mask[y : y + h, x : x + w] = 1
        instances = InstanceData(
            bboxes=torch.cat([corner, corner + size], dim=1).float(),
            labels=torch.randint(0, num_classes, (8,), generator=generator),
            masks=BitmapMasks(masks.numpy(), SIDE, SIDE),
        )
        shape = (SIDE, SIDE)
        sample = DetDataSample(
            gt_instances=instances,
            metainfo={"img_shape": shape, "ori_shape": shape, "pad_shape": shape, "scale_factor": (1.0, 1.0)},
        )
        samples.append(sample)
    images = [torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator) for _ in samples]
    return {"inputs": images, "data_samples": samples}


def _segmentation_data(num_images: int, num_classes: int) -> dict[str, Any]:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(num_images):
        labels = torch.randint(0, num_classes, (1, SIDE, SIDE), generator=generator)
        sample = SegDataSample(metainfo={"img_shape": (SIDE, SIDE), "ori_shape": (SIDE, SIDE)})
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    images = [torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator) for _ in samples]
    return {"inputs": images, "data_samples": samples}


def _with_explicit_attention(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with unittest.mock.patch("downstream.backbones.attention.relative_attention", explicit_attention):
            step()

    return run
