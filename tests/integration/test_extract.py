"""tools/extract.py: the features in the file are those of the model, row by row, for any format, batch and bad image."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.data.sources.spec import open_source
from mae_et.data.transforms import EvalTransform
from mae_et.errors import UserError
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.mae import MaskedAutoencoder
from mae_et.storage.backbone import export, load_mae
from mae_et.tasks.pretrain import pretrain
from tests.conftest import load_tool, small_values
from tests.processes import run_command

DATA = "scenes:11@40,seed=5"
COMMON = ["--num-workers", "0", "--device", "cpu"]


TOOL = load_tool("extract")


def extract(*words: object) -> str:
    """Runs the tool in this process; returns what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        TOOL.main(TOOL.make_parser().parse_args([*map(str, words), *COMMON]))
    return out.getvalue()


def run_script(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs the command as a person does."""
    return run_command("extract", *words, *COMMON)


@torch.no_grad()
def tokens_one_by_one(model: MaskedAutoencoder, data: str, block: int | None = None) -> torch.Tensor:
    """[images, 1 + L, D]: each image alone through the MAE's own encoder."""
    source, found = open_source(data), []
    for i in range(len(source)):
        pixels = EvalTransform(32)(source.load(i))[None]
        images = crop_and_normalize(pixels, 32, [0.5] * 3, [0.25] * 3)
        tokens: Any = model.features(images) if block is None else model.features(images, [block])[0]
        found.append(tokens[0])
    return torch.stack(found)


def close(found: Any, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_extract__mean_features_and_index(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "features.npy"
    text = extract(checkpoint, DATA, "--out", out, "--batch-size", 4)
    assert "wrote 11 x 48 float32" in text
    assert sorted(path.name for path in out.parent.iterdir()) == ["features.json", "features.npy"]
    tokens = tokens_one_by_one(load_mae(checkpoint)[0], DATA)
    features = np.load(out, mmap_mode="r")
    assert features.dtype == np.float32
    close(features, tokens[:, 1:].mean(dim=1))
    index, source = json.loads(out.with_suffix(".json").read_text()), open_source(DATA)
    assert index["labels"] == list(source.labels or [])
    assert index["class_names"] == source.class_names
    assert index["names"] == [source.name(i) for i in range(11)]
    assert index["bad_images"] == []
    assert (index["image_size"], index["mean"], index["std"]) == (32, [0.5] * 3, [0.25] * 3)  # the checkpoint's
    assert (index["shape"], index["feature"], index["data"]) == ([11, 48], "mean", DATA)


@pytest.mark.parametrize(
    ("feature", "block"), [("cls", None), ("patches", None), ("cls", 0), ("mean", 1), ("patches", -1)]
)
def test_extract__every_feature_in_safetensors(
    checkpoint: Path, tmp_path: Path, feature: str, block: int | None
) -> None:
    export(checkpoint, tmp_path / "backbone.safetensors")
    out = tmp_path / "x.safetensors"
    words = [] if block is None else ["--block", block]
    extract(tmp_path / "backbone.safetensors", DATA, "--out", out, "--feature", feature, "--batch-size", 5, *words)
    tokens = tokens_one_by_one(load_mae(checkpoint)[0], DATA, None if block is None else block % 3)
    expected = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1), "patches": tokens[:, 1:]}[feature]
    found = load_file(out)
    close(found["features"], expected)
    assert found["labels"].tolist() == list(open_source(DATA).labels or [])
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["feature"]) == feature
        assert json.loads(file.metadata()["block"]) == block


def test_extract__bad_images_are_left_out_and_listed(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also a whole batch of them; the rows that stay keep their names and labels."""
    rng = np.random.default_rng(0)
    for i in range(9):
        folder = tmp_path / "data" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    for bad in ("a/4.png", "a/6.png", "b/3.png"):  # a: 0 2 4 6 8, b: 1 3 5 7
        (tmp_path / "data" / bad).write_bytes(b"no image")
    for suffix in ("npy", "safetensors"):
        out = tmp_path / f"x.{suffix}"
        caplog.clear()
        extract(checkpoint, tmp_path / "data", "--out", out, "--batch-size", 2)
        assert "left out 3 of 9 images" in caplog.text
        index = json.loads((tmp_path / "x.json").read_text())
        (tmp_path / "x.json").unlink()
        assert [name[-7:] for name in index["names"]] == [
            f"{p}.png" for p in ("a/0", "a/2", "a/8", "b/1", "b/5", "b/7")
        ]
        assert index["labels"] == [0, 0, 0, 1, 1, 1]
        assert [entry["name"][-7:] for entry in index["bad_images"]] == ["a/4.png", "a/6.png", "b/3.png"]
        assert all("not a readable image" in entry["reason"] for entry in index["bad_images"])
        features = np.load(out) if suffix == "npy" else load_file(out)["features"].numpy()
        assert features.shape == (6, 48)
    for name in ("4", "6"):
        (tmp_path / "data" / "a" / f"{name}.png").unlink()
    (tmp_path / "data" / "b" / "3.png").unlink()
    extract(checkpoint, tmp_path / "data", "--out", tmp_path / "good.npy")
    np.testing.assert_allclose(np.load(tmp_path / "good.npy"), features, rtol=1e-4, atol=1e-5)


def test_extract__a_fine_tuned_classifier(checkpoint: Path, tmp_path: Path) -> None:
    """It has no norm of the tokens; its blocks are read with the statistics of its own metadata."""
    mae = load_mae(checkpoint)[0]
    state = {k: v for k, v in mae.state_dict().items() if not k.startswith(("decoder_", "mask_token", "norm."))}
    state |= {"fc_norm.weight": torch.ones(48), "fc_norm.bias": torch.zeros(48), "head.weight": torch.zeros(10, 48)}
    metadata = {"image_size": "32", "num_heads": "3", "mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"}
    content = {"kind": "classify", "metadata": metadata, "progress": {"step": 1}, "num_steps": 1, "model": state}
    torch.save(content, tmp_path / "step_00000001.pt")
    with pytest.raises(UserError, match="give --block -1"):
        extract(tmp_path / "step_00000001.pt", DATA, "--out", tmp_path / "x.npy")
    extract(tmp_path / "step_00000001.pt", DATA, "--out", tmp_path / "x.npy", "--block", "-1")
    close(np.load(tmp_path / "x.npy"), tokens_one_by_one(mae, DATA, 2)[:, 1:].mean(dim=1))


def test_extract__sees_as_much_of_an_image_as_the_backbones_evaluation_did(tmp_path: Path) -> None:
    values = small_values(
        data__eval_crop_ratio=0.5, curriculum__equivalent_epochs=1.5, curriculum__warmup_equivalent_epochs=0.5
    )
    pretrain(from_dict(PretrainConfig, values), tmp_path / "run", device="cpu")
    backbone, features = tmp_path / "run/backbone.safetensors", {}
    source, mae = open_source(DATA), load_mae(sorted((tmp_path / "run/checkpoints").iterdir())[-1])[0]
    for ratio, words in ((0.5, []), (0.875, ["--crop-ratio", 0.875]), (1.0, ["--crop-ratio", 1])):
        out = tmp_path / f"{ratio}.npy"
        extract(backbone, DATA, "--out", out, *words)
        assert json.loads((tmp_path / f"{ratio}.json").read_text())["crop_ratio"] == ratio
        pixels = torch.stack([EvalTransform(32, ratio)(source.load(i)) for i in range(11)])
        with torch.no_grad():
            tokens: Any = mae.features(crop_and_normalize(pixels, 32, [0.5] * 3, [0.25] * 3))
        features[ratio] = np.load(out)
        close(features[ratio], tokens[:, 1:].mean(dim=1))
    assert np.abs(features[0.5] - features[1.0]).max() > 0.01


def test_extract__random_baseline_other_statistics_and_half_precision(tmp_path: Path) -> None:
    words = ["random", DATA, "--size", "tiny", "--image-size", 32]
    extract(*words, "--out", tmp_path / "a.npy")
    extract(*words, "--out", tmp_path / "b.npy", "--seed", 0, "--dtype", "float16")
    extract(*words, "--out", tmp_path / "c.npy", "--seed", 1)
    extract(*words, "--out", tmp_path / "d.npy", "--mean", 0, 0, 0, "--std", 1, 1, 1)
    a, b, c, d = (np.load(tmp_path / f"{name}.npy") for name in "abcd")
    assert json.loads((tmp_path / "a.json").read_text())["mean"] == [0.485, 0.456, 0.406]
    assert (a.shape, b.dtype) == ((11, 192), np.float16)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    assert np.abs(a - c).max() > 0.1
    assert np.abs(a - d).max() > 0.01


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{c}", DATA, "--out", "{t}/x.csv"], "must end in .npy or .safetensors"),
        (["{c}", DATA, "--out", "{t}/x.npy", "--block", "3"], "block 3 does not exist: the encoder has blocks 0 to 2"),
        (["{c}", DATA, "--out", "{t}/x.npy", "--crop-ratio", "1.5"], "crop_ratio = 1.5 must be above 0"),
        (["{c}", DATA, "--out", "{t}/x.npy", "--batch-size", "0"], "batch_size = 0 must be 1 or more"),
        (
            ["{c}", DATA, "--out", "{t}/x.npy", "--mean", "0.5"],
            "mean has 1 values, but the backbone takes 3 channels",
        ),
        (["{c}", DATA, "--out", "{t}/x.npy", "--image-size", "36"], "the nearest is 32"),
        (["{t}/none.pt", DATA, "--out", "{t}/x.npy"], "no such file or folder"),
        (["{c}", DATA, "--out", "{t}/x.npy", "--std", "1", "1", "0"], "std = [1.0, 1.0, 0.0] must be above 0"),
        (["{c}", "{t}/broken", "--out", "{t}/x.npy"], "none of the 1 images can be read"),
        (["{c}", DATA, "--out", "{t}/old.npy"], "old.npy exists: remove it or choose another --out"),
        (["{c}", DATA, "--out", "{t}/old.safetensors"], "old.json exists"),
    ],
)
def test_extract__faults_leave_nothing_behind(checkpoint: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"")
    (tmp_path / "old.npy").write_bytes(b"features")
    (tmp_path / "old.json").write_bytes(b"names")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        extract(*(word.format(c=checkpoint, t=tmp_path) for word in words))
    assert message in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.npy").read_bytes() == b"features"


def test_extract__a_fault_half_way_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["norm.weight"][:] = 3e38  # finite, but the features are not
    torch.save(state, tmp_path / "huge.pt")
    done = run_script(tmp_path / "huge.pt", DATA, "--out", tmp_path / "x.npy")
    assert done.returncode == 1
    assert "error: a feature is not finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["huge.pt"]


def test_extract__from_the_command_line_with_loader_processes(checkpoint: Path, tmp_path: Path) -> None:
    """Order and values do not depend on who reads the images."""
    done = run_script(checkpoint, DATA, "--out", tmp_path / "a.npy", "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    assert "wrote 11 x 48" in done.stdout
    tool = load_tool("extract")
    words = [checkpoint, DATA, "--out", tmp_path / "b.npy", "--batch-size", 2, "--num-workers", 2, "--device", "cpu"]
    tool.main(tool.make_parser().parse_args([*map(str, words)]))
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
