"""Checks of a config before anything runs: overrides without effect, normalization, classes, annotations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mae_et.errors import ConfigError, DataError, UserError
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import METADATA, read, write_data

pytestmark = [pytest.mark.mm, needs_mm]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mm"))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data_root", "'data_root' is a variable within the file"),
        ("max_iters", "'max_iters' is a variable within the file"),
        ("optim_wraper.optimizer.lr", "unknown key 'optim_wraper', did you mean 'optim_wrapper'"),
    ],
)
def test_overrides__without_effect(data, tmp_path, key, message):
    with pytest.raises(ConfigError, match=message):
        read(data, "detection", tmp_path, **{key: 1})


def test_overrides__all_that_is_read(data, tmp_path):
    config = read(data, "segmentation", tmp_path, load_from="x", randomness__seed=3, model__backbone__depth=2)
    assert (config.load_from, config.randomness.seed, config.model.backbone.depth) == ("x", 3, 2)


def test_check_backbone__names_both_and_the_fix(data, tmp_path):
    from downstream.checks.backbone import check_backbone

    backbone = {"file": "b.pth", "metadata": METADATA}
    config = read(data, "detection", tmp_path)
    check_backbone(config, backbone)
    check_backbone(config, {"file": "timm.pth", "metadata": {}})
    config.model.data_preprocessor.update(mean=[123.675, 116.28, 103.53], bgr_to_rgb=False)
    expected = (
        r"(?s)mean = \[123.675, 116.28, 103.53\], but b.pth was pre-trained with \[127.5, 127.5, 127.5\].*bgr_to_rgb is off.*"
        r"--cfg-options 'model.data_preprocessor.mean=\[127.5,127.5,127.5\]' .*model.data_preprocessor.bgr_to_rgb=True"
    )
    with pytest.raises(ConfigError, match=expected):
        check_backbone(config, backbone)
    imagenet = {"mean": "[0.485, 0.456, 0.406]", "std": "[0.229, 0.224, 0.225]"}
    config.model.data_preprocessor.update(std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
    check_backbone(config, {"file": "b.pth", "metadata": imagenet})  # rounded by others


def test_train__other_normalisation_stops(data, tmp_path):
    from downstream import run

    config = read(data, "segmentation", tmp_path, model__data_preprocessor__std=[58.0, 57.0, 57.0])
    run.set_backbone(config, data / "backbone.safetensors")
    run.prepare(config)
    with pytest.raises(ConfigError, match=r"std = \[58.0, 57.0, 57.0\], but .*backbone.safetensors"):
        run.train(config)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (
            "detection",
            {"model__roi_head__bbox_head__num_classes": 80},
            r"bbox_head.num_classes = 80, but .* has 10 classes",
        ),
        ("detection", {"model__roi_head__mask_head__num_classes": 7}, r"mask_head.num_classes = 7"),
        ("detection", {"val_evaluator__ann_file": "other.json"}, "val_evaluator.ann_file = other.json"),
        ("segmentation", {"model__auxiliary_head__num_classes": 150}, "auxiliary_head.num_classes = 150, but .* 18"),
        ("segmentation", {"train_dataloader__dataset__num_classes": 17}, "decode_head.num_classes = 18, but .* has 17"),
    ],
)
def test_check_data__classes_and_annotations_that_differ(data, tmp_path, task, changes, message):
    from downstream.checks.config import check_data

    check_data(read(data, task, tmp_path), ("train_dataloader", "val_dataloader", "test_dataloader"))
    config = read(data, task, tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        check_data(config, ("train_dataloader", "val_dataloader"))


def test_check_data__data_sets_within_others(data, tmp_path):
    from downstream.checks.config import check_data

    config = read(data, "detection", tmp_path)
    inner = config.train_dataloader.dataset
    config.train_dataloader.dataset = {"type": "RepeatDataset", "times": 2, "dataset": inner}
    inner.ann_file = "gone.json"
    with pytest.raises(DataError, match=r"no such annotations: .*gone.json"):
        check_data(config, ("train_dataloader",))
    config.train_dataloader.dataset = {"type": "ConcatDataset", "datasets": [inner]}
    with pytest.raises(DataError, match=r"gone.json"):
        check_data(config, ("train_dataloader",))


def test_evaluate__checks_the_test_set(data, tmp_path):
    from downstream import run

    config = read(data, "detection", tmp_path, test_dataloader__dataset__ann_file="gone.json")
    (tmp_path / "iter_1.pth").touch()
    with pytest.raises(DataError, match=r"gone.json"):
        run.evaluate(config, tmp_path / "iter_1.pth")


def test_prepare__precision(data, tmp_path, monkeypatch):
    """Without a GPU float32; with one float16 by default, and bfloat16 without a loss scale."""
    import torch

    from downstream import run
    from downstream.compat import machine

    config = read(data, "detection", tmp_path, optim_wrapper__dtype="bfloat16")
    run.prepare(config, amp=True)
    assert config.optim_wrapper.type == "OptimWrapper"
    assert "dtype" not in config.optim_wrapper
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = read(data, "detection", tmp_path)
    run.prepare(config)
    assert config.optim_wrapper.type == "OptimWrapper"
    run.prepare(config, amp=True)
    assert config.optim_wrapper.type == "AmpOptimWrapper"
    assert "loss_scale" not in config.optim_wrapper  # the library's default, dynamic
    config = read(data, "detection", tmp_path, optim_wrapper__dtype="bfloat16")
    run.prepare(config, amp=True)
    assert config.optim_wrapper.loss_scale == {"enabled": False}
    monkeypatch.setattr(machine, "provide_operators", lambda: "compiled")
    config = read(data, "detection", tmp_path, optim_wrapper__dtype="bfloat16")
    with pytest.raises(UserError, match="RoIAlign"):
        run.prepare(config, amp=True)


@pytest.mark.parametrize(
    ("batch_size", "accumulated", "world_size", "base", "message"),
    [
        (8, 1, 8, 64, ""),
        (8, 8, 1, 8, "a step sees 8 images, the recipe's 64: max_iters = 100 is 0.125 of its budget"),
        (2, 1, 1, 64, "batch 2, the recipe's is 64: its learning rates are multiplied by 0.03125"),
    ],
)
def test_scale_for_accumulation__accumulated_steps_count(caplog, batch_size, accumulated, world_size, base, message):
    from mmengine.config import ConfigDict

    from downstream.run import scale_for_accumulation

    config = ConfigDict(
        optim_wrapper={"accumulative_counts": accumulated}, train_dataloader={"batch_size": batch_size},
        train_cfg={"max_iters": 100},
    )  # fmt: skip
    runner = SimpleNamespace(
        auto_scale_lr=ConfigDict(enable=True, base_batch_size=64), cfg=config, world_size=world_size
    )
    scale_for_accumulation(runner)
    assert runner.auto_scale_lr.base_batch_size == base  # what mmengine divides batch_size * world_size by
    assert message in caplog.text
    assert bool(caplog.text) == bool(message)
