"""The hooks in real runs: stop at values that are not finite, seed each step, report no earlier AP."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from downstream.hooks.seeding import seed_streams
from mae_et.errors import NonFiniteError
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import METRICS, read, train, write_data

pytestmark = [pytest.mark.mm, needs_mm]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mm"))


@pytest.mark.parametrize("place", ["gradient", "loss"])
@pytest.mark.parametrize("task", METRICS)
def test_finite__stops_before_the_update_and_the_save(data, tmp_path, monkeypatch, task, place):
    from mmengine.model import BaseModel

    from downstream import run

    parse, weights = BaseModel.parse_losses, []

    def spoil(model, losses):
        loss, logs = parse(model, losses)
        if len(weights) == 1:
            weights.append({name: value.clone() for name, value in model.state_dict().items() if "running" not in name})
            weights.append(model)
            if place == "loss":  # seen in the log alone, as under a loss scale
                logs["loss"] = logs["loss"] * float("inf")
            else:
                loss = loss * float("nan")
        else:
            weights.append(None)
        return loss, logs

    monkeypatch.setattr(BaseModel, "parse_losses", spoil)
    config = read(data, task, tmp_path)
    run.prepare(config)
    with pytest.raises(NonFiniteError, match=r"step 2: stopped.*nonfinite_step_00000002.json.*clip_grad"):
        run.train(config)
    report = json.loads((tmp_path / "nonfinite_step_00000002.json").read_text())
    assert len(report["images_of_main_process"]) == 2
    assert all(name.endswith(".jpg") for name in report["images_of_main_process"])
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["iter_1.pth"]
    if place == "gradient":
        _, before, model = weights
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items() if "num_batches" not in name)


def test_seed_streams__follow_from_seed_step_and_purpose():
    def draw(*arguments):
        seed_streams(*arguments)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(1, 2, 0) == draw(1, 2, 0)
    assert len({draw(*a) for a in [(1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0)]}) == 4


def test_metric__nothing_detected_is_zero(data, tmp_path):
    """mmdet's own metric gives no number then, and the log repeats the value before."""
    summary = train(
        data,
        "detection",
        tmp_path,
        train_cfg__max_iters=1,
        train_cfg__val_interval=1,
        model__test_cfg__rcnn__score_thr=1.1,
    )
    names = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
    expected = {f"coco/{kind}_{name}": 0.0 for kind in ("bbox", "segm") for name in names}
    assert summary["metrics"] == {"step": 1, **expected}


def test_summary__the_best_checkpoint_of_a_copied_run_is_that_of_the_copy(tmp_path):
    from downstream.summary import SummaryHook

    checkpoint = {"message_hub": {"runtime_info": {"best_ckpt": "elsewhere/best_mIoU_iter_2.pth", "iter": 2}}}
    SummaryHook().after_load_checkpoint(SimpleNamespace(work_dir=str(tmp_path), cfg={"resume": True}), checkpoint)
    expected = {"best_ckpt": str(tmp_path / "best_mIoU_iter_2.pth"), "iter": 2}
    assert checkpoint["message_hub"]["runtime_info"] == expected


def test_summary__saving_and_validation_are_no_training_time(monkeypatch):
    """A clock that is moved by hand: a step takes 1, a save 10, a validation 100 seconds."""
    from downstream import summary

    clock = [0.0]
    monkeypatch.setattr(summary.time, "perf_counter", lambda: clock[0])
    hook, runner, batch = summary.SummaryHook(), SimpleNamespace(iter=0, cfg={}), {"inputs": [0, 0, 0]}
    hook.before_train_epoch(runner)
    for step in range(4):
        clock[0] += 1
        if step == 2:
            hook.before_save_checkpoint(runner, {})
            clock[0] += 10
        hook.after_train_iter(runner, step, batch, {"loss": torch.tensor(1.0)})
        if step == 2:
            hook.before_val(runner)
            clock[0] += 50
            hook.before_save_checkpoint(runner, {})  # the best so far
            clock[0] += 50
            hook.after_val(runner)
    assert (hook.train_seconds, hook.num_images) == (3, 9)  # the first step warms up
    assert hook._seconds() == 114
