"""ONNX files of detectors and segmentors: what the libraries' own modules compute, at free and fixed sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock

from downstream.backbones.swin import PadThenShiftBlock
from downstream.export import TraceablePool, _stride, averages
from mae_et.errors import CheckpointError, UserError
from mae_et.storage.onnx_program import Sizes
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import main, untrained, words, write_data

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: requirements-dev.txt")
pytest.importorskip("onnxscript", reason="needs onnxscript: requirements-dev.txt")

BACKBONE = {"model.backbone.embed_dim": 16, "model.backbone.num_heads": 2}
DETECTOR: dict[str, Any] = {**BACKBONE, "model.backbone.depth": 1, "model.backbone.window_size": 3,
                            "model.backbone.global_blocks": "[]", "model.neck.in_channels": 16}  # fmt: skip
SEGMENTOR: dict[str, Any] = {**BACKBONE, "model.backbone.depth": 2, "model.backbone.out_indices": "[0,1]",
                             "model.backbone.rescales": "[2,1]", "model.decode_head.in_channels": "[16,16]",
                             "model.decode_head.in_index": "[0,1]", "model.decode_head.channels": 8,
                             "model.auxiliary_head.in_channels": 16, "model.auxiliary_head.in_index": 1}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def randomized(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


def trained(data: Path, task: str, folder: Path, options: dict[str, Any]) -> Any:
    """Writes a checkpoint of a small model with random weights where `mae-et train` writes it; returns the model."""
    folder.mkdir()
    model = untrained(data, task, folder / "iter_2.pth", ["a", "b"], words(options))
    content = torch.load(folder / "iter_2.pth")
    content["state_dict"] = randomized(model).state_dict()
    torch.save(content, folder / "iter_2.pth")
    (folder / "last_checkpoint").write_text(str(folder / "iter_2.pth"))
    model.cfg.dump(str(folder / "demo.py"))
    return model


@torch.no_grad()
def assert_same(path: Path, function: Any, *shapes: tuple[int, ...]) -> dict[str, str]:
    session = onnxruntime.InferenceSession(str(path))
    for shape in shapes:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        wanted = function(images)
        computed = session.run(None, {"images": images.numpy()})
        assert len(computed) == len(wanted)
        for ours, theirs in zip(wanted, computed, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-4, atol=1e-4)
    return session.get_modelmeta().custom_metadata_map


@pytest.mark.mm
@needs_mm
def test_backbone_with_windows__of_any_size(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(data, "detection", tmp_path / "run", DETECTOR)
    out = tmp_path / "b.onnx"
    main(data, "export", tmp_path / "run", out, "--layout", "onnx", "--dynamic", "size")
    # Patches of 8 px and windows of 3 patches: grids that are and are not multiples, and the smallest.
    metadata = assert_same(out, model.backbone, (1, 3, 128, 128), (3, 3, 72, 104), (2, 3, 32, 32))
    assert json.loads(metadata["mean"]) == pytest.approx([0.5] * 3)
    assert json.loads(metadata["std"]) == pytest.approx([0.25] * 3)
    assert (metadata["channel_order"], metadata["size_step"], metadata["least_size"]) == ("RGB", "8", "32")
    assert (metadata["strides"], metadata["class_names"]) == ("[8]", '["a", "b"]')
    assert "# map_0 [batch x 16 x " in capsys.readouterr().out
    for extra, message in (
        (("--part", "segmentor"), "MaskRCNN is a detector"),
        (
            ("--dynamic", "size", "--image-size", 100),
            "100 px does not fit a file of free size.* multiples of 8 px, and 32 px",
        ),
        (("--image-size", 4), "must be 8 px or more"),
        (("--entry", "model_ema"), "--entry has no effect: .* is a detector or segmentor"),
        (("--layout", "timm", "--part", "neck"), "--part has no effect with --layout timm"),
    ):
        with pytest.raises(UserError, match=message):
            main(data, "export", tmp_path / "run", out, "--layout", "onnx", *extra)
    (tmp_path / "run/other.py").touch()
    with pytest.raises(UserError, match=r"configs beside it: demo.py, other.py\): give it with --config"):
        main(data, "export", tmp_path / "run", out, "--layout", "onnx")
    with pytest.raises(CheckpointError, match="is a backbone file, not a checkpoint of a training run"):
        main(data, "export", data / "backbone.safetensors", out, "--layout", "onnx", "--config", "detection/demo")
    with pytest.raises(CheckpointError, match="does not fit"):
        main(data, "export", tmp_path / "run/iter_2.pth", out, "--layout", "onnx", "--config", "detection/demo")


@pytest.mark.mm
@needs_mm
def test_segmentor__logits_at_the_size_of_the_image(data: Path, tmp_path: Path) -> None:
    model = trained(data, "segmentation", tmp_path / "run", SEGMENTOR)
    main(data, "export", tmp_path / "run/iter_2.pth", tmp_path / "s.onnx", "--layout", "onnx", "--image-size", "60,84")
    assert_same(
        tmp_path / "s.onnx",
        lambda images: [model.encode_decode(images, [{"img_shape": images.shape[2:]}])],
        (1, 3, 60, 84), (3, 3, 60, 84),
    )  # fmt: skip
    with pytest.raises(UserError, match="part = 'neck', but EncoderDecoder has none"):
        main(data, "export", tmp_path / "run", tmp_path / "n.onnx", "--layout", "onnx", "--part", "neck")


def test_traceable_pool__equals_the_pooling_of_torch() -> None:
    for size, bins in ((7, 3), (6, 6), (5, 1), (2, 3), (13, 4)):
        x = torch.randn(2, 3, size, size + 2)
        wanted = torch.nn.AdaptiveAvgPool2d(bins)(x)
        torch.testing.assert_close(averages(size, bins) @ x @ averages(size + 2, bins).T, wanted)
        assert torch.equal(TraceablePool(bins)(x), wanted)


def test_stride__of_maps_whose_sides_are_rounded() -> None:
    for size, step, grid, stride in (
        ((96, 96), 32, (2, 2), 64),
        ((98, 70), 14, (7, 5), 14),
        ((60, 84), 8, (15, 21), 4),
    ):
        assert _stride(Sizes(size, step), torch.zeros(1, 1, *grid)) == stride


@pytest.mark.parametrize(("window", "shift", "grid"), [(7, 3, (14, 28)), (7, 3, (7, 7)), (4, 2, (8, 12))])
def test_swin_mask__equals_timms(window: int, shift: int, grid: tuple[int, int]) -> None:
    options: dict[str, Any] = {
        "window_size": window,
        "shift_size": shift,
        "always_partition": True,
        "dynamic_mask": True,
    }
    block, x = SwinTransformerBlock(8, grid, 2, **options), torch.zeros(1, *grid, 8)
    wanted = block.get_attn_mask(x)
    block.__class__ = PadThenShiftBlock
    assert torch.equal(block.shift_mask(x), wanted)
