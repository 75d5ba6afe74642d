"""Images of 32 x 48 px from pre-training to probe, features, pictures, another size, supervised training and a segmentor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict
from mae_et.config.supervised import SupervisedConfig
from mae_et.data.sources import raw_writer
from mae_et.data.sources.raw import RawOptions
from mae_et.data.sources.raw_writer import RawJob, write_raw
from mae_et.data.sources.spec import open_source
from mae_et.errors import CheckpointError
from mae_et.report.facts import bandwidths, describe
from mae_et.report.scan import discover
from mae_et.runs.record_files import read_summary
from mae_et.storage.backbone import export, load_encoder, load_mae
from mae_et.storage.huggingface import export_hugging_face
from mae_et.tasks.features import FeatureOptions, extract
from mae_et.tasks.knn import judge_by_knn
from mae_et.tasks.pretrain import pretrain
from mae_et.tasks.reconstruct import ReconstructOptions, draw_reconstructions
from mae_et.tasks.show import ShowOptions, show_pca
from mae_et.tasks.supervised import train_supervised
from tests.conftest import small_values
from tests.downstream.conftest import needs_mm

SIZE = [32, 48]
DATA = "scenes:12@40x60,seed=3"


def road_values(**overrides: Any) -> dict[str, Any]:
    """Returns config values of a run of 6 steps: 16 x 24 px with replay, then 32 x 48 px."""
    stages = [{"compute_fraction": part, "bandwidth": band} for part, band in ((0.2, 16), (0.8, 32))]
    changes = {
        "data__train": DATA, "data__image_size": SIZE, "curriculum__stages": stages, "curriculum__equivalent_epochs": 3.4,
        "curriculum__warmup_equivalent_epochs": 0.5, "model__depth": 2, "replay__mode": "mix",
        "replay__stages": [{"bandwidth": 16, "factor": 2, "size": 2}], "replay__max_memory_gib": 1.0, "run__num_pictures": 2,
    }  # fmt: skip
    return small_values(**{**changes, **overrides})


@pytest.fixture(scope="module")
def road_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp("road") / "run"
    pretrain(from_dict(PretrainConfig, road_values(data__val=DATA)), work_dir, device="cpu")
    return work_dir


def test_pretrain__a_rectangle_keeps_its_sides(road_run: Path) -> None:
    stages = json.loads((road_run / "summary.json").read_text())["stages"]
    assert [stage["input_size"] for stage in stages] == [[16, 24], SIZE]
    assert stages[0]["ideal_by_area"] == pytest.approx(4)
    (found,) = discover([road_run])
    assert bandwidths(found) == ["16 x 24", "32 x 48"]
    assert describe(found)["model"] == "ViT 2x48/8, 32 x 48 px"
    with Image.open(next((road_run / "reconstructions").glob("*.png"))) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.std() > 10
    encoder = load_encoder(road_run, None).eval()
    assert encoder.patch_embed.img_size == (32, 48)
    model, metadata = load_mae(road_run)
    assert json.loads(metadata["image_size"]) == SIZE
    assert metadata["architecture"] == "vit_width48_depth2_patch8_32x48"
    images = torch.randn(2, 3, *SIZE)
    torch.testing.assert_close(encoder.forward_features(images), model.features(images), atol=1e-5, rtol=0)
    exported = read_summary(road_run / "summary.json")
    assert exported.stages[0].size == (16, 24)


def test_init_from__another_rectangle(road_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw shards and direct loading: the pixels of a stage are read at its own size."""
    monkeypatch.setattr(
        raw_writer,
        "write_in_processes",
        lambda write, job, numbers, _, progress: ((n, write(job, n, lambda: progress(1))) for n in numbers),
    )
    write_raw(RawJob(open_source(DATA), tmp_path, "train", RawOptions(sizes=(40, 24))))
    header = tmp_path / "train.raw.json"
    changes = {
        "model__init_from": str(road_run), "data__image_size": [40, 24], "data__train": str(header),
        "data__loading": "direct", "curriculum__stages": [{"compute_fraction": 1.0, "bandwidth": 24}],
        "replay__stages": [{"bandwidth": 24, "factor": 2}],
    }  # fmt: skip
    summary = pretrain(from_dict(PretrainConfig, road_values(**changes)), tmp_path / "run", device="cpu")
    assert summary["stages"][0]["input_size"] in ((40, 24), [40, 24])


def test_probe_features_and_pictures(road_run: Path, tmp_path: Path) -> None:
    values = {
        "protocol": "knn", "backbone": str(road_run), "knn": {"ks": [3]}, "run": {"precision": "fp32"},
        "data": {"train": DATA, "val": DATA, "image_size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3, "num_workers": 0},
        "model": {"size": "tiny", "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    }  # fmt: skip
    assert judge_by_knn(from_dict(ClassifyConfig, values), tmp_path / "knn", device="cpu")["num_val"] == 12
    index = extract(
        str(road_run), DATA, tmp_path / "f.npy", FeatureOptions(feature="patches", num_workers=0), device="cpu"
    )
    assert index is not None
    assert (index["image_size"], index["shape"]) == (SIZE, [12, 24, 48])
    options = ReconstructOptions(max_images=1, tile=60)
    record = draw_reconstructions(road_run, [DATA], tmp_path / "pictures", options, device="cpu")
    assert record["bandwidths"] == [[16, 24], SIZE]
    with Image.open(next((tmp_path / "pictures").glob("*.png"))) as picture:
        assert 1.6 < picture.width / picture.height < 5  # four columns of 3:2 over two rows


def test_supervised__a_rectangle(tmp_path: Path) -> None:
    values = {
        "data": {"train": DATA, "val": DATA, "image_size": SIZE, "num_workers": 0},
        "model": {
            "name": "deit_tiny_patch16_224",
            "options": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1},
        },
        "curriculum": {
            "preset": "custom",
            "stages": [{"compute_fraction": part, "bandwidth": band} for part, band in ((0.2, 16), (0.8, 32))],
            "equivalent_epochs": 2.0,
            "baseline_equivalent_epochs": 2.0,
            "warmup_equivalent_epochs": 0.2,
        },
        "batch": {"global_batch_size": 4},
        "run": {"precision": "fp32"},
    }
    train_supervised(from_dict(SupervisedConfig, values), tmp_path / "run", device="cpu")
    summary = read_summary(tmp_path / "run" / "summary.json")
    assert [stage.input_size for stage in summary.stages] == [(16, 24), (32, 48)]
    values["model"]["init_from"] = str(tmp_path / "run")
    values["data"]["image_size"] = [48, 32]  # the learnt table is resampled between the grids
    values["curriculum"]["stages"] = [{"compute_fraction": 1.0, "bandwidth": 32}]
    train_supervised(from_dict(SupervisedConfig, values), tmp_path / "other", device="cpu")


def test_predict_show_and_hugging_face(road_run: Path, tmp_path: Path) -> None:
    image = tmp_path / "images" / "a.png"
    image.parent.mkdir()
    Image.effect_noise((60, 40), 90).convert("RGB").save(image)
    record = show_pca(str(road_run), [str(image)], tmp_path / "pca", ShowOptions(num_workers=0, device="cpu"))
    assert record["image_size"] == SIZE
    with pytest.raises(CheckpointError, match="its grid 4 x 6"):
        export_hugging_face(road_run, tmp_path / "hf")


@needs_mm
@pytest.mark.parametrize("layout", ["mmseg", "mmdet"])
def test_export__segmentors_and_detectors_get_the_rectangle(road_run: Path, tmp_path: Path, layout: str) -> None:
    from downstream.backbones.vit_det import ViTDet
    from downstream.backbones.vit_seg import ViTSeg
    from downstream.doctor import examine

    export(road_run, tmp_path / "backbone.pth", layout)
    cls = ViTSeg if layout == "mmseg" else ViTDet
    options = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    options |= {"out_indices": (0, 1), "rescales": (2, 1)} if layout == "mmseg" else {}
    model = cls(img_size=(32, 48), **options)
    model.load_backbone(tmp_path / "backbone.pth")
    maps = model(torch.randn(1, 3, 32, 48))
    assert maps[-1].shape[-2:] == (4, 6)
    first = int(model.has_cls_token)
    table = load_encoder(road_run, None).pos_embed
    torch.testing.assert_close(model.pos_embed[:, first:], table[:, 1:])
    larger = cls(img_size=(40, 48), positions="interpolate", **options)  # a rectangle is stretched, not cut
    larger.load_backbone(tmp_path / "backbone.pth")
    assert larger.pos_embed.shape[1] == 30 + first
    if layout == "mmseg":
        assert examine(road_run / "backbone.safetensors").passed
