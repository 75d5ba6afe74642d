"""Pre-training continues from encoders of other libraries: DINOv2 and ViTs with learnt positions, on random weights."""

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
def test_dinov2_of_hugging_face(tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: requirements-dev.txt")
    dims = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    model = randomized(transformers.Dinov2Model(transformers.Dinov2Config(**dims)))
    model.save_pretrained(tmp_path / "plain")
    close(load_encoder(tmp_path / "plain", 32).eval().forward_features(images(32)), model(images(32)).last_hidden_state)
    for name, kind, options in (
        ("swiglu", "Dinov2", {"use_swiglu_ffn": True}),
        ("registers", "Dinov2WithRegisters", {"num_register_tokens": 2}),
    ):
        config = getattr(transformers, f"{kind}Config")(**dims, **options)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError, match=r"use_swiglu_ffn = true|model_type = 'dinov2_with_registers'"):
            load_encoder(tmp_path / name, 32)
        (tmp_path / name / "config.json").unlink()  # the tensors alone are refused as well
        with pytest.raises(CheckpointError, match=r"weights_in|register_tokens"):
            load_encoder(tmp_path / name, 32, num_heads=4)
