"""Images that are not 8-bit RGB, from the files to probe, features and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from timm.models import adapt_input_conv

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.data.sources.spec import open_images
from mae_et.data.stream import make_loader
from mae_et.data.transforms import make_train_transform
from mae_et.errors import ConfigError
from mae_et.evaluation.pictures import reconstruct
from mae_et.lowfreq import crop_and_normalize, normalize
from mae_et.storage.backbone import load_initial_weights, load_mae
from mae_et.tasks.features import FeatureOptions, extract
from mae_et.tasks.pretrain import MAETask, build_model
from mae_et.tasks.reconstruct import ReconstructOptions, draw_reconstructions
from mae_et.tasks.run import run_training
from tests.conftest import small_values
from tests.integration.test_classify import run as classify
from tests.plans import plan_for

tifffile = pytest.importorskip("tifffile")

RANGE = (0, 10000)  # reflectance of Sentinel-2
FIVE = {"model__in_chans": 5, "data__mean": [0.1] * 5, "data__std": [0.05] * 5, "data__value_range": RANGE}
SHORT = {"curriculum__equivalent_epochs": 2.0, "curriculum__warmup_equivalent_epochs": 0.5}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiled 5-band 16-bit TIFF files of two classes: a bright spot in band 0 or in band 4."""
    root, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for split, number in (("train", 10), ("val", 4)):
        for label, band in (("field", 0), ("water", 4)):
            (root / split / label).mkdir(parents=True)
            for i in range(number):
                values = rng.normal(1000, 100, (48, 56, 5))
                values[8:40, 8:40, band] += 1500
                tifffile.imwrite(
                    root / split / label / f"{i}.tif", values.astype(np.uint16), photometric="minisblack", planarconfig="contig",
                    tile=(16, 16), compression="lzw", predictor=2,
                )  # fmt: skip
    return root


def pretrain(root: Path, work_dir: Path, **overrides: Any) -> dict[str, Any]:
    values = small_values(data__train=str(root / "train"), **{**FIVE, **SHORT, **overrides})
    return run_training(MAETask, from_dict(PretrainConfig, values), work_dir, device="cpu")


def test_five_bands_of_16_bits__from_files_to_probe_and_pictures(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = pretrain(
        scenes,
        run,
        data__val=str(scenes / "val"),
        run__picture_channels=[4, 2, 0],
        run__num_pictures=2,
        data__loading="direct",
    )
    assert summary["knn_top1_after"] > 0.5
    assert not summary["data_findings"]["error"]
    assert len(list((run / "reconstructions").glob("*.png"))) == 3
    with safe_open(run / "backbone.safetensors", "np") as file:
        assert json.loads(file.metadata()["value_range"]) == list(RANGE)
        assert file.get_tensor("patch_embed.proj.weight").shape[1] == 5

    # The tensors of the decoder are those of five bands, and the picture shows the chosen ones.
    model, _ = load_mae(run)
    images = np.stack([tifffile.imread(path) for path in sorted((scenes / "val" / "water").iterdir())[:1]])
    pixels = torch.from_numpy(images[:, :32, :32].astype(np.float32) / 10000).permute(0, 3, 1, 2)
    pictures = reconstruct(model, pixels, 32, [0.1] * 5, [0.05] * 5, channels=(4, 2, 0))
    assert pictures["original"].shape == (1, 3, 32, 32)
    torch.testing.assert_close(pictures["original"], pixels[:, [4, 2, 0]].mul(1 / 0.2).clamp(0, 1))  # 0 to mean + 2 std
    record = draw_reconstructions(
        run, [str(scenes / "val"), str(next((scenes / "val" / "water").iterdir()))], tmp_path / "pictures",
        ReconstructOptions(max_images=2, tile=32, channels=(4,)), "cpu",
    )  # fmt: skip
    assert record["num_pictures"] == 3
    with Image.open(tmp_path / "pictures" / "000_0.png") as picture:
        assert np.ptp(np.asarray(picture.convert("L"))) > 100

    index = extract(str(run), str(scenes / "val"), tmp_path / "f.npy", FeatureOptions(num_workers=0), "cpu")
    assert index is not None
    assert index["value_range"] == RANGE
    assert index["shape"] == [8, 48]

    probe = classify(
        tmp_path / "knn", "knn", data__train=str(scenes / "train"), data__val=str(scenes / "val"),
        backbone=str(run / "backbone.safetensors"), knn__ks=[3], **FIVE,
    )  # fmt: skip
    assert probe["top1"] > 0.8
    assert probe["num_train"] == 20


def test_loading__exact_and_direct(scenes: Path) -> None:
    stages = [{"compute_fraction": 0.5, "bandwidth": 16}, {"compute_fraction": 0.5, "bandwidth": 32}]
    values = small_values(data__train=str(scenes / "train"), curriculum__stages=stages, **FIVE, **SHORT)
    config = from_dict(PretrainConfig, values)
    source = open_images(config.data, config.data.train, 5)
    plan, transform = plan_for(config, len(source)), make_train_transform(config.data)
    exact, direct = (list(make_loader(source, transform, plan, 0, loading=name)) for name in ("exact", "direct"))
    assert [batch.images.shape[-1] for batch in direct] == [plan.stage_at(i).bandwidth for i in range(plan.num_steps)]
    assert torch.equal(exact[-1].images, direct[-1].images)
    assert exact[0].images.shape[1:] == (5, 32, 32)
    assert exact[0].images.dtype == torch.float32
    cropped = crop_and_normalize(exact[0].images, 16, [0.1] * 5, [0.05] * 5, centered=True)
    resized = normalize(direct[0].images, [0.1] * 5, [0.05] * 5)
    assert (cropped - resized).square().mean() < 0.1 * cropped.var()
    with pytest.raises(
        ConfigError, match=r'data\.loading = "fast" decodes 8-bit colour JPEG files; with model.in_chans = 5'
    ):
        from_dict(PretrainConfig, small_values(**FIVE, data__loading="fast"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__augmentation": {"ramp": "randaugment"}}, r"randaugment.*model\.in_chans = 5 use"),
        ({"replay": {"mode": "mix"}}, "replay.mode = 'mix' keeps 8-bit images"),
        ({"run__picture_channels": [0, 5, 1]}, "one or three channels from 0 to 4"),
        ({"run__picture_channels": [0, 1]}, "one or three channels"),
        ({"data__mean": [0.1] * 3}, "data.mean has 3 values, but model.in_chans = 5"),
    ],
)  # fmt: skip
def test_config__what_five_bands_cannot_have(overrides: dict[str, Any], message: str) -> None:
    values = small_values(**{**FIVE, "run__num_pictures": 1, **overrides})
    if "data__augmentation" in overrides:
        values["data"]["value_range"] = None
    with pytest.raises(ConfigError, match=message):
        from_dict(PretrainConfig, values)


def test_init_from__rgb_weights_for_five_bands(scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    rgb = build_model(from_dict(PretrainConfig, small_values()))
    torch.save({"model": rgb.state_dict()}, tmp_path / "rgb.pth")
    values = small_values(**FIVE, model__init_from=str(tmp_path / "rgb.pth"), model__adapt_channels="inflate")
    config = from_dict(PretrainConfig, values)
    model = build_model(config)
    with caplog.at_level("WARNING"):
        load_initial_weights(model, config.model.init_from, config.model.adapt_channels)
    assert "the patch projection was changed from 3 to 5 channels (inflate)" in caplog.text
    kernel = rgb.patch_embed.proj.weight.detach()
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), adapt_input_conv(5, kernel))
