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
from tests.downstream.small import batch, build, read, shrink

pytestmark = [pytest.mark.mm, needs_mm]
CONFIGS = sorted(
    path for task in ("detection", "segmentation") for path in (REPOSITORY / "configs" / task).glob("*.py")
)


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


# The others differ from these in the schedule, or in the size of Swin.
STEPPED = [
    path
    for path in CONFIGS
    if path.stem not in ("demo", "coco_mini", "scene_mini") and not re.search("_80k|swin_(small|base)", path.stem)
]


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
    assert len(shown) == 5
    for number, content in enumerate(shown):
        path = tmp_path / f"own_{number}.py"
        path.write_text(content.replace('"configs/', f'"{REPOSITORY}/configs/'))
        config = read(path)
        with torch.device("meta"):
            build(config)
        heads = dict(num_classes_of_heads(config.model, "model"))
        assert set(heads.values()) == {(80, 2, 7, 80, 80)[number]}
    assert config.optim_wrapper.accumulative_counts == 8
