"""Measures without labels while a masked autoencoder trains: what is logged, and that it changes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.data.sources.spec import open_source
from mae_et.data.transforms import EvalTransform
from mae_et.errors import ConfigError, DataError
from mae_et.evaluation.label_free import alpha_req, rank_me
from mae_et.report.facts import describe
from mae_et.report.scan import discover
from mae_et.storage.checkpoint import list_checkpoints, load_checkpoint
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks.masks import place_noise
from mae_et.tasks.pretrain import MAETask, build_model, pretrain
from tests.conftest import losses, small_values


@pytest.fixture
def unlabelled(tmp_path: Path) -> str:
    folder, source = tmp_path / "held_out", open_source("scenes:9@40,seed=5")
    folder.mkdir()
    for i in range(len(source)):
        source.load(i).save(folder / f"{i}.png")
    return str(folder)


def test_label_free__is_logged_recorded_and_changes_no_loss(tmp_path: Path, unlabelled: str) -> None:
    values = small_values(data__val=unlabelled, run__label_free_interval=10, curriculum__equivalent_epochs=5.2)
    config = from_dict(PretrainConfig, values)
    summary = pretrain(config, tmp_path / "run", device="cpu")
    pretrain(from_dict(PretrainConfig, small_values()), tmp_path / "plain", device="cpu")
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")

    lines = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "val/rankme" in line]
    assert [line["step"] for line in lines] == [0, 10, 20, 24]
    assert not any("knn/top1" in line for line in lines)  # no labels
    assert summary["held_out_loss"] == lines[-1]["val/loss"] < lines[0]["val/loss"]

    model = build_model(config)
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    model.load_state_dict(load_checkpoint(newest)["model"])
    source, transform = open_source(unlabelled), EvalTransform(32)
    images = torch.stack([transform(source.load(i)) for i in range(9)]).float() / 255
    images = (images - 0.5) / 0.25
    with torch.no_grad():
        loss = model.eval()(images, 0.5, place_noise(torch.arange(9), 16, 0))[0]
        features = model.features(images)[:, 1:].mean(dim=1)
    assert summary["held_out_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert summary["rankme"] == pytest.approx(rank_me(features), rel=1e-4)
    assert summary["alpha_req"] == pytest.approx(alpha_req(features), rel=1e-3)

    (found,) = discover([tmp_path / "run"])
    assert describe(found)["rankme"] == summary["rankme"]
    assert found.metrics["val/alpha_req"].notna().sum() == 4


def test_label_free__missing_labels_are_refused_only_without_it(unlabelled: str, caplog) -> None:
    with pytest.raises(DataError, match=r"has no labels .*or set run\.label_free_interval"):
        MAETask.open_data(from_dict(PretrainConfig, small_values(data__val=unlabelled)))
    values = small_values(data__val=unlabelled, run__label_free_interval=5)
    assert MAETask.open_data(from_dict(PretrainConfig, values)).val is not None
    assert "no kNN accuracy" in caplog.text
    with pytest.raises(DataError, match="does not exist"):
        MAETask.open_data(from_dict(PretrainConfig, small_values(data__val="absent", run__label_free_interval=5)))
    with pytest.raises(ConfigError, match=r"run\.label_free_interval = 5 has no effect with data\.val = None"):
        from_dict(PretrainConfig, small_values(run__label_free_interval=5))
