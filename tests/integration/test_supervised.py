"""Whole supervised trainings: all families through a change of the input size, kills on both sides of it, files, accuracies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import metaformer, register_model
from timm.models.metaformer import Attention, SepConv

from mae_et.config.schema import from_dict
from mae_et.config.supervised import SupervisedConfig
from mae_et.data.order import ImageOrder
from mae_et.errors import CheckpointError, ConfigError, DataError, UserError
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.resize import change_input_size
from mae_et.models.timm_backbone import create_backbone
from mae_et.runs.record_files import read_summary
from mae_et.runs.records import SupervisedSummary
from mae_et.storage import checkpoint
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks.run import run_training
from mae_et.tasks.supervised import SupervisedTask, train_supervised
from mae_et.tasks.supervised_weights import match_head
from tests.conftest import Stop, killed_before, losses


@register_model
def caformer_for_tests(pretrained: bool = False, **kwargs: Any) -> metaformer.MetaFormer:
    """timm's CAFormers have fixed widths and depths."""
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 32), "token_mixers": [SepConv, SepConv, Attention, Attention]}
    norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
    return metaformer._create_metaformer(
        "caformer_s18", pretrained, norm_layers=norms, use_mlp_head=True, **sizes, **kwargs
    )


TRAIN, VAL = "scenes:20@64,seed=3", "scenes:15@64,seed=4"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}),
    "convnext": ("convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
    "deit": ("deit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "pvt": ("pvt_tiny", {"depths": [1, 1, 1, 1]}),
    "swin": (
        "swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
    ),
    "cswin": ("cswin_tiny_224", {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [2, 2, 4, 4]}),
    "caformer": ("caformer_for_tests", {}),
}  # fmt: skip
WITH_TABLES = ("deit", "pvt", "swin")
BOUNDARY = 10  # first step at 64 px


def values(family: str = "resnet", **overrides: Any) -> dict[str, Any]:
    """Returns config values of a run of 16 steps, 10 at 32 px and 6 at 64 px; "__" in an override stands for "."."""
    name, options = FAMILIES[family]
    base: dict[str, Any] = {
        "data": {"train": TRAIN, "val": VAL, "image_size": 64, "num_workers": 0},
        "model": {"name": name, "options": options, "drop_path_rate": 0.1},
        "curriculum": {
            "preset": "custom",
            "stages": [
                {"compute_fraction": 2.5 / 8.5, "bandwidth": 32, "strength": 0.0},
                {"compute_fraction": 6 / 8.5, "bandwidth": 64, "strength": 1.0},
            ],
            "equivalent_epochs": 1.7,
            "baseline_equivalent_epochs": 1.7,
            "warmup_equivalent_epochs": 0.2,
        },
        "batch": {"global_batch_size": 4},
        "optimizer": {"base_lr": 0.064, "clip_grad_norm": 5.0},
        "regularization": {"ema_decay": 0.9},
        "run": {"precision": "fp32", "log_interval": 1, "save_interval": 2},
        "eval_interval": 8,
    }
    for key, value in overrides.items():
        *parents, last = key.split("__")
        node = base
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return base


def config_of(family: str = "resnet", **overrides: Any) -> SupervisedConfig:
    return from_dict(SupervisedConfig, values(family, **overrides))


def last_state(work_dir: Path) -> dict[str, Any]:
    return checkpoint.load_checkpoint(sorted((work_dir / "checkpoints").glob("step_*.pt"))[-1])


def assert_equal(ours: Any, theirs: Any, where: str = "state") -> None:
    """Compares nested values; tensors to the bit."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    work_dir = tmp_path_factory.mktemp(request.param) / "run"
    train_supervised(config_of(request.param), work_dir, device="cpu")
    return request.param, work_dir


@pytest.mark.parametrize("killed_at", [BOUNDARY - 1, BOUNDARY + 1, BOUNDARY + 3])
def test_supervised__killed_and_resumed_to_the_bit_around_a_change_of_size(trained, killed_at, tmp_path):
    family, undisturbed = trained
    with pytest.raises(Stop):
        run_training(killed_before(SupervisedTask, killed_at), config_of(family), tmp_path, device="cpu")
    train_supervised(config_of(family), tmp_path, resume=True, device="cpu")
    ours, theirs = last_state(tmp_path), last_state(undisturbed)
    for key in ("model", "ema", "optimizer"):
        assert_equal(ours[key], theirs[key], key)
    assert losses(tmp_path) == losses(undisturbed)


def test_supervised__every_parameter_gets_a_gradient(trained):
    """DDP waits for the gradients of all parameters."""
    optimizer = last_state(trained[1])["optimizer"]
    assert len(optimizer["state"]) == sum(len(group["params"]) for group in optimizer["param_groups"]) > 5


def test_supervised__summary_and_files(trained):
    family, work_dir = trained
    summary = read_summary(work_dir / "summary.json")
    assert isinstance(summary, SupervisedSummary)
    assert (summary.model, summary.num_val, summary.num_steps) == (FAMILIES[family][0], 15, 16)
    assert [stage.bandwidth for stage in summary.stages] == [32, 64]
    lines = [line for line in read_jsonl(work_dir / "metrics.jsonl") if "val/top1" in line]
    assert [(line["step"], "val/stage_top1" in line) for line in lines] == [(8, True), (16, False)]
    assert summary.top1 == lines[-1]["val/top1"]


def test_supervised__timm_loads_the_files_by_name(trained):
    family, work_dir = trained
    with safe_open(work_dir / "classifier.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["architecture"] == FAMILIES[family][0]
    options = json.loads(metadata["model_options"])
    size, num_classes = json.loads(metadata["image_size"]), len(json.loads(metadata["class_names"]))
    classifier = create_backbone(metadata["architecture"], size, num_classes=num_classes, **options)
    state = load_file(work_dir / "classifier.safetensors")
    classifier.load_state_dict(state)  # strict
    backbone = create_backbone(metadata["architecture"], size, num_classes=0, **options)
    backbone.load_state_dict(load_file(work_dir / "backbone.safetensors"))
    images = torch.rand(2, 3, 64, 64)
    classifier.eval(), backbone.eval()
    with torch.no_grad():
        features = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
        assert torch.equal(backbone(images), features)
    # The files hold the average of the weights, at the size of the images.
    assert_equal(dict(state), dict(last_state(work_dir)["ema"]))


def test_supervised__optimizer_follows_the_tables(trained):
    _, work_dir = trained
    state = last_state(work_dir)
    shapes = {tuple(value.shape) for value in state["model"].values()}
    for moments in state["optimizer"]["state"].values():
        assert tuple(moments["exp_avg"].shape) in shapes
        assert bool((moments["exp_avg_sq"] >= 0).all())


@pytest.mark.parametrize("family", WITH_TABLES)
def test_supervised__evaluates_at_both_sizes_without_touching_the_run(family, tmp_path):
    train_supervised(config_of(family, data__val=None, eval_interval=None), tmp_path / "blind", device="cpu")
    train_supervised(config_of(family, eval_interval=3), tmp_path / "watched", device="cpu")
    assert losses(tmp_path / "blind") == losses(tmp_path / "watched")
    summary = read_summary(tmp_path / "blind" / "summary.json")
    assert summary.top1 is None
    assert not (tmp_path / "blind" / "confusion.csv").exists()


def test_supervised__accuracy_is_that_of_the_files(tmp_path):
    config = config_of("swin")
    summary = train_supervised(config, tmp_path, device="cpu")
    data = SupervisedTask.open_data(config)
    model = create_backbone(
        config.model.name, 64, num_classes=len(data.class_names), **config.model.options
    ).eval()  # fmt: skip
    model.load_state_dict(load_file(tmp_path / "classifier.safetensors"))
    from mae_et.data.transforms import EvalTransform

    transform = EvalTransform(64, config.data.eval_crop_ratio)
    images = torch.stack([transform(data.val.load(i)) for i in range(15)])
    with torch.no_grad():
        logits = model(crop_and_normalize(images, 64, config.data.mean, config.data.std))
    correct = logits.argmax(1) == torch.tensor(list(data.val.labels))
    assert summary["top1"] == pytest.approx(correct.double().mean().item())


def test_supervised__starts_from_a_file_of_another_size_and_other_classes(tmp_path):
    train_supervised(config_of("deit"), tmp_path / "first", device="cpu")
    config = config_of(
        "deit", model__init_from=str(tmp_path / "first"), data__image_size=96, curriculum__preset="constant",
        curriculum__stages=[], optimizer__base_lr=1e-12, optimizer__min_lr=0.0,
    )  # fmt: skip
    train_supervised(config, tmp_path / "second", device="cpu")
    expected = create_backbone("deit_tiny_patch16_224", 64, num_classes=0, **FAMILIES["deit"][1])
    expected.load_state_dict(load_file(tmp_path / "first" / "backbone.safetensors"))
    change_input_size(expected, None, None, 96)
    found = load_file(tmp_path / "second" / "backbone.safetensors")
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)


def test_match_head__rows_by_name_and_the_mean_row():
    stored = {"weight": torch.arange(12.0).view(4, 3), "bias": torch.arange(4.0), "norm": torch.ones(3)}
    new = {"weight": torch.zeros(3, 3), "bias": torch.zeros(3), "norm": torch.zeros(3)}
    head = match_head(stored, new, ["a", "b", "c", "d"], ["d", "x", "a"], "file")
    assert torch.equal(head["bias"], torch.tensor([3.0, 1.5, 0.0]))
    assert torch.equal(head["weight"][1], stored["weight"][[3, 0]].mean(0))
    assert torch.equal(head["norm"], stored["norm"])
    assert head["weight"].shape == (3, 3)


def test_supervised__repeated_augmentation_repeats_images(tmp_path):
    from mae_et.curriculum.plan import make_plan
    from mae_et.data.stream import _MicroBatches

    config = config_of(data__num_repeats=2)
    plan = make_plan(config, SupervisedTask.cost(config), 20)
    draws = [
        draw for batch in _MicroBatches(plan, ImageOrder(plan.dataset_size, 0), 0, 0, num_repeats=2) for draw in batch
    ]
    assert [draw.place for draw in draws] == list(range(64))
    assert all(draws[i].index == draws[i + 1].index for i in range(0, 64, 2))
    assert sorted(draw.index for draw in draws[:40:2]) == list(range(20))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model__name": "resnet5O", "model__options": {}}, UserError, "resnet50"),
        ({"model__options": {"img_size": 64}}, ConfigError, "data.image_size"),
        ({"batch__global_batch_size": 3}, ConfigError, "even"),
        ({"batch__micro_batch_size": 1, "regularization__mixup": 0.0, "regularization__cutmix": 0.0}, ConfigError, "BatchNorm"),
        ({"data__val": "scenes:15@64,seed=4,classes=2"}, DataError, "class"),
    ],
)  # fmt: skip
def test_supervised__faults(changes, error, words, tmp_path):
    with pytest.raises(error, match=words):
        train_supervised(config_of(**changes), tmp_path, device="cpu")


def test_supervised__size_that_windows_do_not_take(tmp_path):
    config = config_of("swin", data__image_size=80, curriculum__preset="constant", curriculum__stages=[])
    with pytest.raises(UserError, match="64 and 96"):
        train_supervised(config, tmp_path)


def test_supervised__file_of_another_model(tmp_path):
    train_supervised(config_of("resnet"), tmp_path / "first", device="cpu")
    with pytest.raises(CheckpointError, match=r"model\.name=resnet18"):
        train_supervised(config_of("deit", model__init_from=str(tmp_path / "first")), tmp_path / "second", device="cpu")


def test_supervised__checkpoint_without_average(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        run_training(killed_before(SupervisedTask, 7), config_of(), tmp_path, device="cpu")
    path = sorted((tmp_path / "checkpoints").glob("step_*.pt"))[-1]
    state = checkpoint.load_checkpoint(path)
    del state["ema"]
    checkpoint.save_checkpoint(dict(state), path.parent, state["progress"]["step"], 2)
    with pytest.raises(CheckpointError, match="no moving average"):
        train_supervised(config_of(), tmp_path, resume=True, device="cpu")


def test_supervised__learns(tmp_path):
    """Accuracy on the training images beats chance clearly, so the labels and the loss belong together."""
    config = config_of(
        "resnet", data__val=TRAIN, data__augmentation={"ramp": "none", "min_scale": 1.0, "flip": False},
        regularization={"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "ema_decay": None}, model__drop_path_rate=0.0,
        curriculum__equivalent_epochs=60.0, optimizer__base_lr=0.3, eval_interval=None, run__save_interval=1000,
        run__loggers=[],
    )  # fmt: skip
    summary = train_supervised(config, tmp_path, device="cpu")
    assert summary["top1"] > 0.8
    assert math.isfinite(summary["last_loss"])
    assert timm.is_model(summary["model"])


@pytest.mark.parametrize("family", FAMILIES)
def test_supervised__photos(family, tmp_path, real_data):
    """Two steps at each size on Imagenette."""
    images = (2 * 4 * 0.25 + 2 * 4) / 9469
    config = config_of(
        family, data__train=str(real_data / "imagenette" / "train"), data__val=None, eval_interval=None,
        curriculum__equivalent_epochs=images, curriculum__warmup_equivalent_epochs=images / 10,
        curriculum__stages=[
            {"compute_fraction": 0.2, "bandwidth": 32, "strength": 0.0},
            {"compute_fraction": 0.8, "bandwidth": 64, "strength": 1.0},
        ],
    )  # fmt: skip
    summary = train_supervised(config, tmp_path, device="cpu")
    assert [(stage["bandwidth"], stage["num_steps"]) for stage in summary["stages"]] == [(32, 2), (64, 2)]
    assert all(math.isfinite(loss) for loss in losses(tmp_path).values())
    assert summary["num_classes"] == 10
