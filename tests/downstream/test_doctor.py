"""The proof of an export: it passes for what is right, and fails for what is wrong by a little."""

from importlib.util import find_spec

import pytest
import torch

import downstream.doctor as doctor
from downstream.doctor import examine
from mae_et.errors import CheckpointError
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.vit import random_vit
from mae_et.storage.backbone import write_backbone, write_safetensors
from mae_et.storage.huggingface import export_hugging_face
from tests.downstream.test_vit import METADATA, small_vit
from tests.processes import run_command

HAS_TRANSFORMERS = find_spec("transformers") is not None


@pytest.fixture
def backbone(tmp_path):
    write_backbone(small_vit().state_dict(), tmp_path / "b.safetensors", "timm", METADATA)
    return tmp_path / "b.safetensors"


def test_examine__all_paths_agree(backbone):
    report = examine(backbone)
    assert report.passed
    assert len(report.comparisons) == 4 + HAS_TRANSFORMERS
    assert all(0 <= c.difference <= 1e-4 for c in report.comparisons)
    assert set(report.accounts["segmentation (ViTSeg)"].left_out) == {"norm.weight", "norm.bias"}
    assert "cls_token" in report.accounts["detection (ViTDet)"].left_out


def test_examine__file_with_decoder_and_learnt_positions(tmp_path):
    torch.manual_seed(0)
    mae = MaskedAutoencoder(32, 8, 3, 24, 2, 2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    write_backbone(mae.state_dict(), tmp_path / "mae.pth", "mae", {"num_heads": "2"})
    assert examine(tmp_path / "mae.pth").passed
    state = small_vit().state_dict()
    torch.nn.init.normal_(state["pos_embed"])
    torch.save(state, tmp_path / "learnt.pth")
    report = examine(tmp_path / "learnt.pth", num_heads=2)
    assert report.passed
    assert len(report.comparisons) == 4 + HAS_TRANSFORMERS


def test_examine__a_wrong_path_fails(backbone, monkeypatch):
    load = doctor.ViTSeg.load_backbone

    def spoil(model, path):
        account = load(model, path)
        model.blocks[2].norm1.bias.data += 1e-2
        return account

    monkeypatch.setattr(doctor.ViTSeg, "load_backbone", spoil)
    report = examine(backbone)
    assert not report.passed
    assert [c.passed for c in report.comparisons] == [True, True, False, True] + [True] * HAS_TRANSFORMERS


@pytest.mark.parametrize(
    ("options", "name", "timms"),
    [
        ({"num_registers": 2}, "Dinov2WithRegistersModel", "VisionTransformer"),
        ({"num_cls_tokens": 3}, "PixioModel", "VisionTransformer"),
        ({"mlp": "swiglu", "mlp_ratio": 2.75}, "Dinov2Model", "VisionTransformer"),
        ({"num_registers": 1, "mlp": "swiglu", "rotary_positions": True}, "DINOv3ViTModel", "Eva"),
    ],
)
def test_examine__parts_of_dino(tmp_path, monkeypatch, options, name, timms):
    torch.manual_seed(0)
    model = random_vit(32, patch_size=8, embed_dim=32, depth=2, num_heads=4, **options)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    metadata = {"num_heads": "4", "image_size": "32", "num_cls_tokens": str(options.get("num_cls_tokens", 1))}
    state = model.state_dict()
    write_safetensors(state, tmp_path / "b.safetensors", metadata)
    report = examine(tmp_path / "b.safetensors")
    assert report.passed
    assert [c.what for c in report.comparisons][:2] == [
        f"{ours} and timm's {timms}" for ours in ("mae_et.load_encoder", "the encoder of pre-training")
    ]
    assert "detection and segmentation have no place for" in report.notes[0]
    assert not report.accounts
    if not HAS_TRANSFORMERS:
        return
    assert report.comparisons[2].what == f"transformers' {name} and mae_et.load_encoder"

    def spoil(path, folder, num_heads):
        write_safetensors(state | {"norm.bias": state["norm.bias"] + 1e-2}, tmp_path / "c.safetensors", metadata)
        return export_hugging_face(tmp_path / "c.safetensors", folder, num_heads=num_heads)

    monkeypatch.setattr(doctor, "export_hugging_face", spoil)
    assert [c.passed for c in examine(tmp_path / "b.safetensors").comparisons] == [True, True, False]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "transformers is not installed" in examine(tmp_path / "b.safetensors").notes[-1]


def test_examine__no_vit(tmp_path):
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no ViT"):
        examine(tmp_path / "x.pth")


def test_tool__prints_where_keys_went(backbone):
    done = run_command("doctor", backbone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  ok  ") == 4 + HAS_TRANSFORMERS
    assert "blocks.3.mlp.fc2.weight" in done.stdout
    assert "left out (3): cls_token, norm.weight, norm.bias" in done.stdout or "left out (3)" in done.stdout
