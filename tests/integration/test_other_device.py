"""Trainings, probes and pictures on a device that is not the CPU: no operation mixes the two. See tests/other_device.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.tasks.classify import classify
from mae_et.tasks.dense_probe import dense_probe
from mae_et.tasks.features import FeatureOptions, extract
from mae_et.tasks.predict import PredictOptions, predict
from mae_et.tasks.pretrain import pretrain
from mae_et.tasks.reconstruct import ReconstructOptions, draw_reconstructions
from mae_et.tasks.show import show_attention, show_duplicates, show_neighbours, show_pca, show_similarity
from mae_et.tasks.supervised import train_supervised
from mae_et.tasks.viewer import ShowOptions
from tests.conftest import small_values
from tests.integration import test_classify as classifying
from tests.integration import test_dense_probe as dense
from tests.integration import test_probes as probes
from tests.integration import test_supervised as supervised
from tests.other_device import CPU, OTHER, trainings_on_the_other_device

IMAGES = "scenes:9@40,seed=5"
SHORT: dict[str, Any] = {  # 6 steps
    "curriculum__equivalent_epochs": 1.3, "curriculum__warmup_equivalent_epochs": 0.2,
    "run__log_interval": 6, "run__save_interval": 3,
}  # fmt: skip
FEW_STEPS = {f"curriculum__{name}equivalent_epochs": 0.8 for name in ("", "baseline_")} | {
    "curriculum__warmup_equivalent_epochs": 0.4
}
HOOKS = {**SHORT, "data__val": IMAGES, "run__num_pictures": 1, "run__label_free_interval": 6, "run__knn_max_images": 8}


@pytest.fixture(autouse=True)
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with trainings_on_the_other_device(monkeypatch):
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    with pytest.MonkeyPatch.context() as patch, trainings_on_the_other_device(patch):
        pretrain(from_dict(PretrainConfig, small_values(**HOOKS)), folder)
    return folder


def test_other_device__mixing_raises() -> None:
    host, other = torch.ones(2), torch.ones(2).to(OTHER)
    assert (host.device, other.device, (other + 1).device, other[:1].device) == (CPU, OTHER, OTHER, OTHER)
    assert (other.cpu().device, host.to(other).device, torch.zeros(2, device=OTHER).device) == (CPU, OTHER, OTHER)
    assert (other * torch.tensor(2.0)).tolist() == [2, 2]  # no dimensions
    assert other[torch.tensor([1])].device == OTHER
    host.copy_(other)
    assert host.device == CPU
    for mix in (lambda: host + other, lambda: torch.cat([other, host]), lambda: torch.allclose(other, host)):
        with pytest.raises(RuntimeError, match="mixes devices"):
            mix()
    with pytest.raises(TypeError, match="cpu"):
        other.numpy()
    weight = torch.nn.Linear(2, 1).to(OTHER)
    weight(other).sum().backward()
    assert weight.weight.grad.device == OTHER


@pytest.mark.parametrize(
    "changes",
    [
        {"model__target": "hog", "model__ema_decay": 0.9, "model__num_registers": 2},
        {"model__mask_kind": "block", "replay__mode": "mix"},
        {"model__mask_grid": 2, "model__num_cls_tokens": 2, "model__num_registers": 1},
        {"model__mlp": "swiglu", "model__rotary_positions": True, "optimizer__clip_grad_norm": 1.0},
    ],
)
def test_pretrain__options(tmp_path: Path, changes: dict[str, Any]) -> None:
    pretrain(from_dict(PretrainConfig, small_values(**SHORT, **changes)), tmp_path / "run")


def test_pretrain__resumes(pretrained: Path) -> None:
    newest = sorted((pretrained / "checkpoints").glob("step_*.pt"))
    newest[-1].unlink()
    (pretrained / "summary.json").unlink()
    pretrain(from_dict(PretrainConfig, small_values(**HOOKS)), pretrained, resume=True)


@pytest.mark.parametrize(
    ("protocol", "changes"),
    [
        ("finetune", classifying.EVERYTHING_RANDOM | FEW_STEPS),
        ("linear_probe", FEW_STEPS),
        ("attentive_probe", FEW_STEPS),
        ("linear_sweep", {"sweep__lrs": [0.01, 0.1], "sweep__epochs": 5}),
        ("knn", {}),
    ],
)
def test_classify(tmp_path: Path, pretrained: Path, protocol: str, changes: dict[str, Any]) -> None:
    make = probes.config_of if protocol == "linear_sweep" else classifying.config_of
    config = make(protocol, **{"backbone": str(pretrained / "backbone.safetensors"), **changes})
    classify(config, tmp_path / "run")


@pytest.fixture
def images(tmp_path: Path) -> str:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (90, 30 * i, 10)).save(folder / f"{i}.png")
    return str(folder)


def test_supervised_and_predict(tmp_path: Path, images: str) -> None:
    train_supervised(supervised.config_of("resnet", **FEW_STEPS), tmp_path / "run")
    options = PredictOptions(num_workers=0, batch_size=4, pictures=True)
    predict(tmp_path / "run", [images], tmp_path / "out", options, device=str(OTHER))


def test_dense_probe(tmp_path: Path) -> None:
    root = dense.write_ade20k(tmp_path / "ade", 8, 4, (48, 48), seed=1)
    dense_probe(dense.config_of(root), tmp_path / "run")


def test_features_and_pictures(tmp_path: Path, pretrained: Path, images: str) -> None:
    backbone, options = str(pretrained / "backbone.safetensors"), ShowOptions(device=str(OTHER), num_workers=0)
    extract(backbone, IMAGES, tmp_path / "features.npy", FeatureOptions(num_workers=0), str(OTHER))
    draw_reconstructions(pretrained, [IMAGES], tmp_path / "pictures", ReconstructOptions(max_images=2), str(OTHER))
    show_pca(backbone, [images], tmp_path / "pca", options)
    show_attention(backbone, [images], tmp_path / "attention", options)
    show_similarity(backbone, [images], tmp_path / "similarity", options, (0, 0))
    show_neighbours(backbone, [images], tmp_path / "neighbours", options, images)
    show_duplicates(backbone, [images], tmp_path / "duplicates", options)
