"""The proof of an export: it passes for what is right, and fails for what is wrong by a little."""

import pytest
import torch

import downstream.doctor as doctor
from downstream.doctor import examine
from mae_et.errors import CheckpointError
from mae_et.models.mae import MaskedAutoencoder
from mae_et.storage.backbone import write_backbone
from tests.downstream.test_vit import METADATA, small_vit
from tests.processes import run_command


@pytest.fixture
def backbone(tmp_path):
    write_backbone(small_vit().state_dict(), tmp_path / "b.safetensors", "timm", METADATA)
    return tmp_path / "b.safetensors"


def test_examine__all_paths_agree(backbone):
    report = examine(backbone)
    assert report.passed
    assert len(report.comparisons) == 4
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
    assert len(report.comparisons) == 3


def test_examine__a_wrong_path_fails(backbone, monkeypatch):
    load = doctor.ViTSeg.load_backbone

    def spoil(model, path):
        account = load(model, path)
        model.blocks[2].norm1.bias.data += 1e-2
        return account

    monkeypatch.setattr(doctor.ViTSeg, "load_backbone", spoil)
    report = examine(backbone)
    assert not report.passed
    assert [c.passed for c in report.comparisons] == [True, True, False, True]


def test_examine__no_vit(tmp_path):
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no ViT"):
        examine(tmp_path / "x.pth")


def test_tool__prints_where_keys_went(backbone):
    done = run_command("doctor", backbone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  ok  ") == 4
    assert "blocks.3.mlp.fc2.weight" in done.stdout
    assert "left out (3): cls_token, norm.weight, norm.bias" in done.stdout or "left out (3)" in done.stdout
