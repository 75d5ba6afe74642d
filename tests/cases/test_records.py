"""Records of runs: undefined metrics, numbers that JSON does not know, and the weights that a run started from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mae_et.runs.record_files import read_summary, write_record
from mae_et.runs.records import DENSE_KINDS, DenseSummary, InitialWeights, PretrainSummary
from tests.conftest import REPOSITORY
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import main, words, write_data
from tests.report.folders import dense, pretrain, stage, training

SHORT = {"train_cfg.max_iters": 1, "train_cfg.val_interval": 1, "default_hooks.checkpoint.interval": 1}


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_case__F13c_no_nan_tokens(tmp_path, value):
    fields = training(1.0, [stage(32, 10)], 1.0, 1.0) | {"first_loss": value, "last_loss": value, "mfu": value}
    record = PretrainSummary(
        **fields, initial_weights=None, encoder_sha256="x", knn_top1_before=value, knn_top1_after=0.5
    )
    write_record(tmp_path / "summary.json", record)
    found = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert [found[key] for key in ("first_loss", "last_loss", "mfu", "knn_top1_before")] == [None] * 4
    assert read_summary(tmp_path / "summary.json") == record


@pytest.mark.parametrize("key", ["seconds", "train_petaflops", "images_per_second"])
def test_records__a_number_that_must_be_known_is_refused(key):
    fields = training(1.0, [stage(32, 10)], 1.0, 1.0) | {key: math.nan}
    with pytest.raises(ValueError, match=key):
        PretrainSummary(**fields, initial_weights=None, encoder_sha256="x", knn_top1_before=None, knn_top1_after=None)


def test_records__unknown_keys_and_types_are_named(tmp_path):
    folder = pretrain(tmp_path / "run")
    values = json.loads((folder / "summary.json").read_text())
    for change, said in (
        ({"num_step": 3}, "num_step: Extra inputs are not permitted"),
        ({"num_steps": "3"}, "num_steps: Input should be a valid integer, found '3'"),
        ({"num_steps": True}, "num_steps: Input should be a valid integer"),
        ({"stages": [{}]}, r"stages.0.bandwidth: Field required.*more faults"),
        ({"kind": "guess"}, "kind"),
    ):
        (folder / "summary.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=said):
            read_summary(folder / "summary.json")


@pytest.mark.mm
@needs_mm
def test_case__D16_undefined_metrics_are_null():
    from downstream.summary import plain

    found = plain({"coco/bbox_mAP": -1.0, "coco/bbox_mAP_s": 0.5, "mIoU": math.nan, "loss": -1.0, "name": "x"})
    assert found == {"coco/bbox_mAP": None, "coco/bbox_mAP_s": 0.5, "mIoU": None, "loss": -1.0}


@pytest.mark.mm
@needs_mm
@pytest.mark.parametrize("task", DENSE_KINDS)
def test_case__X5_X7_the_summary_says_which_weights_trained(tmp_path, task):
    """Random weights; then `load_from` together with a backbone, which it overwrites; then that backbone alone."""
    data = write_data(tmp_path / "data")

    def train(name: str, *arguments: object, **options: object) -> DenseSummary:
        config = REPOSITORY / "configs" / task / "demo.py"
        changes = words({**SHORT, **options})
        main(data, "train", config, "--work-dir", tmp_path / name, *arguments, "--cfg-options", *changes)
        summary = read_summary(tmp_path / name / "summary.json")
        assert isinstance(summary, DenseSummary)
        return summary

    backbone, checkpoint = data / "backbone.safetensors", tmp_path / "random" / "iter_1.pth"
    first = train("random")
    assert first.initial_weights is None
    assert "the backbone starts from random weights" in first.notes[0]
    loaded = train("loaded", "--backbone", backbone, load_from=checkpoint).initial_weights
    assert loaded is not None
    assert (Path(loaded.file), loaded.role) == (checkpoint, "model")
    assert loaded.sha256 is not None
    alone = train("alone", "--backbone", backbone).initial_weights
    assert isinstance(alone, InitialWeights)
    assert (Path(alone.file), alone.role, len(alone.encoder_sha256 or "")) == (backbone, "backbone", 64)


@pytest.mark.parametrize("task", DENSE_KINDS)
def test_records__the_range_of_metrics(tmp_path, task):
    name, limit = {"detection": ("coco/bbox_mAP", 1), "segmentation": ("mIoU", 100)}[task]
    dense(tmp_path / "good", task, {name: limit, "other": 1e9}, None)
    for value in (-1, limit * 1.01):
        with pytest.raises(ValueError, match=f"{name} = .* is outside"):
            dense(tmp_path / "bad", task, {name: value}, None)
