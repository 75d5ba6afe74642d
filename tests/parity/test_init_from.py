"""Pre-training continues from encoders of other libraries: DINOv2 and ViTs with learnt positions, on random weights."""

import json
from pathlib import Path

import pytest
import timm
import torch

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.errors import CheckpointError, ConfigError
from mae_et.models.mae import MaskedAutoencoder
from mae_et.storage.backbone import load_encoder, load_initial_weights, load_mae, write_backbone
from mae_et.storage.checkpoint import list_checkpoints
from mae_et.tasks.pretrain import pretrain
from tests.conftest import small_values

DIMS = {"embed_dim": 32, "depth": 2, "num_heads": 4}


def randomized(model):
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def mae(image_size=32, **options):
    return MaskedAutoencoder(image_size, 8, 3, 32, 2, 4, 16, 1, 2, **options).eval()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def dinov2(tmp_path):
    """timm's DINOv2 with layer scales, learnt positions and a classifier, in a file."""
    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=32, patch_size=8, num_classes=3, init_values=0.3, **DIMS
    )
    torch.save({"state_dict": randomized(model).state_dict()}, tmp_path / "dinov2.pth")
    return model


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 16])
def test_mae__has_the_features_of_timms_dinov2_at_each_size(dinov2, tmp_path, size, caplog):
    ours = mae(learnt_positions=True)
    load_initial_weights(ours, tmp_path / "dinov2.pth")
    assert "left out the classifier: head.weight, head.bias" in caplog.text
    dinov2.set_input_size(img_size=(size, size))
    close(ours.features(images(size)), dinov2.forward_features(images(size)))
    assert not torch.allclose(ours.features(images(size)), mae().features(images(size)), atol=1e-2)


def test_pretrain__keeps_the_learnt_table_in_checkpoint_and_backbone(dinov2, tmp_path):
    options = {"model__init_from": str(tmp_path / "dinov2.pth"), "model__patch_size": 8, "optimizer__base_lr": 1e-12}
    dims = {"model__size": "tiny", **{f"model__{key}": value for key, value in DIMS.items()}}
    values = small_values(**dims, **options, data__image_size=32, model__learnt_positions=True)
    config = from_dict(PretrainConfig, values)
    pretrain(config, tmp_path / "run", device="cpu")
    model, _ = load_mae(list_checkpoints(tmp_path / "run/checkpoints")[-1])
    assert torch.equal(model.pos_embed, dinov2.pos_embed)
    encoder = load_encoder(tmp_path / "run", 16).eval()
    close(model.features(images(16)), encoder.forward_features(images(16)))
    with pytest.raises(CheckpointError, match=r"pos_embed .* Set model\.learnt_positions = True"):
        load_initial_weights(mae(), tmp_path / "dinov2.pth")
    write_backbone(mae().state_dict(), tmp_path / "sincos.pth", "timm", {"num_heads": "4"})
    with pytest.raises(
        CheckpointError, match=r"has the fixed sine-cosine table, so learnt_positions = True has no effect"
    ):
        load_initial_weights(mae(learnt_positions=True), tmp_path / "sincos.pth")
    with pytest.raises(ConfigError, match="learnt_positions = True needs init_from"):
        from_dict(PretrainConfig, small_values(model__learnt_positions=True))


@torch.no_grad()
def test_dino_of_hugging_face(tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: requirements-dev.txt")
    dims = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    gated = {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 48}
    for kind, options in (
        ("Dinov2", {}),
        ("Dinov2", {"use_swiglu_ffn": True}),
        ("Dinov2WithRegisters", {"num_register_tokens": 2}),
        ("DINOv3ViT", {"num_register_tokens": 2}),
        ("DINOv3ViT", gated),
    ):
        model = randomized(
            getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**dims, **options))
        )
        folder = tmp_path / f"{kind}{len(options)}"
        model.save_pretrained(folder)
        theirs = [model(images(size)).last_hidden_state for size in (32, 16)]
        close(load_encoder(folder, 32).eval().forward_features(images(32)), theirs[0])
        if kind != "Dinov2":  # transformers resamples its table without antialiasing, timm with it
            close(load_encoder(folder, 16).eval().forward_features(images(16)), theirs[1])
        torch.save(model.state_dict(), tmp_path / "memory.pth")  # the names in memory differ from those of the file
        if options != gated:  # without registers and config.json, its rotary positions could be others
            close(load_encoder(tmp_path / "memory.pth", 32, num_heads=4).eval().forward_features(images(32)), theirs[0])
    for name, value, message in (
        ("rope_theta", 50.0, "rope_theta = 50.0; only 100"),
        ("hidden_act", "gelu", "hidden_act = 'gelu'; only 'silu'"),
        ("model_type", "dinov3_convnext", "model_type = 'dinov3_convnext'"),
    ):
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(CheckpointError, match=message):
            load_encoder(tmp_path / "memory.pth", 32)
