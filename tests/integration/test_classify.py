"""Whole verdicts: what each protocol writes, how it resumes, what must not change it, and that its numbers are right."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from mae_et.config.files import load_config, save_config
from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict, to_dict
from mae_et.data.sources.spec import open_source
from mae_et.data.transforms import EvalTransform
from mae_et.errors import CheckpointError, ConfigError, DataError, UserError
from mae_et.models.mae import build_mae
from mae_et.models.pos_embed import sincos_pos_embed
from mae_et.storage import checkpoint
from mae_et.storage.backbone import export, read_backbone
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks.classifier import build_encoder, open_backbone
from mae_et.tasks.classify import classify
from mae_et.tasks.finetune import FinetuneTask
from mae_et.tasks.linear_probe import LinearProbeTask
from mae_et.tasks.pretrain import pretrain
from mae_et.tasks.run import run_training
from tests.conftest import Stop, killed_before, load_tool, losses, small_values
from tests.plans import plan_for
from tests.processes import start_command

TRAIN, VAL = "scenes:20@32,seed=3", "scenes:15@32,seed=4"
WIDTHS = {"embed_dim": 48, "depth": 3, "num_heads": 3}
EVERYTHING_RANDOM = {
    "regularization__mixup": 0.8,
    "regularization__cutmix": 1.0,
    "regularization__erasing": 0.5,
    "regularization__ema_decay": 0.9,
    "model__drop_path_rate": 0.3,
    "data__augmentation__ramp": "randaugment",
}
OF_A_VERDICT = {
    ".lock",
    "run.log",
    "config.py",
    "environment.json",
    "summary.json",
    "per_class.csv",
    "confusion.csv",
    "confusion.png",
}
OF_A_TRAINING = OF_A_VERDICT | {"plan.json", "metrics.jsonl", "tensorboard", "checkpoints", "classifier.safetensors"}


def values(protocol: str = "finetune", **overrides: Any) -> dict[str, Any]:
    """Returns config values of a run of 12 steps; overrides as in `small_values`."""
    base: dict[str, Any] = {
        "protocol": protocol,
        "data": {
            "train": TRAIN, "val": VAL, "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "num_workers": 0,
            "augmentation": {"min_scale": 0.5},
        },
        "model": {"size": "tiny", "patch_size": 8, **WIDTHS, "pool": "avg"},
        "run": {"precision": "fp32"},
    }  # fmt: skip
    if protocol == "knn":
        base["knn"] = {"ks": [3, 5, 20]}
    else:
        base["curriculum"] = {
            "preset": "constant", "equivalent_epochs": 4.8, "baseline_equivalent_epochs": 4.8,
            "warmup_equivalent_epochs": 0.8,
        }  # fmt: skip
        base["batch"] = {"global_batch_size": 8, "micro_batch_size": 8}
        base["run"] |= {"log_interval": 1, "save_interval": 5}
    if protocol == "finetune":
        base["optimizer"] = {"base_lr": 0.032, "betas": [0.9, 0.999], "layer_decay": 0.75, "min_lr": 1e-5}
        base["regularization"] = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "label_smoothing": 0.1}
    if protocol == "linear_probe":
        base["optimizer"] = {"name": "lars", "base_lr": 100.0, "weight_decay": 0.0}  # lr 3.1
    for key, value in overrides.items():
        *parents, last = key.split("__")
        node = base
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return base


def config_of(protocol: str = "finetune", **overrides: Any) -> ClassifyConfig:
    return from_dict(ClassifyConfig, values(protocol, **overrides))


def run(
    work_dir: Path, protocol: str = "finetune", resume: bool = False, task_type: type | None = None, **overrides: Any
) -> dict[str, Any]:
    config = config_of(protocol, **overrides)
    if task_type is not None:
        return run_training(task_type, config, work_dir, resume=resume, device="cpu")
    return classify(config, work_dir, resume=resume, device="cpu")


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp("finetune") / "run"
    run(work_dir)
    return work_dir


@pytest.fixture(scope="module")
def random_finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With everything on that draws random numbers."""
    work_dir = tmp_path_factory.mktemp("finetune") / "random"
    run(work_dir, **EVERYTHING_RANDOM)
    return work_dir


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pre-training."""
    work_dir = tmp_path_factory.mktemp("pretrain") / "run"
    pretrain(from_dict(PretrainConfig, small_values()), work_dir, device="cpu")
    return work_dir


def equal_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "classifier.safetensors"), load_file(other / "classifier.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def timm_vit(state: dict[str, torch.Tensor], image_size: int = 32, **kwargs: Any) -> Any:
    """timm's own class under a state dict, every key used."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=image_size, patch_size=8, **{"num_classes": 0, **WIDTHS, **kwargs}
    )
    model.load_state_dict(state, strict=True)
    return model.eval()


def images_of(spec: str, image_size: int = 32, crop_ratio: float = 0.875) -> torch.Tensor:
    """The images as evaluation should see them, one by one: [M, 3, S, S] normalised."""
    source, transform = open_source(spec), EvalTransform(image_size, crop_ratio)
    return torch.stack([(transform(source.load(i)).float() / 255 - 0.5) / 0.25 for i in range(len(source))])


# -------------------------------------------------------------------- what a run writes


def test_classify__finetune_writes_exactly_these_files(finetuned: Path) -> None:
    assert {path.name for path in finetuned.iterdir()} == OF_A_TRAINING
    assert [path.name for path in sorted((finetuned / "checkpoints").iterdir())] == [
        "step_00000010.pt",
        "step_00000012.pt",
    ]
    assert load_config(ClassifyConfig, finetuned / "config.py") == config_of()
    with safe_open(finetuned / "classifier.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["class_names"]) == open_source(TRAIN).class_names
    assert (metadata["pool"], json.loads(metadata["mean"]), metadata["num_heads"]) == ("avg", [0.5] * 3, "3")


def test_classify__probe_and_knn_write_exactly_these_files(tmp_path: Path) -> None:
    run(tmp_path / "probe", "linear_probe")
    assert {path.name for path in (tmp_path / "probe").iterdir()} == OF_A_TRAINING
    run(tmp_path / "knn", "knn")
    assert {path.name for path in (tmp_path / "knn").iterdir()} == OF_A_VERDICT


def test_classify__metrics_follow_the_plan(finetuned: Path) -> None:
    plan = plan_for(config_of(), 20)
    assert plan.num_steps == 12
    lines = read_jsonl(finetuned / "metrics.jsonl")
    assert [line["lr"] for line in lines if "loss" in line] == [plan.lr(step) for step in range(12)]
    assert [line["step"] for line in lines if "val/top1" in line] == sorted({round(1.2 * i) for i in range(1, 11)})
    summary = json.loads((finetuned / "summary.json").read_text())
    assert summary["top1_history"][-1] == [12, summary["top1"]]
    assert summary["status"] == "finished"


def test_classify__eval_interval(tmp_path: Path) -> None:
    run(tmp_path / "run", eval_interval=5)
    lines = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines if "val/top1" in line] == [5, 10, 12]


# -------------------------------------------------------------------- learning


def write_colours(folder: Path, num_images: int, seed: int) -> str:
    """Writes three classes of flat colours under noise."""
    rng = np.random.default_rng(seed)
    for name, colour in {"blue": (60, 80, 190), "green": (70, 170, 80), "red": (190, 70, 60)}.items():
        (folder / name).mkdir(parents=True)
        for i in range(num_images):
            pixels = np.array(colour) + rng.normal(0, 40, (36, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("colours")
    return {"data__train": write_colours(folder / "train", 10, 0), "data__val": write_colours(folder / "val", 8, 1)}


@pytest.mark.parametrize("protocol", ["finetune", "linear_probe", "knn"])
def test_classify__learns(tmp_path: Path, colours: dict[str, str], protocol: str) -> None:
    """Chance is 1/3."""
    if protocol == "linear_probe":  # a trust coefficient of 0.001 takes thousands of steps, and the BatchNorm a batch
        options = {"batch__global_batch_size": 30, "batch__micro_batch_size": 30, "curriculum__equivalent_epochs": 30.0}
        options |= {"optimizer__base_lr": 10.0, "optimizer__trust_coefficient": 0.05}
    else:
        options = {} if protocol == "knn" else {"curriculum__equivalent_epochs": 12.0}
    summary = run(tmp_path / "run", protocol, **colours, **options)
    assert summary["top1"] >= 0.9, summary["top1"]
    assert summary["num_val"] == 24
    assert summary["top5"] is None  # of three classes, each is among the first five
    if protocol != "knn":
        assert summary["last_loss"] < 0.75 * summary["first_loss"]


def test_classify__the_average_of_the_weights_is_what_is_judged(tmp_path: Path, colours: dict[str, str]) -> None:
    run(tmp_path / "plain", **colours)
    run(tmp_path / "ema", **colours, regularization__ema_decay=0.5, run__save_interval=1, run__keep_checkpoints=100)
    assert losses(tmp_path / "ema") == losses(tmp_path / "plain")
    saves = [checkpoint.load_checkpoint(path) for path in checkpoint.list_checkpoints(tmp_path / "ema/checkpoints")]
    average = saves[0]["ema"]["blocks.1.attn.qkv.weight"].double()
    for state in saves[1:]:
        average = 0.5 * average + 0.5 * state["model"]["blocks.1.attn.qkv.weight"].double()
    found = load_file(tmp_path / "ema/classifier.safetensors")["blocks.1.attn.qkv.weight"]
    torch.testing.assert_close(found.double(), average, atol=1e-6, rtol=0)


# -------------------------------------------------------------------- going on after a stop


@pytest.mark.parametrize("step", [0, 3, 5, 11])
def test_resume__after_a_kill_has_equal_losses(
    random_finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with pytest.raises(Stop):
        run(tmp_path / "run", **EVERYTHING_RANDOM, task_type=killed_before(FinetuneTask, step))
    run(tmp_path / "run", resume=True, **EVERYTHING_RANDOM)
    assert losses(tmp_path / "run") == losses(random_finetuned)
    assert equal_weights(tmp_path / "run", random_finetuned)


def test_resume__linear_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LARS has a momentum, the BatchNorm statistics: both go on."""
    run(tmp_path / "whole", "linear_probe")
    with pytest.raises(Stop):
        run(tmp_path / "run", "linear_probe", task_type=killed_before(LinearProbeTask, 8))
    run(tmp_path / "run", "linear_probe", resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert equal_weights(tmp_path / "run", tmp_path / "whole")


def test_resume__a_finished_run_gives_the_same_verdict(tmp_path: Path) -> None:
    first = run(tmp_path / "run")
    again = run(tmp_path / "run", resume=True)
    assert {key: again[key] for key in ("top1", "top5", "num_images")} == {
        key: first[key] for key in ("top1", "top5", "num_images")
    }


def test_resume__other_weights_are_refused(tmp_path: Path, pretrained: Path) -> None:
    """The same weights may lie in another file."""
    backbone = str(pretrained / "backbone.safetensors")
    run(tmp_path / "run", backbone=backbone)
    export(backbone, tmp_path / "moved.pth")
    run(tmp_path / "run", resume=True, backbone=str(tmp_path / "moved.pth"))
    state = load_file(backbone)
    state["blocks.0.attn.qkv.bias"] += 1
    save_file(state, tmp_path / "other.safetensors", {"num_heads": "3"})
    for other in (str(tmp_path / "other.safetensors"), None):
        with pytest.raises(CheckpointError, match="backbone: other weights"):
            run(tmp_path / "run", resume=True, backbone=other)


def test_resume__changed_config_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(CheckpointError) as error:
        run(tmp_path / "run", resume=True, optimizer__layer_decay=0.5, regularization__mixup=0.8, eval_interval=3)
    assert "optimizer.layer_decay: 0.75 -> 0.5" in str(error.value)
    assert "regularization.mixup: 0.0 -> 0.8" in str(error.value)
    assert "eval_interval" not in str(error.value)
    assert "init_from" not in str(error.value)


# -------------------------------------------------------------------- what must not change the losses


@pytest.mark.parametrize("overrides", [{"data__num_workers": 2}, {"eval_interval": 1, "run__save_interval": 3}])
def test_classify__losses_do_not_depend_on(random_finetuned: Path, tmp_path: Path, overrides: dict[str, Any]) -> None:
    run(tmp_path / "run", **EVERYTHING_RANDOM, **overrides)
    assert losses(tmp_path / "run") == losses(random_finetuned)
    assert equal_weights(tmp_path / "run", random_finetuned)


def test_classify__accumulation_leaves_losses_unchanged(finetuned: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", batch__micro_batch_size=2)
    assert losses(tmp_path / "run") == pytest.approx(losses(finetuned), rel=1e-4)


def test_classify__activation_checkpointing_leaves_losses_unchanged(random_finetuned: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", **EVERYTHING_RANDOM, run__activation_checkpointing=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(random_finetuned), rel=1e-5)


def test_classify__two_processes_equal_one(finetuned: Path, tmp_path: Path) -> None:
    save_config(config_of(batch__micro_batch_size=4), tmp_path / "small.py", "A test.")
    words = [
        "classify",
        tmp_path / "small.py",
        "--backbone",
        "random",
        "--work-dir",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    process = start_command(words, tmp_path / "output", num=2)
    shown = process.wait()
    assert process.returncode == 0, shown[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(finetuned), rel=1e-4)
    assert shown.count("top-1") == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == OF_A_TRAINING


# -------------------------------------------------------------------- the linear probe


def test_linear_probe__freezes_the_encoder_and_follows_its_statistics(tmp_path: Path, pretrained: Path) -> None:
    backbone = pretrained / "backbone.safetensors"
    run(tmp_path / "run", "linear_probe", backbone=str(backbone), model__pool="token")
    before, after = load_file(backbone), load_file(tmp_path / "run/classifier.safetensors")
    for key in before:
        if key != "pos_embed":
            assert torch.equal(after[f"encoder.{key}"], before[key]), key
    torch.testing.assert_close(after["encoder.pos_embed"], before["pos_embed"])
    assert int(after["norm.num_batches_tracked"]) == 12
    assert after["norm.running_mean"].abs().max() > 0.1
    assert not (after.keys() & {"norm.weight", "norm.bias"})
    assert float(after["head.weight"].std()) > 0
    state = checkpoint.load_newest(tmp_path / "run/checkpoints", print)[1]["optimizer"]
    assert sum(len(group["params"]) for group in state["param_groups"]) == 2  # the head's alone


# -------------------------------------------------------------------- kNN


def naive_knn(bank: np.ndarray, labels: list[int], query: np.ndarray, k: int, temperature: float) -> int:
    scores = []
    for i, feature in enumerate(bank):
        cosine = sum(a * b for a, b in zip(feature, query, strict=True))
        cosine /= math.sqrt(sum(a * a for a in feature)) * math.sqrt(sum(b * b for b in query))
        scores.append((cosine, i))
    votes: dict[int, float] = {}
    for cosine, i in sorted(scores, reverse=True)[:k]:
        votes[labels[i]] = votes.get(labels[i], 0.0) + math.exp(cosine / temperature)
    return max(sorted(votes), key=lambda label: votes[label])


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_knn__equals_a_naive_loop(tmp_path: Path, pretrained: Path, pool: str) -> None:
    backbone = pretrained / "backbone.safetensors"
    summary = run(
        tmp_path / "run", "knn", backbone=str(backbone), model__pool=pool, knn__temperature=0.1, knn__ks=[5, 3, 20],
        data__eval_crop_ratio=1.0,
    )  # fmt: skip
    model = timm_vit(load_file(backbone))
    with torch.no_grad():
        bank, queries = (model.forward_features(images_of(spec, crop_ratio=1.0)) for spec in (TRAIN, VAL))
    reduce = (lambda t: t[:, 0]) if pool == "token" else (lambda t: t[:, 1:].mean(dim=1))
    bank, queries = (reduce(tokens).double().numpy() for tokens in (bank, queries))
    train_labels, val_labels = (list(open_source(spec).labels or []) for spec in (TRAIN, VAL))
    for k in (3, 5, 20):
        predicted = [naive_knn(bank, train_labels, query, k, 0.1) for query in queries]
        correct = sum(a == b for a, b in zip(predicted, val_labels, strict=True))
        assert summary["top1_by_k"][str(k)] == pytest.approx(correct / 15), k
        if k == 20:  # the protocol's usual one is what the files are about
            check_files(tmp_path / "run", predicted, val_labels)
            assert (summary["k"], summary["top1"]) == (20, pytest.approx(correct / 15))
    assert summary["initial_weights"]["metadata"]["objective"] == "mae"
    trained = json.loads((pretrained / "summary.json").read_text())
    assert summary["initial_weights"]["encoder_sha256"] == trained["encoder_sha256"]
    assert summary["num_train"] == 20


# -------------------------------------------------------------------- the numbers and files


def check_files(work_dir: Path, predicted: list[int], labels: list[int]) -> None:
    """Compares confusion.csv and per_class.csv with a count by hand."""
    names = list(open_source(TRAIN).class_names or [])
    with open(work_dir / "confusion.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[1:] == names == [row[0] for row in rows]
    counts = [[0] * len(names) for _ in names]
    for guess, truth in zip(predicted, labels, strict=True):
        counts[truth][guess] += 1
    assert [[int(cell) for cell in row[1:]] for row in rows] == counts
    with open(work_dir / "per_class.csv", newline="") as file:
        for i, row in enumerate(csv.DictReader(file)):
            total = sum(counts[i])
            assert (int(row["class"]), row["name"], int(row["num_images"])) == (i, names[i], total)
            if total:
                assert float(row["accuracy"]) == pytest.approx(counts[i][i] / total, abs=5e-5)
            else:
                assert row["accuracy"] == ""


def test_finetune__verdict_equals_a_count_by_hand(finetuned: Path) -> None:
    """The saved classifier, in timm's class, on images prepared one by one."""
    summary = json.loads((finetuned / "summary.json").read_text())
    model = timm_vit(load_file(finetuned / "classifier.safetensors"), num_classes=10, global_pool="avg")
    with torch.no_grad():
        logits = model(images_of(VAL)).tolist()
    labels = list(open_source(VAL).labels or [])
    ranked = [sorted(range(10), key=lambda i: -row[i]) for row in logits]
    top1, top5 = (sum(label in order[:k] for order, label in zip(ranked, labels, strict=True)) for k in (1, 5))
    assert (summary["top1"], summary["top5"]) == (pytest.approx(top1 / 15), pytest.approx(top5 / 15))
    assert (summary["num_val"], summary["num_classes"]) == (15, 10)
    check_files(finetuned, [order[0] for order in ranked], labels)
    low, high = summary["top1_interval_95"]
    for bound in (low, high):  # where the score test is just significant
        if 0 < bound < 1:
            assert abs(top1 / 15 - bound) / math.sqrt(bound * (1 - bound) / 15) == pytest.approx(1.959964, rel=1e-5)
    assert low <= top1 / 15 <= high


def test_linear_probe__verdict_equals_a_count_by_hand(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", "linear_probe", model__pool="token")
    state = load_file(tmp_path / "run/classifier.safetensors")
    encoder = timm_vit({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
    with torch.no_grad():
        features = encoder.forward_features(images_of(VAL))[:, 0]
    normalised = (features - state["norm.running_mean"]) / (state["norm.running_var"] + 1e-6).sqrt()
    predicted = (normalised @ state["head.weight"].T + state["head.bias"]).argmax(dim=1).tolist()
    labels = list(open_source(VAL).labels or [])
    assert summary["top1"] == pytest.approx(np.mean([a == b for a, b in zip(predicted, labels, strict=True)]))
    check_files(tmp_path / "run", predicted, labels)


def test_classify__unreadable_validation_images_are_left_out_and_counted(tmp_path: Path) -> None:
    data = {"data__train": write_colours(tmp_path / "train", 8, 0), "data__val": write_colours(tmp_path / "val", 4, 1)}
    (tmp_path / "val/red/0.png").write_bytes(b"no image")
    summary = run(tmp_path / "run", **data)
    assert (summary["unreadable_val_images"], summary["num_val"]) == (1, 11)
    knn = run(tmp_path / "knn", "knn", **data)
    assert (knn["unreadable_val_images"], knn["num_val"], knn["num_train"]) == (1, 11, 24)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 12 images can be read"):
        run(tmp_path / "none", **data)


# -------------------------------------------------------------------- backbones


def features_of(path: Path | str | None, image_size: int = 32, **overrides: Any) -> torch.Tensor:
    """[M, 1 + L, D] of the encoder that a config builds."""
    config = config_of(backbone=None if path is None else str(path), data__image_size=image_size, **overrides)
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(config, open_backbone(config)).eval()
    with torch.no_grad():
        return encoder.forward_features(images_of(VAL, image_size))


def test_backbone__from_every_kind_of_file(tmp_path: Path, pretrained: Path) -> None:
    state = load_file(pretrained / "backbone.safetensors")
    full = checkpoint.load_newest(pretrained / "checkpoints", print)[1]["model"]
    assert any(key.startswith("decoder_") for key in full)
    classifier = {"head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)}
    torch.save(state | classifier, tmp_path / "timm.pth")
    save_file(state | classifier, tmp_path / "timm.safetensors")
    torch.save({"model": state}, tmp_path / "official_encoder.pth")
    torch.save({"model": full}, tmp_path / "official_full.pth")
    with torch.no_grad():
        expected = timm_vit(state).forward_features(images_of(VAL))
    newest = checkpoint.list_checkpoints(pretrained / "checkpoints")[-1]
    for path in (pretrained / "backbone.safetensors", newest, *sorted(tmp_path.iterdir())):
        torch.testing.assert_close(features_of(path), expected, atol=1e-5, rtol=1e-5, msg=str(path))


def test_backbone__random_is_the_initial_mae(tmp_path: Path) -> None:
    features = features_of(None)
    assert torch.equal(features, features_of(None))
    assert (features - features_of(None, run__seed=1)).abs().max() > 0.1
    encoder = build_encoder(config_of())
    table = sincos_pos_embed(48, (4, 4))
    torch.testing.assert_close(encoder.pos_embed.detach(), table)
    bound = math.sqrt(6 / (48 + 192))  # Xavier, uniform
    assert 0.9 * bound < encoder.blocks[0].mlp.fc1.weight.abs().max() <= bound


@pytest.mark.parametrize("learnt", [False, True])
def test_backbone__at_another_input_size(tmp_path: Path, pretrained: Path, learnt: bool) -> None:
    """The fixed table is computed for the new grid, a learnt one is resampled as timm does."""
    state = load_file(pretrained / "backbone.safetensors")
    table = sincos_pos_embed(48, (6, 6))
    if learnt:
        state["pos_embed"] = torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(0))
        table = resample_abs_pos_embed(state["pos_embed"], [6, 6], [4, 4], num_prefix_tokens=1)
    torch.save(state, tmp_path / "backbone.pth")
    with torch.no_grad():
        expected = timm_vit({**state, "pos_embed": table}, 48).forward_features(images_of(VAL, 48))
    found = features_of(tmp_path / "backbone.pth", 48)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_backbone__of_a_finetuning_starts_another(finetuned: Path, tmp_path: Path) -> None:
    newest = checkpoint.list_checkpoints(finetuned / "checkpoints")[-1]
    assert read_backbone(newest)[1]["eval_crop_ratio"] == "0.875"
    for path in (newest, finetuned / "classifier.safetensors"):
        summary = run(tmp_path / path.suffix[1:], backbone=str(path), optimizer__base_lr=1e-9, optimizer__min_lr=0.0)
        assert summary["status"] == "finished"
        after = load_file(tmp_path / path.suffix[1:] / "classifier.safetensors")
        before = load_file(finetuned / "classifier.safetensors")
        torch.testing.assert_close(after["blocks.2.mlp.fc1.weight"], before["blocks.2.mlp.fc1.weight"])


# -------------------------------------------------------------------- faults, as the tools tell them


def call_tool(name: str, words: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs a tool in this process, as its last line does; returns the exit code and what it said."""
    from mae_et.cli import run_tool

    tool = load_tool(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words), "--device", "cpu"])
        with pytest.raises(SystemExit) as end:
            run_tool(tool.main, tool.make_parser())
    return end.value.code or 0, capsys.readouterr().err


def write_config(folder: Path, config: Any, name: str = "small.py") -> Path:
    save_config(config, folder / name, "A test.")
    return folder / name


def vit_state(width: int = 48, depth: int = 3, patch: int = 8, channels: int = 3) -> dict[str, torch.Tensor]:
    state = build_mae(
        "tiny", img_size=32, patch_size=patch, in_chans=channels, embed_dim=width, depth=depth, num_heads=3,
        decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2,
    ).state_dict()  # fmt: skip
    return {key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token"))}


@pytest.mark.parametrize(
    ("made", "metadata", "shown"),
    [
        ({"width": 96}, {}, ["embed_dim = 96 (config: 48)", "model.embed_dim=96"]),
        ({"depth": 2}, {}, ["depth = 2 (config: 3)", "--cfg-options model.depth=2"]),
        ({"patch": 4}, {}, ["patch_size = 4 (config: 8)", "--cfg-options model.patch_size=4"]),
        ({"channels": 1}, {}, ["in_chans = 1 (config: 3)", "--cfg-options model.in_chans=1"]),
        ({}, {"num_heads": "6"}, ["num_heads = 6 (config: 3)", "--cfg-options model.num_heads=6"]),
        ({"depth": 2, "patch": 4}, {}, ["model.patch_size=4 model.depth=2"]),
    ],
)
def test_tool__another_architecture(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    made: dict[str, int],
    metadata: dict[str, str],
    shown: list[str],
) -> None:
    save_file(vit_state(**made), tmp_path / "b.safetensors", metadata)
    path = write_config(tmp_path, config_of())
    code, said = call_tool("classify", [path, "--backbone", tmp_path / "b.safetensors"], capsys)
    assert code == 1
    assert all(part in said for part in shown), said
    assert "Traceback" not in said


def test_architecture__a_published_size_is_named_by_its_name(tmp_path: Path) -> None:
    """Of an official file, which does not tell its heads, the width does."""
    config = from_dict(ClassifyConfig, {"data": {"train": "x", "val": "x"}, "backbone": "b.pth"})
    from mae_et.tasks.classifier import check_backbone

    for size, width, depth in (("tiny", 192, 12), ("large", 1024, 24)):
        state = {"patch_embed.proj.weight": torch.zeros(width, 3, 16, 16)}
        state |= {f"blocks.{i}.norm1.weight": torch.zeros(1) for i in range(depth)}
        with pytest.raises(CheckpointError, match=rf"--cfg-options model.size={size}$"):
            check_backbone(state, {}, config, "b.pth")
    state = {"patch_embed.proj.weight": torch.zeros(1280, 3, 14, 14)}
    state |= {f"blocks.{i}.norm1.weight": torch.zeros(1) for i in range(32)}
    with pytest.raises(CheckpointError, match=r"--cfg-options model.size=huge$"):
        check_backbone(state, {}, config, "b.pth")


def test_tool__files_that_are_no_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str], pretrained: Path) -> None:
    path = write_config(tmp_path, config_of())
    full = checkpoint.load_newest(pretrained / "checkpoints", print)[1]["model"]
    decoder = {key: value for key, value in full.items() if key.startswith(("decoder_", "mask_token"))}
    torch.save({"model": decoder}, tmp_path / "decoder.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    save_file({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "resnet.safetensors")
    export(pretrained / "backbone.safetensors", tmp_path / "mmdet.pth", "mmdet")
    for name, shown in {
        "decoder.pth": "only the decoder",
        "text.pth": "text.pth",
        "text.safetensors": "not a complete safetensors file",
        "empty.pth": "empty.pth",
        "folder": "folder",
        "missing.pth": "missing.pth",
        "missing.safetensors": "no such file",
        "nothing.pth": "holds no tensors",
        "list.pth": "holds a list",
        "photo.png": "photo.png",
        "resnet.safetensors": "holds no ViT in a known layout",
        "mmdet.pth": "layout 'mmdet'",
    }.items():
        code, said = call_tool(
            "classify", [path, "--backbone", tmp_path / name, "--work-dir", tmp_path / "run"], capsys
        )
        assert code == 1, name
        assert shown in said, (name, said)
        assert "Traceback" not in said
        assert not (tmp_path / "run").exists(), name


def test_tool__a_classifier_has_no_norm_for_features(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, config_of("knn"))
    words = [path, "--backbone", finetuned / "classifier.safetensors", "--work-dir", tmp_path / "run"]
    code, said = call_tool("classify", words, capsys)
    assert code == 1
    assert "classifier on the mean of the patches" in said


def test_tool__faults_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = write_colours(tmp_path / "train", 4, 0), write_colours(tmp_path / "val", 2, 1)
    other = write_colours(tmp_path / "other", 2, 1)
    (Path(other) / "red").rename(Path(other) / "pink")
    empty = write_colours(tmp_path / "empty", 2, 1)
    for path in (Path(empty) / "green").iterdir():
        path.unlink()
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (32, 32)).save(flat / "0.png")
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"data__train": train, "data__val": other}, 1, "only in train: red; only in val: pink"),
        ({"data__train": train, "data__val": "scenes:5@32"}, 1, "ball, box, cone, cup, fish and 5 more"),
        ({"data__train": empty, "data__val": val}, 1, "1 of 3 classes have no image in data.train: green"),
        ({"data__train": str(flat), "data__val": val}, 1, "has no labels, which are needed here"),
        ({"data__train": train, "data__val": str(flat)}, 1, "has no labels, which are needed here"),
        ({"data__train": train, "data__val": "/nowhere"}, 1, "/nowhere does not exist"),
        ({"protocol": "knn", "data__train": train, "data__val": val}, 2, "k = 20 exceeds the 12 labelled images"),
    ]
    for overrides, code, shown in cases:
        config = config_of(overrides.pop("protocol", "finetune"), **overrides)
        words = [write_config(tmp_path, config), "--backbone", "random", "--work-dir", tmp_path / "run"]
        found, said = call_tool("classify", words, capsys)
        assert (found, shown in said, "Traceback" in said) == (code, True, False), said
        assert not (tmp_path / "run").exists()


def test_knn__k_beyond_the_readable_images(tmp_path: Path) -> None:
    data = {"data__train": write_colours(tmp_path / "train", 7, 0), "data__val": write_colours(tmp_path / "val", 2, 1)}
    for i in range(3):
        (tmp_path / f"train/red/{i}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"only 18 images of data.train can be read, fewer than the 20"):
        run(tmp_path / "run", "knn", **data)


def test_tool__configs_of_the_other_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, config_of())
    code, said = call_tool("pretrain", [path], capsys)
    assert (code, "classification config" in said, "mae-et classify" in said) == (2, True, True), said
    assert said.count("\n  - ") == 1
    path = write_config(tmp_path, from_dict(PretrainConfig, small_values()))
    code, said = call_tool("classify", [path, "--backbone", "random"], capsys)
    assert (code, "pre-training config" in said, "mae-et pretrain" in said) == (2, True, True), said
    assert said.count("\n  - ") == 1


def test_tool__backbone_has_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = call_tool("classify", [write_config(tmp_path, config_of())], capsys)
    assert (code, "give --backbone FILE, or --backbone random" in said) == (1, True)


def test_tool__work_dirs_that_hold_something_else(
    finetuned: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune, knn = write_config(tmp_path, config_of()), write_config(tmp_path, config_of("knn"), "knn.py")
    other_knn = write_config(tmp_path, config_of("knn", knn__temperature=0.1), "other_knn.py")
    finished_knn = tmp_path / "finished_knn"
    run(finished_knn, "knn")
    before = {folder: (folder / "summary.json").read_bytes() for folder in (finetuned, finished_knn)}
    for config, work_dir, words, shown in (
        (finetune, finetuned, [], "holds a run: continue it with --resume"),
        (knn, finetuned, [], "holds a training run: choose another --work-dir"),
        (finetune, finished_knn, [], "holds the results of another run (summary.json): choose another --work-dir"),
        (finetune, finished_knn, ["--resume"], "holds the results of another run (summary.json)"),
        (knn, finished_knn, [], "holds a finished run: choose another --work-dir, or repeat the run with --resume"),
        (other_knn, finished_knn, ["--resume"], "holds a run with another config: choose another --work-dir"),
        (other_knn, finished_knn, ["--resume"], "knn.temperature: 0.07 -> 0.1"),
        (finetune, pretrained, ["--resume"], "is not from a classify run"),
    ):
        words = [config, "--backbone", "random", "--work-dir", work_dir, *words]
        code, said = call_tool("classify", words, capsys)
        assert (code, shown in said) == (1, True), said
    assert before == {folder: (folder / "summary.json").read_bytes() for folder in before}
    run(finished_knn, "knn", resume=True)


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        ({"curriculum__preset": "etpp"}, 'use preset = "constant"'),
        ({"protocol": "knn", "knn__ks": []}, "must have at least one number of neighbours"),
        (
            {"regularization__mixup": 0.5, "batch__global_batch_size": 7, "batch__micro_batch_size": None},
            "must be even",
        ),
        ({"optimizer__name": "lars"}, "is for the probes"),
        ({"data__val": None}, "data.val is missing"),
        ({"model__mask_ratio": 0.5}, "unknown key model.mask_ratio"),
        ({"protocol": "finetuning"}, "did you mean 'finetune'?"),
    ],
)
def test_config__faults(overrides: dict[str, Any], shown: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(**{"protocol": "finetune", **overrides})
    assert shown in str(error.value)


def test_classify__batches_that_mixup_or_the_probe_cannot_take(tmp_path: Path) -> None:
    """Even numbers that accumulation divides into odd ones."""
    with pytest.raises(ConfigError, match=r"over 1 processes and 2 accumulation steps gives 3 images"):
        run(tmp_path / "a", regularization__mixup=0.8, batch__global_batch_size=6, batch__micro_batch_size=4)
    with pytest.raises(ConfigError, match="needs at least 2 images at once"):
        run(tmp_path / "b", "linear_probe", batch__global_batch_size=4, batch__micro_batch_size=1)
    assert not list(tmp_path.iterdir())


def test_classify__images_and_settings_are_in_the_saved_config(tmp_path: Path) -> None:
    run(tmp_path / "run", "knn", data__num_workers=1)
    saved = load_config(ClassifyConfig, tmp_path / "run/config.py")
    assert to_dict(saved)["data"]["num_workers"] == 1
    with pytest.raises(UserError):
        run(tmp_path / "gone", "knn", backbone=str(tmp_path / "gone.pth"))
    assert not (tmp_path / "gone").exists()
