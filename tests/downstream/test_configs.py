"""Every config of detection and segmentation builds, covers its parameters, has the numbers of its recipe, and takes a step."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict

from downstream.checks.config import num_classes_of_heads
from tests.conftest import REPOSITORY
from tests.downstream.conftest import needs_mm

pytestmark = [pytest.mark.mm, needs_mm]
CONFIGS = sorted(
    path for task in ("detection", "segmentation") for path in (REPOSITORY / "configs" / task).glob("*.py")
)
# The smallest sizes that keep the structure: what each config would take a GPU for.
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config__builds(path):
    """Model and optimizer build, the groups cover the parameters, and the header has all its parts."""
    from downstream.layer_decay import LayerDecayConstructor

    config = read(path)
    with torch.device("meta"):
        model = build(config)
    assert config.optim_wrapper.constructor == "LayerDecayConstructor"
    paramwise = config.optim_wrapper.get("paramwise_cfg")
    wrapper = LayerDecayConstructor({"optimizer": config.optim_wrapper.optimizer}, paramwise)(model)
    groups = wrapper.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    assert config.auto_scale_lr.enable
    assert config.default_hooks.checkpoint.save_best
    assert all(word in path.read_text() for word in ("Command:", "Hardware:", "Expected:", "Source:"))


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


STEPPED = [path for path in CONFIGS if path.stem not in ("demo", "coco_mini", "scene_mini") and "_80k" not in path.stem]


@pytest.mark.parametrize("path", STEPPED, ids=lambda path: path.stem)
def test_config__one_step(path):
    """At a tiny size, with the config's own losses, optimizer and norms: all losses are finite, and the weights move."""
    from mmengine.optim import build_optim_wrapper

    torch.manual_seed(0)
    config = read(path)
    model_config = config.model
    shrink(model_config)
    backbone = model_config.backbone
    if backbone.type != "TimmFeatures":
        for head in (
            model_config.get("neck") or {},
            model_config.get("decode_head") or {},
            model_config.get("auxiliary_head") or {},
        ):
            if "in_channels" in head:
                head.in_channels = [16] * 4 if isinstance(head.in_channels, (list, tuple)) else 16
    if config.default_scope == "mmseg":
        model_config.data_preprocessor.size = (64, 64)
    model = build(config).train()
    model.init_weights()
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    before = [p.detach().clone() for p in model.backbone.parameters() if p.requires_grad]
    logs = model.train_step(batch(config), wrapper)
    found = {name: float(value) for name, value in logs.items() if "loss" in name}
    assert len(found) >= 3
    assert all(np.isfinite(value) for value in found.values()), found
    after = [p for p in model.backbone.parameters() if p.requires_grad]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > len(before) / 2


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


@pytest.mark.parametrize(
    ("name", "steps", "milestones", "decay", "drop_path", "global_blocks"),
    [
        ("base_coco_100e", 184375, [163889, 177546], 0.7, 0.1, [2, 5, 8, 11]),
        ("large_coco_100e", 184375, [163889, 177546], 0.8, 0.4, [5, 11, 17, 23]),
        ("huge_coco_75e", 138281, [122917, 133160], 0.9, 0.5, [7, 15, 23, 31]),
    ],
)
def test_config__vitdet_recipe(name, steps, milestones, decay, drop_path, global_blocks):
    config = read(REPOSITORY / f"configs/detection/mask_rcnn_vitdet_{name}.py")
    assert config.train_cfg.max_iters == steps
    warmup, drops = config.param_scheduler
    assert (warmup.end, warmup.start_factor) == (250, 0.001)
    assert (drops.milestones, drops.gamma) == (milestones, 0.1)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 64
    assert config.optim_wrapper.optimizer == ConfigDict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1)
    assert config.optim_wrapper.paramwise_cfg.layer_decay == decay
    assert "clip_grad" not in config.optim_wrapper
    backbone = config.model.backbone
    assert (backbone.drop_path_rate, list(backbone.global_blocks), backbone.window_size) == (
        drop_path,
        global_blocks,
        14,
    )
    assert backbone.patch_size == 16
    pipeline = {step.type: step for step in config.train_dataloader.dataset.pipeline}
    assert pipeline["RandomResize"].ratio_range == (0.1, 2.0)
    assert pipeline["RandomCrop"].crop_size == pipeline["Pad"].size == (1024, 1024)
    assert config.model.rpn_head.num_convs == 2
    assert config.model.roi_head.bbox_head.type == "Shared4Conv1FCBBoxHead"


def test_config__upernet_recipe():
    config = read(REPOSITORY / "configs/segmentation/upernet_vit_base_ade20k_160k.py")
    assert config.train_cfg.max_iters == 160000
    warmup, falling = config.param_scheduler
    assert (warmup.start_factor, warmup.end, falling.power, falling.end) == (1e-6, 1500, 1.0, 160000)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 16
    assert config.optim_wrapper.optimizer == ConfigDict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert config.optim_wrapper.paramwise_cfg.layer_decay == 0.65
    model = config.model
    assert (model.backbone.drop_path_rate, list(model.backbone.out_indices)) == (0.1, [3, 5, 7, 11])
    assert list(model.backbone.rescales) == [4, 2, 1, 0.5]
    assert (model.decode_head.channels, model.auxiliary_head.channels) == (768, 256)
    assert model.auxiliary_head.loss_decode.loss_weight == 0.4
    assert model.test_cfg == ConfigDict(mode="slide", crop_size=(512, 512), stride=(341, 341))


def test_config__swin_detection_recipe():
    config = read(REPOSITORY / "configs/detection/mask_rcnn_swin_tiny_coco_1x.py")
    assert config.optim_wrapper.optimizer == ConfigDict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert config.param_scheduler[0].end == 1000


def test_docs__own_configs_build(tmp_path):
    """The configs that docs/guides/transfer.md shows."""
    text = (REPOSITORY / "docs/guides/transfer.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(shown) == 4
    for number, content in enumerate(shown):
        path = tmp_path / f"own_{number}.py"
        path.write_text(content.replace('"configs/', f'"{REPOSITORY}/configs/'))
        config = read(path)
        with torch.device("meta"):
            build(config)
        heads = dict(num_classes_of_heads(config.model, "model"))
        assert set(heads.values()) == {(2, 7, 80, 80)[number]}
    assert config.optim_wrapper.accumulative_counts == 8
