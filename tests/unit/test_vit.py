"""Any backbone file into timm's ViT: the same features as the model that wrote it, at any size, or an error that names why."""

import argparse
import json
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from mae_et.config.schema import PretrainConfig, from_dict, to_dict
from mae_et.errors import CheckpointError
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.pos_embed import is_sincos_table, sincos_pos_embed
from mae_et.models.position_table import fit_position_embedding
from mae_et.models.vit import random_vit, vit_from_state
from mae_et.storage.backbone import export, load_encoder, load_mae, read_backbone
from mae_et.storage.digest import encoder_digest
from tests.conftest import small_values

SMALL = {
    "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
    "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip


def small_mae(seed=0, **overrides):
    torch.manual_seed(seed)
    model = MaskedAutoencoder(32, **{**SMALL, **overrides}).eval()
    for parameter in model.parameters():  # biases and norms too, so that a lost one shows
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def run_checkpoint(model, path):
    config = from_dict(PretrainConfig, small_values(model__depth=2, model__decoder_depth=1))
    metadata = {
        "num_heads": "3", "decoder_num_heads": "2", "image_size": "32", "bandwidths": "[16, 24, 32]", "mask_ratio": "0.5",
        "target": "normalised pixels",
    }  # fmt: skip
    torch.save(
        {
            "kind": "pretrain",
            "model": model.state_dict(),
            "optimizer": {"state": {}},
            "config": to_dict(config),
            "metadata": metadata,
            "progress": {"step": 24},
            "num_steps": 24,
            "dataset_size": 20,
        },
        path,
    )
    return path


@torch.no_grad()
def assert_same_features(vit, mae, image_size, channels=3):
    images = torch.randn(2, channels, image_size, image_size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(vit.eval().forward_features(images), mae.features(images), rtol=1e-4, atol=1e-5)


# ---- every kind of file ----


@pytest.mark.parametrize("kind", ["run", "timm.safetensors", "timm.pth", "mae.safetensors", "official full", "prefix"])
@pytest.mark.parametrize("image_size", [32, 48])
def test_load_encoder__every_kind_of_file_gives_the_writers_features(tmp_path, kind, image_size):
    mae = small_mae()
    source = run_checkpoint(mae, tmp_path / "step_00000024.pt")
    num_heads = None  # the metadata say it
    if kind == "run":
        path = source
    elif "." in kind:
        layout, _, suffix = kind.partition(".")
        path = tmp_path / f"backbone.{suffix}"
        export(source, path, layout)
    else:
        path, num_heads = tmp_path / "official.pth", 3
        state = mae.state_dict()
        if kind == "prefix":
            state = {f"module.{key}": value for key, value in state.items()}
        torch.save({"model": state, "args": argparse.Namespace(norm_pix_loss=True), "epoch": 800}, path)
    vit = load_encoder(path, image_size, num_heads=num_heads)
    assert isinstance(vit, VisionTransformer)
    assert vit.num_classes == 0
    assert_same_features(vit, mae, image_size)
    with pytest.raises(AssertionError, match="not close"):  # the comparison can fail
        assert_same_features(vit, small_mae(seed=1), image_size)


def test_load_encoder__official_encoder_file_and_known_width(tmp_path):
    mae = small_mae(embed_dim=192)
    state = {k: v for k, v in mae.state_dict().items() if not k.startswith(("decoder_", "mask_token"))}
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_tiny.pth")
    vit = load_encoder(tmp_path / "mae_pretrain_vit_tiny.pth", 32)
    assert vit.blocks[0].attn.num_heads == 3
    assert_same_features(vit, mae, 32)


def test_load_encoder__timms_own_state_with_its_head(tmp_path, caplog):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7).eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    caplog.set_level("INFO")
    vit = load_encoder(tmp_path / "vit.pth", 64)
    assert "left out 2 tensors outside the encoder (head)" in caplog.text
    assert torch.equal(vit.pos_embed, theirs.pos_embed)  # learnt, and of this size
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(vit.eval().forward_features(images), theirs.forward_features(images))


def test_load_encoder__grey_and_other_mlp(tmp_path):
    mae = small_mae(in_chans=1, mlp_ratio=2.5)
    torch.save(mae.state_dict(), tmp_path / "grey.pth")
    assert_same_features(load_encoder(tmp_path / "grey.pth", 32, in_chans=None, num_heads=3), mae, 32, channels=1)
    with pytest.raises(CheckpointError, match="has in_chans = 1, not 3"):
        load_encoder(tmp_path / "grey.pth", 32, num_heads=3)


def test_load_encoder__nothing_random_is_left():
    """Two loads from other states of the generator are equal to the bit."""
    state = small_mae().state_dict()
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(vit_from_state(state, 32, num_heads=3, global_pool="token").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_load_encoder__average_pool_takes_no_final_norm(caplog):
    caplog.set_level("INFO")
    mae = small_mae()
    vit = vit_from_state(mae.state_dict(), 32, num_heads=3, global_pool="avg", num_classes=5, drop_path_rate=0.2)
    assert "norm" in caplog.text
    assert torch.equal(vit.fc_norm.weight, torch.ones(48))
    assert vit.head.weight.shape == (5, 48)
    assert 0 < vit.head.weight.abs().max() < 1e-4
    assert [round(block.drop_path1.drop_prob, 6) if i else 0 for i, block in enumerate(vit.blocks)] == [0, 0.2]
    images = torch.randn(2, 3, 32, 32)
    vit.eval()
    with torch.no_grad():
        raw = mae.features(images, blocks=[1])[0]
        torch.testing.assert_close(vit.forward_features(images), raw, rtol=1e-4, atol=1e-5)
        pooled = torch.nn.functional.layer_norm(raw[:, 1:].mean(dim=1), (48,), eps=1e-6)
        torch.testing.assert_close(
            vit.forward_head(vit.forward_features(images), pre_logits=True), pooled, rtol=1e-4, atol=1e-4
        )


# ---- positions ----


def test_fit_position_embedding__fixed_tables_are_computed_again():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        table = sincos_pos_embed(48, (4, 4)).to(dtype)
        assert is_sincos_table(table)
        assert torch.equal(fit_position_embedding(table, (7, 5), 48), sincos_pos_embed(48, (7, 5)))


def test_fit_position_embedding__learnt_tables_are_resampled():
    torch.manual_seed(0)
    learnt = torch.randn(1, 17, 48)
    assert not is_sincos_table(learnt)
    assert torch.equal(fit_position_embedding(learnt, (4, 4), 48), learnt)
    resampled = fit_position_embedding(learnt, (6, 6), 48)
    assert torch.equal(resampled, resample_abs_pos_embed(learnt, [6, 6]))
    assert torch.equal(resampled[:, 0], learnt[:, 0])


def test_fit_position_embedding__a_table_trained_on_is_not_replaced():
    """Fine-tuning starts from the fixed table and moves it."""
    tuned = sincos_pos_embed(48, (4, 4))
    tuned[0, 5, 7] += 0.01
    assert not is_sincos_table(tuned)
    assert torch.equal(fit_position_embedding(tuned, (4, 4), 48), tuned)


@pytest.mark.parametrize("shape", [(1, 16, 48), (1, 17, 32), (17, 48), (2, 17, 48), (1, 1, 48)])
def test_fit_position_embedding__wrong_shape(shape):
    with pytest.raises(CheckpointError, match=r"not a table for a cls token and a (square )?grid at width 48"):
        fit_position_embedding(torch.zeros(shape), (4, 4), 48)


# ---- what does not fit ----


def altered(change):
    state = dict(small_mae().state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), r"1 missing: blocks\.1\.mlp\.fc2\.bias"),
        (lambda s: s.pop("pos_embed"), r"1 missing: pos_embed"),
        (lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(48)}), r"1 unexpected: blocks\.0\.ls1\.gamma \(48,\)"),
        (
            lambda s: s.update({"blocks.0.attn.proj.bias": torch.ones(40)}),
            r"of another shape: blocks\.0\.attn\.proj\.bias \(40,\), the model has \(48,\)",
        ),
        (
            lambda s: [s.pop("norm.weight"), s.pop("norm.bias")],
            r"2 missing: norm.*global_pool='avg', which needs no final norm",
        ),
        (
            lambda s: [s.pop("norm.weight"), s.pop("norm.bias"), s.pop("cls_token")],
            r"3 missing: cls_token .*norm.*again with layout 'timm'",
        ),
    ],
)
def test_vit_from_state__names_what_does_not_fit(change, message):
    with pytest.raises(CheckpointError, match=f"the_file does not fit the ViT.*{message}"):
        vit_from_state(altered(change), 32, where="the_file", num_heads=3)


def test_vit_from_state__only_a_decoder():
    state = {k: v for k, v in small_mae().state_dict().items() if k.startswith(("decoder_", "mask_token"))}
    with pytest.raises(CheckpointError, match="holds only the decoder of an MAE"):
        vit_from_state(state, 32)


def test_vit_from_state__no_vit_at_all():
    with pytest.raises(CheckpointError, match=r"holds no ViT in a known layout \(\d+ tensors: conv1\.weight"):
        vit_from_state({"conv1.weight": torch.zeros(8, 3, 7, 7), "fc.bias": torch.zeros(5)}, 32)


def test_load_encoder__layout_without_cls_token_is_named(tmp_path):
    source = run_checkpoint(small_mae(), tmp_path / "step_00000024.pt")
    export(source, tmp_path / "x.pth", "mmdet")
    with pytest.raises(CheckpointError, match="layout 'mmdet' leaves these out"):
        load_encoder(tmp_path / "x.pth", 32)


def test_vit_from_state__unknown_number_of_heads():
    state = small_mae().state_dict()
    with pytest.raises(
        CheckpointError, match=r"width 48 and does not record its number of attention heads: set num_heads"
    ):
        vit_from_state(state, 32)
    assert vit_from_state(state, 32, metadata={"num_heads": "3"}).blocks[0].attn.num_heads == 3
    assert vit_from_state(state, 32, metadata={"num_heads": "3"}, num_heads=4).blocks[0].attn.num_heads == 4
    with pytest.raises(CheckpointError, match="num_heads = 5 does not divide the width 48"):
        vit_from_state(state, 32, num_heads=5)


def test_load_encoder__sizes():
    with pytest.raises(ValueError, match="image_size = 36 is not a multiple of the patch size 8; the nearest is 32"):
        vit_from_state(small_mae().state_dict(), 36, num_heads=3)
    with pytest.raises(CheckpointError, match="has patch_size = 8, not 16"):
        vit_from_state(small_mae().state_dict(), 32, num_heads=3, patch_size=16)
    with pytest.raises(ValueError, match="unknown size 'bse'; known: tiny, small"):
        load_encoder(None, 32, size="bse")


# ---- random ----


def test_random_encoder__starts_like_an_mae():
    """The same distribution, tensor by tensor: mean and deviation of both within what their numbers allow."""
    torch.manual_seed(0)
    vit = load_encoder(None, 64, size="tiny", patch_size=8)
    mae = MaskedAutoencoder(64, 8, embed_dim=192, depth=12, num_heads=3, decoder_embed_dim=32, decoder_depth=1,
                            decoder_num_heads=2)  # fmt: skip
    theirs = mae.state_dict()
    assert set(vit.state_dict()) == {key for key in theirs if not key.startswith(("decoder_", "mask_token"))}
    for key, value in vit.state_dict().items():
        other = theirs[key]
        assert value.shape == other.shape, key
        if other.std() == 0 or key == "pos_embed":
            assert torch.equal(value, other), key
        else:
            assert abs(value.std() / other.std() - 1) < 8 / math.sqrt(2 * value.numel()), key
            assert abs(value.mean() - other.mean()) < 8 * other.std() / math.sqrt(value.numel()), key


def test_random_encoder__seeded_and_with_options():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(random_vit(28, "tiny", patch_size=14, in_chans=1, num_classes=4, global_pool="avg"))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert models[0](torch.zeros(2, 1, 28, 28)).shape == (2, 4)
    with pytest.raises(ValueError, match="global_pool = 'max' must be"):
        random_vit(32, embed_dim=48, depth=1, num_heads=3, global_pool="max")
    with pytest.raises(ValueError, match="multiple of 4 and of num_heads = 5"):
        random_vit(32, embed_dim=48, depth=1, num_heads=5)


# ---- read_backbone and load_mae ----


def test_read_backbone__metadata_of_every_file(tmp_path):
    source = run_checkpoint(small_mae(), tmp_path / "step_00000024.pt")
    _, ours = read_backbone(source)
    assert (ours["num_heads"], ours["decoder_num_heads"], ours["image_size"]) == ("3", "2", "32")
    assert json.loads(ours["bandwidths"]) == [16, 24, 32]
    for name in ("x.safetensors", "x.pth"):
        export(source, tmp_path / name, "mae")
        _, found = read_backbone(tmp_path / name)
        assert ours.items() <= found.items(), name
    for norm_pix in (True, False):
        torch.save(
            {"model": small_mae().state_dict(), "args": argparse.Namespace(norm_pix_loss=norm_pix)}, tmp_path / "o.pth"
        )
        found = read_backbone(tmp_path / "o.pth")[1]
        assert found.pop("encoder_sha256")
        assert found == {"target": "normalised pixels" if norm_pix else "pixels"}
    torch.save(small_mae().state_dict(), tmp_path / "plain.pth")
    assert read_backbone(tmp_path / "plain.pth")[1].keys() == {"encoder_sha256"}


def test_read_backbone__the_same_encoder_has_the_same_digest_in_every_file(tmp_path):
    model = small_mae()
    source = run_checkpoint(model, tmp_path / "step_00000024.pt")
    digest = encoder_digest(model.state_dict())["encoder_sha256"]
    assert read_backbone(source)[1]["encoder_sha256"] == digest
    for layout in ("timm", "mae", "mmdet", "mmseg"):
        for suffix in ("safetensors", "pth") if layout in ("timm", "mae") else ("pth",):
            export(source, tmp_path / f"{layout}.{suffix}", layout)
            assert read_backbone(tmp_path / f"{layout}.{suffix}")[1]["encoder_sha256"] == digest, layout
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    assert read_backbone(tmp_path / "plain.pth")[1]["encoder_sha256"] == digest


def test_encoder_digest__tells_weights_apart():
    state = small_mae().state_dict()
    digest = encoder_digest(state)
    decoder = {**state, "mask_token": state["mask_token"] + 1, "decoder_embed.bias": state["decoder_embed.bias"] + 1}
    assert encoder_digest(decoder) == digest
    key = "blocks.0.mlp.fc1.bias"
    assert encoder_digest({**state, key: state[key] + 1e-6}) != digest
    assert encoder_digest({**state, key: state[key].view(-1, 2)}) != digest
    renamed = {("blocks.0.x" if name == key else name): value for name, value in state.items()}
    assert encoder_digest(renamed) != digest
    assert encoder_digest({"head.weight": state[key]}) == {}


def test_load_mae__predicts_as_the_model_that_was_saved(tmp_path):
    mae = small_mae(norm_pix_loss=True)
    source = run_checkpoint(mae, tmp_path / "step_00000024.pt")
    images, noise = torch.randn(2, 3, 48, 48), torch.rand(2, 36)
    for image_size in (None, 48):
        loaded, metadata = load_mae(source, image_size)
        assert loaded.norm_pix_loss
        assert metadata["mask_ratio"] == "0.5"
        assert not loaded.training
        with torch.no_grad():
            torch.testing.assert_close(loaded.predict(images, 0.5, noise), mae.predict(images, 0.5, noise))


def test_load_mae__official_files_have_to_say_their_target(tmp_path):
    path = tmp_path / "full.pth"
    torch.save({"model": small_mae().state_dict()}, path)
    heads = {"num_heads": 3, "decoder_num_heads": 2}
    with pytest.raises(CheckpointError, match="does not record whether it predicts pixels or normalised pixels"):
        load_mae(path, 32, **heads)
    assert not load_mae(path, 32, norm_pix_loss=False, **heads)[0].norm_pix_loss
    with pytest.raises(
        CheckpointError,
        match=r"decoder of .* has width 32 and does not record its number of attention heads: set decoder_num",
    ):
        load_mae(path, 32, norm_pix_loss=False, num_heads=3)


def test_load_mae__without_decoder_or_encoder(tmp_path):
    source = run_checkpoint(small_mae(), tmp_path / "step_00000024.pt")
    export(source, tmp_path / "backbone.safetensors")
    with pytest.raises(
        CheckpointError, match=r"backbone without the decoder .* so it cannot reconstruct: choose a checkpoint"
    ):
        load_mae(tmp_path / "backbone.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds no MAE: no encoder and no decoder"):
        load_mae(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="image_size = 36 is not a multiple of the patch size 8"):
        load_mae(source, 36)
