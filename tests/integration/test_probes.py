"""Sweep, few-shot and attentive probe: whole verdicts on small images."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from mae_et.config.schema import ClassifyConfig, from_dict
from mae_et.curriculum.cost import attentive_probe_cost, vit_flops
from mae_et.data.sources.spec import open_source
from mae_et.data.sources.subset import subset_of
from mae_et.errors import ConfigError, DataError
from mae_et.evaluation.collect import Collected
from mae_et.models.linear_probe import AttentiveProbe
from mae_et.models.vit import random_vit
from mae_et.report.join import make_benchmark
from mae_et.report.tables import make_tables
from mae_et.runs.record_files import read_summary
from mae_et.storage.backbone import write_safetensors
from mae_et.tasks.cached_features import select
from mae_et.tasks.classify import classify
from tests.integration.test_classify import WIDTHS, run, values

DATA = {"data__train": "scenes:60@32,seed=3", "data__val": "scenes:30@32,seed=4"}


def config_of(protocol: str, **overrides: object) -> ClassifyConfig:
    base = values("finetune", **{**DATA, **overrides}) | {"protocol": protocol}
    for name in ("curriculum", "batch", "optimizer", "regularization"):
        base.pop(name)
    base["run"] = {key: value for key, value in base["run"].items() if key in ("precision", "seed")}
    return from_dict(ClassifyConfig, base)


def test_linear_sweep__chooses_without_the_validation_images(tmp_path: Path) -> None:
    settings = {"sweep__lrs": [0.01, 0.1], "sweep__weight_decays": [0.0, 0.01], "sweep__epochs": 20}
    config = config_of("linear_sweep", **settings)
    summary = classify(config, tmp_path / "a", device="cpu")
    (head,) = summary["chosen"]
    rows = list(csv.DictReader((tmp_path / "a" / "sweep.csv").open()))
    assert len(rows) == 4
    assert head["accuracy"] == max(float(row["accuracy"]) for row in rows)
    assert summary["num_train"] == 60
    assert summary["top1_by_draw"] == []
    assert any("of sweep.lrs: a better one may lie beyond" in note for note in summary["notes"])
    # Other validation images change the accuracy and nothing of the choice.
    other = classify(
        config_of("linear_sweep", **settings, data__val="scenes:20@32,seed=9"), tmp_path / "b", device="cpu"
    )
    assert (tmp_path / "a" / "sweep.csv").read_text() == (tmp_path / "b" / "sweep.csv").read_text()
    assert other["chosen"] == summary["chosen"]
    # The chosen pair is trained on all images: with this pair alone the result is the same.
    fixed = {"sweep__lrs": [head["lr"]], "sweep__weight_decays": [head["weight_decay"]], "sweep__epochs": 20}
    assert classify(config_of("linear_sweep", **fixed), tmp_path / "c", device="cpu")["top1"] == summary["top1"]


def test_few_shot__is_the_mean_over_draws_and_reaches_the_report(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = tmp_path / "backbone.safetensors"
    write_safetensors(random_vit(32, patch_size=8, **WIDTHS).state_dict(), backbone, {"num_heads": "3"})
    settings = {"knn__ks": [3], "labels__images_per_class": 2, "backbone": str(backbone)}
    config = config_of("knn", **settings, labels__num_draws=4)
    summary = classify(config, tmp_path / "runs" / "knn", device="cpu")
    draws = summary["top1_by_draw"]
    assert len(draws) == 4
    assert summary["top1"] == pytest.approx(statistics.fmean(draws)) == summary["top1_by_k"]["3"]
    assert summary["top1_sd"] == pytest.approx(statistics.stdev(draws))
    assert (summary["num_train"], summary["num_val"]) == (2 * summary["num_classes"], 30)
    with open(tmp_path / "runs" / "knn" / "per_class.csv") as file:
        assert sum(int(row["num_images"]) for row in csv.DictReader(file)) == 30
    # A draw is that of its seed alone.
    one = config_of("knn", **settings, labels__num_draws=1, run__seed=2)
    assert classify(one, tmp_path / "one", device="cpu")["top1_by_draw"] == [draws[2]]
    read_summary(tmp_path / "runs" / "knn" / "summary.json")
    run(tmp_path / "runs" / "all", "knn", knn__ks=[3], backbone=str(backbone), **DATA)
    (table,) = [table for table in make_tables(make_benchmark([tmp_path / "runs"])) if table.section == "transfer"]
    labels = [column.label for column in table.columns if column.label.startswith("kNN")]
    assert any("images_per_class 2" in label for label in labels)  # not averaged with all labels


def test_select__keeps_blocks_of_each_process() -> None:
    whole = Collected(torch.arange(10.0)[:, None], torch.arange(10), [4, 4, 2], {})
    assert select(whole, np.array([1, 2, 9]), 0).batch_sizes == [2, 1]
    second = Collected(torch.arange(6.0, 10.0)[:, None], torch.arange(10), [3, 1], {})
    kept = select(second, np.array([1, 7, 8, 9]), 6)
    assert (kept.outputs[:, 0].tolist(), kept.labels.tolist(), kept.batch_sizes) == ([7, 8, 9], [1, 7, 8, 9], [2, 1])


def test_attentive_probe__pools_patches_by_its_query_and_trains_it_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    probe = AttentiveProbe(random_vit(16, patch_size=8, embed_dim=12, depth=1, num_heads=3), 5).eval()
    images = torch.randn(2, 3, 16, 16)
    patches = probe.encoder.forward_features(images)[:, 1:]
    patches = patches / (1 + 1e-6) ** 0.5  # the BatchNorm before training
    w, b = probe.attention.in_proj_weight, probe.attention.in_proj_bias
    query, key, value = (
        x @ w[12 * i : 12 * i + 12].T + b[12 * i : 12 * i + 12]
        for i, x in enumerate((probe.query[0], patches, patches))
    )
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        attention = (key[..., part] @ query[0, part] / 2).softmax(dim=1)
        heads.append((attention[..., None] * value[..., part]).sum(1))
    expected = probe.head(torch.cat(heads, 1) @ probe.attention.out_proj.weight.T + probe.attention.out_proj.bias)
    torch.testing.assert_close(probe(images), expected, rtol=1e-4, atol=1e-5)

    summary = run(tmp_path / "run", "attentive_probe", optimizer__base_lr=0.02, labels__images_per_class=1)
    assert summary["kind"] == "attentive_probe"
    assert summary["last_loss"] < summary["first_loss"]
    assert summary["dataset_size"] == 10


def test_attentive_probe__counts_its_pooling_three_times() -> None:
    model = config_of("linear_sweep").model
    width, patches = 48, 16
    pooling = 2 * (2 * patches * width**2 + 2 * width**2 + 2 * patches * width)
    cost = attentive_probe_cost(model)
    assert cost.forward_flops(32) == vit_flops(model, 32) + 3 * pooling
    assert cost.backward_factor == 1


def test_subset_of__maps_every_access(tmp_path: Path) -> None:
    source = open_source("scenes:6@32,seed=1")
    part = subset_of(source, np.array([4, 1]))
    assert len(part) == 2
    assert part.labels.tolist() == [source.labels[4], source.labels[1]]
    assert part.name(0) == source.name(4)
    assert part.load(1).tobytes() == source.load(1).tobytes()


@pytest.mark.parametrize(
    ("protocol", "overrides", "error", "message"),
    [
        ("knn", {"labels__images_per_class": 99, "knn__ks": [3]}, DataError, r"labels\.images_per_class = 99, but"),
        ("knn", {"labels__images_per_class": 1}, ConfigError, r"k = 200 exceeds the \d+ labelled images .* `labels` leaves"),
        ("linear_sweep", {"labels__images_per_class": 1}, ConfigError, "one for each class, so none is left to choose"),
        ("linear_sweep", {"sweep__lrs": []}, ConfigError, "must have at least one value"),
        ("knn", {"labels__images_per_class": 1, "labels__fraction": 0.5}, ConfigError, "both set the number of labels"),
        ("knn", {"labels__num_draws": 3}, ConfigError, r"num_draws = 3 has no effect with all labels"),
        ("knn", {"sweep__epochs": 3}, ConfigError, r"sweep\.epochs = 3 has no effect"),
        ("attentive_probe", {"model__pool": "token"}, ConfigError, r"model\.pool = 'token' has no effect"),
    ],
)  # fmt: skip
def test_probes__bad_input(protocol: str, overrides: dict, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        classify(config_of(protocol, **overrides), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
