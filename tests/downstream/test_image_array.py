"""Segmentation of images that are not 8-bit RGB."""

import json
import shlex
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from downstream import predict
from downstream.checks.headers import read_header
from downstream.datasets.image_array import LoadImageArray
from mae_et.errors import ConfigError, DataError, UserError
from mae_et.models.vit import random_vit
from mae_et.storage.backbone import write_backbone
from tests.cases.image_files import encode
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import SHORT, VIT, main, words, write_data

tifffile = pytest.importorskip("tifffile")

RANGE = (0, 4095)


def as_bands(path):
    """Replaces an RGB image by a TIFF file of five 12-bit bands, as pages; returns the values."""
    values = np.asarray(Image.open(path).convert("RGB")).astype(np.uint16) * 16
    values = np.concatenate([values, values[..., :2] // 2], axis=2)
    tifffile.imwrite(path.with_suffix(".tif"), values.transpose(2, 0, 1), compression="zlib")
    path.unlink()
    return values


def test_load_image_array__scales_to_255_and_orders_channels(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (6, 8, 5), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", values.transpose(2, 0, 1))
    results = LoadImageArray(5, list(RANGE))({"img_path": str(tmp_path / "x.tif")})
    np.testing.assert_allclose(results["img"], values * (255 / 4095), rtol=1e-6)
    assert results["img_shape"] == results["ori_shape"] == (6, 8)
    rgb = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    (tmp_path / "x.png").write_bytes(encode(rgb))
    np.testing.assert_array_equal(LoadImageArray(3)({"img_path": str(tmp_path / "x.png")})["img"], rgb[..., ::-1])
    with pytest.raises(DataError, match=r"x\.png: 3 bands of 8-bit .* model\.in_chans = 5"):
        LoadImageArray(5)({"img_path": str(tmp_path / "x.png")})
    assert read_header(tmp_path / "x.tif").size == (8, 6)
    np.save(tmp_path / "x.npy", values)
    assert read_header(tmp_path / "x.npy").size == (8, 6)


@pytest.mark.mm
@needs_mm
def test_train__five_bands_by_the_printed_options(tmp_path):
    data = write_data(tmp_path / "mm")
    for path in [*(data / "ade" / "images").rglob("*.jpg")]:
        as_bands(path)
    assert list((data / "ade" / "images").rglob("*.tif"))
    torch.manual_seed(0)
    vit = random_vit(64, **VIT, in_chans=5)
    metadata = {
        "num_heads": "4",
        "mean": "[0.4,0.4,0.4,0.2,0.2]",
        "std": "[0.2,0.2,0.2,0.1,0.1]",
        "value_range": "[0,4095]",
    }
    write_backbone(vit.state_dict(), tmp_path / "bands.safetensors", "timm", metadata)
    arguments = [
        "configs/segmentation/demo.py", "--work-dir", tmp_path / "run", "--backbone", tmp_path / "bands.safetensors",
        "--cfg-options", *words({**SHORT, "train_cfg.max_iters": 1}),
    ]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        main(data, "train", *arguments)
    fix = shlex.split(str(caught.value).split("--cfg-options ")[1].splitlines()[0])
    assert "model.backbone.in_channels=5" in fix
    main(data, "train", *arguments, *fix)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["last_loss"] > 0
    images, out = data / "ade/images/validation", tmp_path / "out"
    dense = ["--config", "segmentation/demo", "--out", out, "--device", "cpu", "--cfg-options", *fix]
    drawn = []
    overlay = predict.with_classes
    with patch.object(predict, "with_classes", lambda image, *others: drawn.append(image) or overlay(image, *others)):
        main(data, "predict", tmp_path / "run/iter_1.pth", images, "--pictures", "--channels", 4, 1, 0, *dense)
    values = tifffile.imread(sorted(images.glob("*.tif"))[0])[[4, 1, 0]].transpose(1, 2, 0) / 4095
    wanted = (values / [0.4, 0.8, 0.8]).clip(0, 1)  # from mean - 2 std = 0 to mean + 2 std
    np.testing.assert_allclose(np.asarray(drawn[0]) / 255, wanted, atol=0.6 / 255)
    record = json.loads((out / "predictions.json").read_text())
    assert (record["bad_images"], len(record["images"])) == ([], 2)
    with pytest.raises(UserError, match=r"channels \[0, 5, 1\] must be one or three numbers from 0 to 4"):
        main(
            data,
            "predict",
            tmp_path / "run/iter_1.pth",
            images,
            "--pictures",
            "--channels",
            0,
            5,
            1,
            "--overwrite",
            *dense,
        )
