"""Every kind of file that --backbone takes, built from random weights under the names of its authors."""

from __future__ import annotations

import argparse
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from downstream import ViTDet, ViTSeg
from downstream.doctor import examine
from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.errors import CheckpointError
from mae_et.models.pos_embed import sincos_pos_embed
from mae_et.runs.provenance import describe_weights
from mae_et.storage.backbone import export
from mae_et.tasks.pretrain import pretrain
from tests.conftest import small_values

DIM, DEPTH, HEADS, PATCH, SIDE = 192, 4, 3, 16, 3  # a published width, whose number of heads is known
OPTIONS = {"img_size": SIDE * PATCH, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}


def blocks(prefix: str, dim: int, depth: int) -> dict[str, torch.Tensor]:
    shapes = {
        "norm1.weight": (dim,), "norm1.bias": (dim,), "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,),
        "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
        "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,), "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,),
    }  # fmt: skip
    return {f"{prefix}.{i}.{name}": 0.05 * torch.randn(shape) for i in range(depth) for name, shape in shapes.items()}


def official(full: bool) -> dict[str, torch.Tensor]:
    """The names of the official MAE's released files, in their order."""
    torch.manual_seed(0)
    encoder = {
        "cls_token": torch.randn(1, 1, DIM),
        "pos_embed": sincos_pos_embed(DIM, (SIDE, SIDE)),
        "patch_embed.proj.weight": 0.05 * torch.randn(DIM, 3, PATCH, PATCH),
        "patch_embed.proj.bias": torch.randn(DIM),
        **blocks("blocks", DIM, DEPTH),
        "norm.weight": torch.randn(DIM),
        "norm.bias": torch.randn(DIM),
    }
    if not full:
        return encoder
    return {
        **encoder,
        "mask_token": torch.randn(1, 1, 128),
        "decoder_pos_embed": sincos_pos_embed(128, (SIDE, SIDE)),
        "decoder_embed.weight": torch.randn(128, DIM),
        "decoder_embed.bias": torch.randn(128),
        **blocks("decoder_blocks", 128, 1),
        "decoder_norm.weight": torch.randn(128),
        "decoder_norm.bias": torch.randn(128),
        "decoder_pred.weight": torch.randn(PATCH * PATCH * 3, 128),
        "decoder_pred.bias": torch.randn(PATCH * PATCH * 3),
    }


def of_timm() -> dict[str, torch.Tensor]:
    """A classifier as timm publishes it, with learnt positions and a head."""
    torch.manual_seed(1)
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = VisionTransformer(**OPTIONS, num_classes=7, norm_layer=norm)
    return model.state_dict()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name -> file."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.save({"model": official(False)}, folder / "official.pth")
    arguments = argparse.Namespace(norm_pix_loss=True, epochs=800)
    torch.save(
        {"model": official(True), "optimizer": {"state": {}}, "epoch": 799, "args": arguments},
        folder / "official_full.pth",
    )
    torch.save(of_timm(), folder / "timm.pth")
    save_file(of_timm(), folder / "timm.safetensors")
    pretrain(from_dict(PretrainConfig, small_values(curriculum__equivalent_epochs=1.5)), folder / "run", device="cpu")
    found = {path.name: path for path in folder.iterdir() if path.is_file()}
    found["checkpoint"] = sorted((folder / "run" / "checkpoints").glob("step_*.pt"))[-1]
    export(found["checkpoint"], folder / "exported.safetensors")
    export(found["checkpoint"], folder / "exported.pth")
    return {**found, **{path.name: path for path in folder.glob("exported.*")}}


KINDS = [
    "official.pth", "official_full.pth", "timm.pth", "timm.safetensors", "checkpoint", "exported.safetensors", "exported.pth",
]  # fmt: skip
HEAD = {"head.weight", "head.bias"}
NORM = {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds__all_paths_give_the_same_features_and_every_key_has_its_place(files, kind):
    report = examine(files[kind])
    assert report.passed
    assert len(report.comparisons) == 4 + (find_spec("transformers") is not None)
    expected = set(NORM)
    if "timm" in kind:
        expected |= HEAD
    if kind in ("official_full.pth", "checkpoint"):
        expected |= {"mask_token"} | {
            key for key in report.accounts["detection (ViTDet)"].left_out if "decoder_" in key
        }
    assert set(report.accounts["segmentation (ViTSeg)"].left_out) == expected
    assert set(report.accounts["detection (ViTDet)"].left_out) == expected | {"cls_token"}


@pytest.mark.parametrize("cls", [ViTDet, ViTSeg])
@pytest.mark.parametrize("kind", ["official.pth", "official_full.pth", "timm.pth", "timm.safetensors"])
def test_kinds__the_tensors_are_the_files(files, cls, kind):
    model = cls(**OPTIONS, init_cfg={"type": "Pretrained", "checkpoint": str(files[kind])})
    model.init_weights()
    state = of_timm() if "timm" in kind else official(False)
    own = model.state_dict()
    for key in ("patch_embed.proj.weight", "blocks.1.attn.qkv.bias", "blocks.0.mlp.fc2.weight"):
        assert torch.equal(own[key], state[key]), key
    first = 0 if cls is ViTSeg else 1
    assert torch.allclose(own["pos_embed"], state["pos_embed"][:, first:], atol=1e-6)


def test_describe_weights__digests_and_metadata(files):
    found = describe_weights(files["exported.safetensors"])
    assert found.metadata["step"]
    assert found.metadata["mean"] == "[0.5, 0.5, 0.5]"
    assert found.encoder_sha256 == found.metadata["encoder_sha256"]
    assert len(found.sha256) == 64
    assert describe_weights(files["checkpoint"]).metadata["bandwidths"] == found.metadata["bandwidths"]
    assert describe_weights(files["timm.pth"]).metadata.keys() == {"encoder_sha256"}
    assert describe_weights("timm").sha256 is None
    assert describe_weights(None) is None


@pytest.mark.parametrize("cls", [ViTDet, ViTSeg])
def test_kinds__what_is_no_backbone_is_refused(files, tmp_path, cls):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(files["official.pth"].read_bytes()[:-1000])
    decoder = {key: value for key, value in official(True).items() if key.startswith(("decoder_", "mask_token"))}
    torch.save({"model": decoder}, tmp_path / "decoder.pth")
    torch.save({"model": {"conv1.weight": torch.zeros(4, 3, 7, 7)}}, tmp_path / "resnet.pth")
    for name, message in (
        ("broken.pth", "truncated|damaged"),
        ("decoder.pth", "missing: "),
        ("resnet.pth", "missing: "),
    ):
        model = cls(**OPTIONS, init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / name)})
        with pytest.raises(CheckpointError, match=message):
            model.init_weights()
        with pytest.raises(CheckpointError):
            examine(tmp_path / name)


def test_kinds__heads_that_the_file_does_not_give(files, caplog):
    """The number of heads is not in the shapes, so only an unusual one can be noticed."""
    ViTDet(**OPTIONS).load_backbone(files["timm.pth"])
    assert "attention heads" not in caplog.text
    ViTDet(**{**OPTIONS, "num_heads": 6}).load_backbone(files["timm.pth"])
    assert "ViTs of width 192 are published with 3, the model has 6" in caplog.text
