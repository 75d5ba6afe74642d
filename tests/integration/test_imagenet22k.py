"""Pre-training on a folder of synsets with a published order, then fine-tuning on some of them at another size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mae_et.config.schema import from_dict
from mae_et.config.supervised import SupervisedConfig
from mae_et.errors import CheckpointError
from mae_et.models.resize import change_input_size
from mae_et.tasks.supervised import train_supervised
from mae_et.tasks.supervised_model import build_model
from mae_et.tasks.supervised_weights import load_initial_weights

LARGE = ["n05", "n01", "n04", "n02", "n03", "n06"]  # the published order; n04 has no images
SMALL = ["n02", "n04", "n05", "n09"]  # n09 is not in the large set
SIZE = 32


def make_folder(root: Path, synsets: list[str]) -> str:
    rng = np.random.default_rng(0)
    for synset in synsets:
        (root / synset).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / synset / f"{i}.png")
    return str(root)


def config_of(train: str, **overrides: Any) -> SupervisedConfig:
    values: dict[str, Any] = {
        "data": {"train": train, "image_size": SIZE, "num_workers": 0},
        "model": {"name": "deit_tiny_patch16_224", "options": {"embed_dim": 16, "depth": 1, "num_heads": 2}},
        "curriculum": {"equivalent_epochs": 4, "baseline_equivalent_epochs": 4, "warmup_equivalent_epochs": 0.5},
        "batch": {"global_batch_size": 4},
        "optimizer": {"base_lr": 0.064, "layer_decay": 0.9},
        "run": {"precision": "fp32"},
    }
    for key, value in overrides.items():
        section, _, last = key.partition("__")
        values[section][last] = value
    return from_dict(SupervisedConfig, values)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SupervisedConfig, dict[str, Any]]:
    root = tmp_path_factory.mktemp("large")
    (root / "synsets.txt").write_text("\n".join(LARGE))
    train = make_folder(root / "train", [name for name in LARGE if name != "n04"])
    config = config_of(train, data__classes=str(root / "synsets.txt"), data__num_classes=6)
    return root / "run", config, train_supervised(config, root / "run", device="cpu")


def test_pretraining__missing_classes_keep_their_rows(
    pretrained: tuple[Path, SupervisedConfig, dict[str, Any]],
) -> None:
    run, _, summary = pretrained
    assert (summary["num_classes"], summary["top1"]) == (6, None)
    (finding,) = [found for found in summary["data_findings"]["count"] if found["kind"] == "empty_classes"]
    assert finding["text"] == "images: 1 of 6 classes have no image: n04"
    assert load_file(run / "classifier.safetensors")["head.weight"].shape == (6, 16)
    with safe_open(run / "classifier.safetensors", "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == LARGE


def test_resumption__another_order_of_the_classes_is_refused(
    pretrained: tuple[Path, SupervisedConfig, dict[str, Any]],
) -> None:
    run, config, _ = pretrained
    path = Path(str(config.data.classes))
    path.write_text("\n".join(sorted(LARGE)))
    try:
        with pytest.raises(CheckpointError, match="classes: other names, or another order"):
            train_supervised(config, run, resume=True, device="cpu")
    finally:
        path.write_text("\n".join(LARGE))


def test_fine_tuning__takes_the_head_rows_by_synset_at_another_size(
    pretrained: tuple[Path, SupervisedConfig, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, _, _ = pretrained
    train = make_folder(tmp_path / "small", SMALL)
    config = config_of(
        train, data__val=train, data__image_size=48, model__init_from=str(run), curriculum__preset="constant",
        curriculum__warmup_equivalent_epochs=0,
    )  # fmt: skip
    model = build_model(config, len(SMALL), 48)
    load_initial_weights(model, 48, config, SMALL)
    stored = load_file(run / "classifier.safetensors")
    head = model.state_dict()["head.weight"]
    for row, name in enumerate(SMALL[:3]):
        assert torch.equal(head[row], stored["head.weight"][LARGE.index(name)])
    known = stored["head.weight"][[LARGE.index(name) for name in SMALL[:3]]]
    torch.testing.assert_close(head[3], known.mean(0))
    assert "has 3 of the 4 classes; the head rows of the others start from the mean row: n09" in caplog.text

    expected = build_model(config, 6, SIZE)
    expected.load_state_dict(stored)
    change_input_size(expected, None, None, 48)
    body = {name: value for name, value in expected.state_dict().items() if not name.startswith("head.")}
    for name, value in body.items():
        assert torch.equal(model.state_dict()[name], value), name

    summary = train_supervised(config, tmp_path / "run", device="cpu")
    assert summary["initial_weights"]["file"] == str(run / "classifier.safetensors")
    assert summary["num_classes"] == 4
    assert summary["num_val"] == 16


def test_fine_tuning__file_whose_names_do_not_fit_its_head(
    pretrained: tuple[Path, SupervisedConfig, dict[str, Any]], tmp_path: Path
) -> None:
    run, config, _ = pretrained
    with safe_open(run / "classifier.safetensors", "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if "sha256" not in key}
    metadata["class_names"] = json.dumps(LARGE[:5])
    save_file(load_file(run / "classifier.safetensors"), tmp_path / "edited.safetensors", metadata)
    changed = config_of(config.data.train, model__init_from=str(tmp_path / "edited.safetensors"))
    with pytest.raises(CheckpointError, match="names 5 classes, but its head has 6 rows"):
        load_initial_weights(build_model(changed, 4, SIZE), SIZE, changed, SMALL)


def test_fine_tuning__head_without_names(
    pretrained: tuple[Path, SupervisedConfig, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, config, _ = pretrained
    save_file(load_file(run / "classifier.safetensors"), tmp_path / "plain.safetensors")
    changed = config_of(config.data.train, model__init_from=str(tmp_path / "plain.safetensors"))
    torch.manual_seed(0)
    model = build_model(changed, 4, SIZE)
    load_initial_weights(model, SIZE, changed, SMALL)
    assert "another size and no class names: the head of 4 classes starts from its initial weights" in caplog.text
    load_initial_weights(build_model(changed, 6, SIZE), SIZE, changed, LARGE)
    assert "names no classes: its head is taken for that of these 6 classes" in caplog.text
