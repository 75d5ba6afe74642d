"""`mae-et predict` for classifiers: the logits of the run's own evaluation, and every refusal."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mae_et.data.sources.named_files import open_files
from mae_et.data.sources.spec import open_source
from mae_et.errors import CheckpointError, DataError, UserError
from mae_et.models.vit import random_vit
from mae_et.storage.backbone import write_safetensors
from mae_et.tasks import classification
from mae_et.tasks.classifier_file import load_classifier
from mae_et.tasks.classify import classify
from mae_et.tasks.predict import PredictOptions, predict
from mae_et.tasks.supervised import train_supervised
from tests.conftest import load_tool
from tests.integration import test_classify, test_supervised

VAL = "scenes:5@64,seed=4"
SHORT: dict[str, Any] = {  # two steps
    "data__train": "scenes:20@64,seed=3",
    "data__val": VAL,
    "batch__global_batch_size": 4,
    "batch__micro_batch_size": 4,
    "curriculum": {
        "preset": "constant",
        "equivalent_epochs": 0.4,
        "baseline_equivalent_epochs": 0.4,
        "warmup_equivalent_epochs": 0.2,
    },
}
OPTIONS: dict[str, Any] = {"num_workers": 0, "batch_size": 4}
KINDS = ("linear_probe", "attentive_probe", "finetune", "registers", "cls_tokens", "resnet")
# A fine-tuned classifier on the mean of the cls tokens, and one with registers.
OWN = {
    "registers": {"protocol": "finetune", "model__num_registers": 2},
    "cls_tokens": {
        "protocol": "finetune",
        "model__num_cls_tokens": 3,
        "model__num_registers": 1,
        "model__pool": "token",
    },
}
TOOL = load_tool("predict")


def run(*words: object) -> None:
    TOOL.main(TOOL.make_parser().parse_args([*map(str, words)]))


Trained = tuple[Path, torch.Tensor, Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Returns a function: kind -> a run, the logits of its evaluation, and the folder of its validation images."""

    @functools.cache
    def run_kind(kind: str) -> Trained:
        folder = tmp_path_factory.mktemp(kind)
        seen: list[torch.Tensor] = []
        real = classification.write_verdict

        def write_verdict(logits: torch.Tensor, *others: Any) -> Any:
            seen.append(logits)
            return real(logits, *others)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(classification, "write_verdict", write_verdict)
            if kind in test_supervised.FAMILIES:
                train_supervised(test_supervised.config_of(kind, **SHORT), folder / "run", device="cpu")
            else:
                own = OWN.get(kind, {"protocol": kind})
                classify(test_classify.config_of(**own, **SHORT), folder / "run", device="cpu")
        source = open_source(VAL)
        (folder / "images").mkdir()
        for i in range(len(source)):
            source.load(i).save(folder / f"images/{i:03d}.png")
        return folder / "run", seen[-1], folder / "images"

    return run_kind


@pytest.fixture
def resnet(train: Callable[[str], Trained]) -> Path:
    """Returns the folder with a run of a supervised training, run/, and its images, images/."""
    return train("resnet")[0].parent


@pytest.mark.parametrize("kind", KINDS)
def test_predict__logits_equal_those_of_the_evaluation(
    kind: str, train: Callable[[str], Trained], tmp_path: Path
) -> None:
    work_dir, logits, images = train(kind)
    out = tmp_path / "out"
    run(work_dir, images, "--out", out, "--top-k", 100, "--num-workers", 0, "--pictures", "--device", "cpu")
    record = json.loads((out / "predictions.json").read_text())
    names = record["class_names"]
    ours = torch.zeros_like(logits)
    for i, row in enumerate(record["predictions"]):
        assert row["image"] == str(images / f"{i:03d}.png")
        for one in row["top"]:
            assert one["class"] == names[one["label"]]
            ours[i, one["label"]] = one["logit"]
    assert torch.allclose(ours, logits, atol=1e-5, rtol=1e-5)
    assert logits.std() > 1e-3, "the comparison sees something"
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class_1"] for row in rows] == [names[i] for i in logits.argmax(dim=1)]
    shares = logits.softmax(dim=1).amax(dim=1)
    assert [float(row["probability_1"]) for row in rows] == pytest.approx(shares.tolist(), abs=2e-6)
    assert len(list((out / "pictures").glob("*.png"))) == len(rows)


def test_predict__bad_images_are_named_and_the_others_done(
    resnet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("L", (90, 66), 40).save(images / "good.png")
    (images / "cut.png").write_bytes((images / "good.png").read_bytes()[:40])
    (images / "empty.jpg").touch()
    record = predict(resnet / "run", [str(images)], tmp_path / "out", PredictOptions(**OPTIONS), device="cpu")
    assert [Path(row["image"]).name for row in record["predictions"]] == ["good.png"]
    assert [Path(row["image"]).name for row in record["bad_images"]] == ["cut.png", "empty.jpg"]
    assert "left out 2 of 3 images" in caplog.text
    assert "empty file" in caplog.text
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        predict(resnet / "run", [str(images / "cut.png")], tmp_path / "out2", PredictOptions(**OPTIONS), device="cpu")


def test_predict__output_folder_is_kept_without_overwrite(resnet: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    words = [resnet / "run", resnet / "images", "--out", tmp_path, "--num-workers", 0, "--device", "cpu"]
    with pytest.raises(UserError, match=r"is not empty.*--overwrite"):
        run(*words)
    run(*words, "--overwrite", "--pictures")
    run(*words, "--overwrite")
    assert not (tmp_path / "pictures").exists(), "pictures of earlier predictions are gone"
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_load_classifier__refuses_what_is_none(resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no classifier.*Give .*classifier\.safetensors"):
        load_classifier(resnet / "run/backbone.safetensors")
    alone = tmp_path / "backbone.safetensors"
    alone.write_bytes((resnet / "run/backbone.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="is no classifier"):
        load_classifier(alone)
    save_file({"blocks.0.norm1.weight": torch.ones(3)}, alone)
    with pytest.raises(CheckpointError, match="Train one with `mae-et classify"):
        load_classifier(alone)


def test_load_classifier__without_class_names(resnet: Path, tmp_path: Path) -> None:
    source = resnet / "run/classifier.safetensors"
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    names = json.loads(metadata.pop("class_names"))
    save_file(load_file(source), tmp_path / "x.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"records no class names.*--classes FILE"):
        load_classifier(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="with 2 classes"):
        load_classifier(tmp_path / "x.safetensors", names[:2])
    assert load_classifier(tmp_path / "x.safetensors", names).class_names == names
    with pytest.raises(UserError, match="differs from"):
        load_classifier(source, names[::-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--score", "0.5"], "--score would have no effect"), (["--config", "x", "--top-k", "3"], "--top-k would have")],
)
def test_predict__options_of_the_other_kind_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run("x.safetensors", "y", "--out", tmp_path, *words)


def test_predict__checkpoint_of_a_detector_needs_a_config(tmp_path: Path) -> None:
    (tmp_path / "epoch_1.pth").touch()
    with pytest.raises(UserError, match="add --config"):
        run(tmp_path / "epoch_1.pth", "y", "--out", tmp_path / "out")


def test_open_files__words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "deep/er").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "note.txt", "deep/c.png", "deep/er/[d].png"):
        (tmp_path / name).touch()

    def names(*words: str) -> list[str]:
        return [str(Path(path).relative_to(tmp_path)) for path in open_files([str(tmp_path / w) for w in words]).paths]

    assert sorted(names(".")) == ["a.jpg", "b.png", "deep/c.png", "deep/er/[d].png"]
    assert names("*.png", "a.jpg", "b.png") == ["b.png", "a.jpg"]
    assert "1 images are named more than once" in caplog.text
    assert names("**/*.png") == ["b.png", "deep/c.png", "deep/er/[d].png"]
    assert names("deep/er/[d].png") == ["deep/er/[d].png"], "a file is not a pattern"
    assert names("note.txt") == ["note.txt"], "a file that is named is tried"
    assert names("*.*") == ["a.jpg", "b.png"]
    assert "left out 1 files that are not images" in caplog.text
    for word, message in (
        ("*.gif", "matches no image"),
        ("n*.txt", "1 other files match"),
        ("x.png", "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            names(word)


def test_predict__keeps_the_epsilon_of_the_backbone(tmp_path: Path) -> None:
    """ViTs of Hugging Face have 1e-12."""
    config = test_classify.config_of(protocol="finetune", **SHORT)
    model = random_vit(config.data.image_size, **config.model.encoder_options)
    heads = {"num_heads": str(config.model.dims.num_heads), "norm_eps": "0.001"}
    write_safetensors(model.state_dict(), tmp_path / "b.safetensors", heads)
    classify(
        test_classify.config_of(protocol="finetune", backbone=str(tmp_path / "b.safetensors"), **SHORT),
        tmp_path / "run", device="cpu",
    )  # fmt: skip
    loaded = load_classifier(tmp_path / "run/classifier.safetensors").model
    assert loaded.blocks[0].norm1.eps == 1e-3  # type: ignore[index, union-attr]
