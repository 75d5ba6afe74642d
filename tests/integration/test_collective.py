"""Evaluation in two processes gives exactly the results of one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mae_et.config.schema import ClassifyConfig, DataConfig, from_dict
from mae_et.data.sources.spec import open_source
from mae_et.engine.distributed import World, join_world
from mae_et.errors import DataError
from mae_et.evaluation import collect as collect_module
from mae_et.evaluation import knn as knn_module
from mae_et.evaluation.collect import collect
from mae_et.evaluation.knn import knn_predict
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks.classify import classify
from mae_et.tasks.features import FeatureOptions, extract
from tests import processes
from tests.conftest import small_values

ALONE = World(0, 1, 1, torch.device("cpu"))
BAD = (0, 1, 8, 9, 10, 11, 21)  # one whole batch of 4 in the first share, single ones in both


def write_images(folder: Path, num: int, bad: tuple[int, ...]) -> str:
    """Writes images of three classes, some of them unreadable."""
    rng = np.random.default_rng(0)
    for i in range(num):
        path = folder / "abc"[i // 10] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour, noise = rng.integers(0, 200, (1, 1, 3)), rng.integers(0, 56, (12, 12, 3))
        pixels = (colour + noise).astype(np.uint8)  # batches differ in their statistics
        path.write_bytes(b"") if i in bad else Image.fromarray(pixels).save(path)
    return str(folder)


def evaluate(data: str, world: World) -> dict[str, Any]:
    """Collects features of a few images and classifies them, in batches of 4 and chunks of 3."""
    weight = torch.randn(3 * 8 * 8, 5, generator=torch.Generator().manual_seed(0))
    source = open_source(data)
    config = DataConfig(train=data, image_size=8)
    seen = collect(lambda images: images.flatten(1).float() @ weight, source, range(len(source)), config, world)
    part = collect(
        lambda images: images.flatten(1).float() @ weight, source, range(len(source)), config, world, gather=False
    )
    predictions = knn_predict(
        part.outputs, part.labels, seen.outputs.flip(0), [1, 7], world=world, block_sizes=part.batch_sizes
    )
    # Many features are equal, and their labels differ.
    ties = knn_predict(part.outputs.sign(), part.labels, seen.outputs, [2], world=world, block_sizes=part.batch_sizes)[
        2
    ]
    own = part.outputs
    return {
        "outputs": seen.outputs, "labels": seen.labels, "bad": seen.bad_images, "predictions": predictions, "ties": ties,
        "own": own,
    }  # fmt: skip


def classify_config(protocol: str, data: str, **overrides: Any) -> ClassifyConfig:
    values = small_values(**overrides)
    for name in ("mask_ratio", "decoder_embed_dim", "decoder_depth", "decoder_num_heads"):
        del values["model"][name]
    del values["run"]["num_pictures"]
    values |= {
        "protocol": protocol,
        "curriculum": {"preset": "constant", "equivalent_epochs": 2.0, "warmup_equivalent_epochs": 0.5},
        "data": {**values["data"], "train": data, "val": data, "max_bad_fraction": 0.5},
    }
    if protocol in ("knn", "linear_sweep"):
        values = {key: values[key] for key in ("protocol", "data", "model", "labels", "knn") if key in values}
        values |= {
            "knn": {"knn": values.get("knn", {"ks": [3, 7]})},
            "linear_sweep": {"sweep": {"lrs": [0.1, 1.0], "weight_decays": [0.0], "epochs": 3}},
        }[protocol]
        values["run"] = {"precision": "fp32"}
    if protocol == "linear_probe":
        values["optimizer"] = {"name": "lars", "base_lr": 100.0, "weight_decay": 0.0}
    return from_dict(ClassifyConfig, values)


FEW = {"labels__images_per_class": 2, "labels__num_draws": 3}
RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("knn", "knn", {}),
    ("few", "knn", {**FEW, "knn__ks": [3, 5]}),
    ("sweep", "linear_sweep", FEW),
    ("linear_probe", "linear_probe", {}),
)


def shrink_batches() -> None:
    collect_module.BATCH_SIZE, knn_module.MAX_SIMILARITIES = 4, 66


def work(ports: list[int], folder: str, data: str) -> None:
    """Runs everything in one of two processes; the results go to files."""
    shrink_batches()
    rank = int(os.environ["RANK"])

    def next_world() -> None:
        os.environ["MASTER_PORT"] = str(ports.pop())  # a port serves one group

    next_world()
    with join_world("cpu") as world:
        results = evaluate(data, world) | {"shared": world.gather_rows(torch.full((rank, 2), rank)).tolist()}
        for num_images, all_bad in ((3, False), (2, True)):  # fewer batches than processes
            indices = BAD[:2] if all_bad else range(15, 15 + num_images)
            try:
                seen = collect(
                    torch.Tensor.double, open_source(data), indices, DataConfig(train=data, image_size=8), world
                )
                results[f"few {num_images}"] = seen.labels.tolist()
            except DataError as error:
                results[f"few {num_images}"] = str(error)
        torch.save(results, Path(folder) / f"rank_{rank}.pt")
    for name, protocol, changes in RUNS:
        next_world()
        summary = classify(classify_config(protocol, data, **changes), Path(folder) / name, device="cpu")
        assert bool(summary) == (rank == 0)
    for suffix in ("npy", "safetensors"):
        options = FeatureOptions(size="tiny", image_size=32, batch_size=4, num_workers=0)
        next_world()
        index = extract("random", data, Path(folder) / suffix / f"x.{suffix}", options, "cpu")
        assert (index is not None) == (rank == 0)
    bad_backbone = FeatureOptions(size="tiny", image_size=32, num_workers=0, mean=[0, 0, 0], std=[1e-38] * 3)
    next_world()
    with pytest.raises(ValueError, match="a feature is not finite"):  # on both
        extract("random", data, Path(folder) / "nan" / "x.npy", bad_backbone, "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_images(tmp_path_factory.mktemp("collective") / "data", 30, BAD)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """The folder with the results of two processes."""
    folder = tmp_path_factory.mktemp("two")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(8)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in sockets]
    ended = processes.run(partial(work, ports, str(folder), data), 2, folder / "output")
    assert [code for code, _ in ended] == [0, 0], ended
    return folder


@pytest.fixture
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_module, "BATCH_SIZE", 4)
    monkeypatch.setattr(knn_module, "MAX_SIMILARITIES", 66)


@pytest.mark.usefixtures("_small_batches")
def test_collect__two_processes_equal_one(two: Path, data: str) -> None:
    expected = evaluate(data, ALONE)
    assert list(expected["bad"]) == list(BAD)
    assert expected["outputs"].shape == (23, 5)
    for rank in (0, 1):
        found = torch.load(two / f"rank_{rank}.pt", weights_only=True)
        assert torch.equal(found["outputs"], expected["outputs"])
        assert torch.equal(found["labels"], expected["labels"])
        assert found["bad"] == expected["bad"]
        assert list(found["bad"]) == list(BAD)
        assert found["predictions"].keys() == expected["predictions"].keys()
        assert all(torch.equal(found["predictions"][k], expected["predictions"][k]) for k in (1, 7))
        assert torch.equal(found["ties"], expected["ties"])
    parts = [torch.load(two / f"rank_{rank}.pt", weights_only=True)["own"] for rank in (0, 1)]
    assert min(map(len, parts)) > 0
    assert torch.equal(torch.cat(parts), expected["outputs"])  # no process holds the whole bank


def test_collect__fewer_batches_than_processes(two: Path) -> None:
    for rank in (0, 1):
        found = torch.load(two / f"rank_{rank}.pt", weights_only=True)
        assert found["few 3"] == [1, 1, 1]
        assert "none of the 2 images can be read" in found["few 2"]
        assert found["shared"] == [[1, 1]]


@pytest.mark.parametrize(("num", "unit", "size"), [(0, 1, 3), (10, 4, 2), (10, 4, 5), (7, 1, 3), (100, 8, 8)])
def test_share__parts_are_the_items_in_order(num: int, unit: int, size: int) -> None:
    parts = [World(rank, size, size, torch.device("cpu")).share(np.arange(num), unit) for rank in range(size)]
    assert np.concatenate(parts).tolist() == list(range(num))
    assert all(part[0] % unit == 0 for part in parts if len(part))
    units = [-(-len(part) // unit) for part in parts]
    assert max(units) - min(units) <= 1  # none works much longer than another


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize(("run", "protocol", "changes"), RUNS[:3], ids=[run[0] for run in RUNS[:3]])
def test_classify__cached_features_of_two_processes_equal_those_of_one(
    run: str, protocol: str, changes: dict[str, Any], two: Path, data: str, tmp_path: Path
) -> None:
    expected = classify(classify_config(protocol, data, **changes), tmp_path / "one", device="cpu")
    found = json.loads((two / run / "summary.json").read_text())
    timed = {"seconds", "feature_seconds", "knn_seconds", "sweep_seconds", "peak_memory_mb"}
    assert {k: v for k, v in found.items() if k not in timed} == {k: v for k, v in expected.items() if k not in timed}
    for name in ("per_class.csv", "confusion.csv"):
        assert (two / run / name).read_text() == (tmp_path / "one" / name).read_text()


def test_classify__linear_probe_is_evaluated_with_the_saved_statistics(two: Path, data: str) -> None:
    """The statistics of a BatchNorm differ between processes; the accuracy is that of the saved classifier."""
    state = load_file(two / "linear_probe/classifier.safetensors")
    config = classify_config("linear_probe", data)
    from mae_et.tasks.classification import preprocess
    from mae_et.tasks.classifier import build_classifier

    model = build_classifier(config, 3)
    model.load_state_dict(state)
    model.eval()
    source = open_source(data)
    seen = collect(lambda images: model(preprocess(images, 32, config)), source, range(30), config.data, ALONE)
    loss = torch.nn.functional.cross_entropy(seen.outputs, seen.labels)
    last = [line for line in read_jsonl(two / "linear_probe/metrics.jsonl") if "val/loss" in line][-1]
    assert last["val/loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_extract__two_processes_equal_one(two: Path, data: str, tmp_path: Path, suffix: str) -> None:
    options = FeatureOptions(size="tiny", image_size=32, batch_size=4, num_workers=0)
    extract("random", data, tmp_path / f"x.{suffix}", options, "cpu")
    assert (two / suffix / "x.json").read_bytes() == (tmp_path / "x.json").read_bytes()
    if suffix == "npy":
        assert (two / "npy/x.npy").read_bytes() == (tmp_path / "x.npy").read_bytes()
    else:  # the order of the metadata within the file is random
        found, expected = (load_file(folder / "x.safetensors") for folder in (two / suffix, tmp_path))
        assert all(torch.equal(found[name], expected[name]) for name in ("features", "labels"))
    assert sorted(path.name for path in (two / suffix).iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    assert not list((two / "nan").iterdir())
