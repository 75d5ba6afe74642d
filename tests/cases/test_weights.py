"""Weights from other frameworks, damaged or hostile files, and exports that the target library loads itself."""

import argparse
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path, PosixPath

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_et.errors import CheckpointError, UserError
from mae_et.models.linear_probe import LinearProbe
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.vit import random_vit, vit_from_state
from mae_et.storage import atomic
from mae_et.storage.atomic import atomic_path
from mae_et.storage.backbone import (
    export,
    load_encoder,
    load_initial_weights,
    load_mae,
    read_backbone,
    write_backbone,
    write_safetensors,
)
from mae_et.storage.checkpoint import save_checkpoint
from mae_et.storage.digest import state_digest
from mae_et.storage.layouts import to_layout
from mae_et.storage.metadata import loading_lines
from mae_et.storage.metrics_file import MetricsFile
from mae_et.storage.weights import find_weights, read_weights
from tests.conftest import REPOSITORY

SMALL = {
    "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
    "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip
HEADS = {"num_heads": "3", "decoder_num_heads": "2"}


def small_mae(seed=0, **overrides):
    torch.manual_seed(seed)
    model = MaskedAutoencoder(32, **{**SMALL, **overrides}).eval()
    for parameter in model.parameters():  # also biases and norms, so that a lost tensor changes the features
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def encoder_state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(("decoder_", "mask_token"))}


def small_vit(**options):
    """The encoder of `small_mae` in timm's class."""
    return vit_from_state(small_mae().state_dict(), 32, num_heads=3, **options).eval()


@torch.no_grad()
def assert_same_features(path, model, channels=3, **options):
    images = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(1))
    encoder = load_encoder(path, 32, num_heads=3, **options).eval()
    torch.testing.assert_close(encoder.forward_features(images), model.features(images), rtol=1e-5, atol=1e-5)


def saved(content, path):
    torch.save(content, path)
    return path


# ---- names of wrappers and entries of files ----


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.module.", "backbone.module.", "module.module.", "student.", "encoder.", "module._orig_mod.", "model.",
        "model.encoder.", "teacher.backbone.", "net.", "online_encoder.net.", "my_own.vit.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_head", [False, True])
def test_case__W1_prefixes_are_removed_and_logged(tmp_path, caplog, prefix, with_head):
    caplog.set_level("INFO")
    mae = small_mae()
    state = {prefix + key: value for key, value in encoder_state(mae).items()}
    if with_head:
        state |= {"head.weight": torch.zeros(5, 48), "head.bias": torch.zeros(5)}
    path = saved({"state_dict": state}, tmp_path / "w.pth")
    assert_same_features(path, mae)
    assert "from names" in caplog.text or "wrapper parts of names from" in caplog.text
    if with_head:
        assert "left out 2 tensors outside" in caplog.text


def test_case__W1_wrappers_inside_names(tmp_path):
    mae = small_mae()
    state = {
        re.sub(r"^(blocks\.\d+)\.", r"_fsdp_wrapped_module.\1._checkpoint_wrapped_module._orig_mod.", key): value
        for key, value in encoder_state(mae).items()
    }
    assert_same_features(saved(state, tmp_path / "w.pth"), mae)
    state["blocks.0.norm1.bias"] = torch.zeros(48)
    with pytest.raises(CheckpointError, match=r"ambiguous: two tensors would be named blocks\.0\.norm1\.bias"):
        read_weights(saved(state, tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("plain", "average"),
    [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("student", "teacher"), ("model", "ema"),
     ("state_dict", "ema_state_dict"), ("online", "momentum_encoder")],
)  # fmt: skip
def test_case__W2_average_beside_plain_weights_is_named(tmp_path, caplog, plain, average):
    models = {average: small_mae(1), plain: small_mae(0)}
    content = {name: encoder_state(model) for name, model in models.items()} | {"optimizer": {"state": {}}, "epoch": 3}
    path = saved(content, tmp_path / "w.pth")
    assert_same_features(path, models[plain])
    assert f"using {plain!r}. To use another ({average})" in caplog.text
    assert f"mae-et export {path} OUT.safetensors --entry NAME" in caplog.text
    export(path, tmp_path / "other.safetensors", entry=average)
    assert_same_features(tmp_path / "other.safetensors", models[average])


@pytest.mark.parametrize(
    ("plain", "average", "others"),
    [
        ("student", "teacher", []),
        ("encoder", "momentum_encoder", ["classifier", "projector.0", "momentum_projector.0"]),  # solo-learn
        (  # LightlyTrain
            "student_embedding_model.wrapped_model._model",
            "teacher_embedding_model.wrapped_model._model",
            ["student_projection_head.layers.0"],
        ),
    ],
)
def test_case__W2_average_as_prefix_of_names(tmp_path, caplog, plain, average, others):
    models = {average: small_mae(1), plain: small_mae(0)}
    state = {f"{name}.{key}": value for name, model in models.items() for key, value in encoder_state(model).items()}
    state |= {f"{name}.weight": torch.zeros(5, 48) for name in others}
    path = saved({"state_dict": state}, tmp_path / "w.pth")
    assert_same_features(path, models[plain])
    assert f"holds several encoders: using {plain!r}. To use another ({average})" in caplog.text
    export(path, tmp_path / "other.safetensors", entry=average)
    assert_same_features(tmp_path / "other.safetensors", models[average])
    with pytest.raises(
        CheckpointError, match=rf"no entry 'techer'; its encoders have the prefixes {average!r}, {plain!r}"
    ):
        export(path, tmp_path / "other.safetensors", entry="techer")


def test_case__W2_own_fine_tuning_with_ema(tmp_path, caplog):
    path = saved(
        {"model": encoder_state(small_mae(0)), "ema": encoder_state(small_mae(1))}, tmp_path / "step_00000001.pt"
    )
    assert_same_features(path, small_mae(0))
    assert "To use another (ema)" in caplog.text


@pytest.mark.parametrize(
    "entry", ["teacher", "module", "model_ema", "net", "model_state_dict", "weights", "state_dict.net", "a.b.c"]
)
def test_case__W3_any_entry_is_read(tmp_path, caplog, entry):
    content = encoder_state(small_mae())
    for name in reversed(entry.split(".")):
        content = {name: content}
    assert_same_features(saved(content | {"epoch": 3}, tmp_path / "w.pth"), small_mae())
    assert caplog.text == ""


def test_case__W3_the_message_names_the_entries_found(tmp_path):
    path = saved({"epoch": 3, "args": {"lr": 0.1}, "optimizer": {"state": {"a": torch.zeros(2)}}}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no tensors; its entries are: epoch, args, optimizer"):
        read_weights(path)


# ---- names of other libraries ----


def hugging_face(state, prefix, version=4):
    """Names of transformers' ViT and ViTMAE; written from its modules, independent of the reader."""
    layers = "decoder.decoder_layers." if version == 4 else "decoder.decoder_encoder.layer."
    renamed = {}
    for key, value in state.items():
        if key in ("mask_token", "decoder_pos_embed") or key.startswith(
            ("decoder_embed", "decoder_norm", "decoder_pred")
        ):
            renamed[f"decoder.{key}"] = value
            continue
        stack, owner = (layers, "") if key.startswith("decoder_") else ("encoder.layer.", prefix)
        found = re.fullmatch(r"(?:decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if found is None:
            plain = {
                "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
                "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
                "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
                "norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias",
            }  # fmt: skip
            renamed[prefix + plain[key]] = value
        elif found[2] == "attn.qkv":
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{owner}{stack}{found[1]}.attention.attention.{name}.{found[3]}"] = part.clone()
        else:
            layer = {
                "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
                "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
            }[found[2]]  # fmt: skip
            renamed[f"{owner}{stack}{found[1]}.{layer}.{found[3]}"] = value
    return renamed


@pytest.mark.parametrize("prefix", ["", "vit."])
@pytest.mark.parametrize("form", ["folder", "safetensors", "pytorch_model.bin"])
def test_case__W5_hugging_face_vit(tmp_path, caplog, prefix, form):
    mae = small_mae()
    state = hugging_face(encoder_state(mae), prefix)
    state |= {f"{prefix}pooler.dense.weight": torch.zeros(48, 48), "classifier.weight": torch.zeros(5, 48)}
    config = {"model_type": "vit", "num_attention_heads": 3, "image_size": 32, "hidden_act": "gelu",
              "layer_norm_eps": 1e-6}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    if form == "pytorch_model.bin":
        torch.save(state, tmp_path / form)
    else:
        save_file(state, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors" if form == "safetensors" else tmp_path
    assert_same_features(path, mae)
    assert "left out" in caplog.text
    assert "classifier.weight" in caplog.text
    assert "pooler.dense.weight" in caplog.text
    assert read_backbone(path)[1]["num_heads"] == "3"


@pytest.mark.parametrize("version", [4, 5])
def test_case__W5_hugging_face_vitmae_with_its_decoder(tmp_path, version):
    mae = small_mae(norm_pix_loss=True)
    save_file(hugging_face(mae.state_dict(), "vit.", version), tmp_path / "model.safetensors")
    config = {"model_type": "vit_mae", "num_attention_heads": 3, "decoder_num_attention_heads": 2, "image_size": 32,
              "norm_pix_loss": True, "layer_norm_eps": 1e-6}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_features(tmp_path, mae)
    loaded, _ = load_mae(tmp_path)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images, noise=noise)[0], mae(images, noise=noise)[0])
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(CheckpointError, match="hidden_act = 'relu'; only 'gelu' is supported"):
        load_mae(tmp_path)


def test_case__W5_hugging_face_without_the_key_projection(tmp_path):
    state = hugging_face(encoder_state(small_mae()), "vit.")
    del state["vit.encoder.layer.1.attention.attention.key.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no matching key or value projection"):
        read_weights(tmp_path)


def mmpretrain(state, decoder_norm):
    """Names of mmpretrain's MAE: the encoder in `backbone`, the decoder in `neck`."""
    renamed = {}
    for key, value in state.items():
        is_decoder = key.startswith(("decoder_", "mask_token"))
        for ours, theirs in (
            ("patch_embed.proj.", "patch_embed.projection."), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"),
            (".norm1.", ".ln1."), (".norm2.", ".ln2."), ("decoder_norm.", f"{decoder_norm}."),
        ):  # fmt: skip
            key = key.replace(ours, theirs)
        if not is_decoder:
            key = re.sub(r"^norm\.", "ln1.", re.sub(r"^blocks\.", "layers.", key))
        renamed[f"{'neck' if is_decoder else 'backbone'}.{key}"] = value
    return renamed


@pytest.mark.parametrize("decoder_norm", ["ln1", "decoder_norm"])
def test_case__W6_mmpretrain_mae_with_its_decoder(tmp_path, decoder_norm):
    mae = small_mae()
    state = mmpretrain(mae.state_dict(), decoder_norm) | {"data_preprocessor.mean": torch.zeros(3)}
    path = saved({"state_dict": state, "meta": {"epoch": 3}}, tmp_path / "epoch_3.pth")
    assert_same_features(path, mae)
    loaded, _ = load_mae(path, 32, num_heads=3, decoder_num_heads=2, norm_pix_loss=False)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images, noise=noise)[0], mae(images, noise=noise)[0])


def test_case__W6_mmseg_vision_transformer(tmp_path):
    """Its attention is torch's own, with other names."""
    mmseg = pytest.importorskip("mmseg.models.backbones")
    theirs = mmseg.VisionTransformer(
        img_size=32, patch_size=8, embed_dims=48, num_layers=2, num_heads=3, norm_cfg={"type": "LN", "eps": 1e-6},
        out_indices=1, final_norm=True, patch_bias=True,
    )  # fmt: skip
    theirs.eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    path = saved({"state_dict": {f"backbone.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "w.pth")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ours = load_encoder(path, 32, num_heads=3).eval().forward_features(images)[:, 1:]
        torch.testing.assert_close(ours, theirs(images)[0].flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["timm", "mae", "mmseg"])
def test_case__W6_exports_are_read_back_bit_equal(tmp_path, layout):
    mae = small_mae()
    expected = mae.state_dict() if layout == "mae" else encoder_state(mae)
    write_backbone(mae.state_dict(), tmp_path / "one.pth", layout, HEADS)
    state, _ = read_backbone(tmp_path / "one.pth")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    export(tmp_path / "one.pth", tmp_path / "two.safetensors")  # and from any of them to another layout
    assert_same_features(tmp_path / "two.safetensors", mae)


def test_case__W6_layer_scales_are_multiplied_in_and_position_biases_refused(tmp_path, caplog):
    caplog.set_level("INFO")
    mmseg = pytest.importorskip("mmseg.models.backbones")
    theirs = mmseg.MAE(
        img_size=(32, 32), patch_size=8, embed_dims=48, num_layers=2, num_heads=3, norm_cfg={"type": "LN", "eps": 1e-6},
        init_values=0.3,
    )  # fmt: skip
    theirs.eval()
    for name, parameter in theirs.named_parameters():
        if "relative" not in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    path = saved({"state_dict": theirs.state_dict()}, tmp_path / "w.pth")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ours = load_encoder(path, 32, num_heads=3, global_pool="avg").eval().forward_features(images)[:, 1:]
        torch.testing.assert_close(ours, theirs(images)[0].flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert "multiplied 4 layer scales" in caplog.text
    theirs.layers[1].attn.relative_position_bias_table.data += 0.1
    saved({"state_dict": theirs.state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected: blocks\.1\.attn\.relative_position_bias_table"):
        load_encoder(path, 32, num_heads=3, global_pool="avg")


# ---- channels and targets ----


@pytest.mark.parametrize(("rule", "channels"), [("average", 4), ("average", 1), ("inflate", 4), ("inflate", 6)])
def test_case__W10_channels_are_changed_by_a_named_rule(tmp_path, caplog, rule, channels):
    mae = small_mae()
    path = saved(encoder_state(mae), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"has in_chans = 3, not {channels}: .*adapt_channels to 'average'"):
        load_encoder(path, 32, num_heads=3, in_chans=channels)
    vit = load_encoder(path, 32, num_heads=3, in_chans=channels, adapt_channels=rule)
    assert f"from 3 to {channels} channels ({rule})" in caplog.text
    old, new = mae.patch_embed.proj.weight, vit.patch_embed.proj.weight
    if rule == "average":  # equal channels give the same tokens as before
        torch.testing.assert_close(new.sum(1), old.sum(1))
        assert torch.equal(new[:, 0], new[:, -1])
    else:
        torch.testing.assert_close(new[:, :3], old * 3 / channels)
        torch.testing.assert_close(new[:, 3], new[:, 0])
    target = small_mae(1, in_chans=channels)
    load_initial_weights(target, path, rule)
    assert torch.equal(target.patch_embed.proj.weight, new)
    assert torch.equal(target.blocks[1].mlp.fc2.weight, mae.blocks[1].mlp.fc2.weight)


def test_case__W10_rules_that_do_not_apply(tmp_path):
    path = saved(encoder_state(small_mae()), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="'inflate' cannot reduce them to 1: use 'average'"):
        load_encoder(path, 32, num_heads=3, in_chans=1, adapt_channels="inflate")
    with pytest.raises(UserError, match="adapt_channels = 'repeat' must be one of none, average, inflate"):
        load_encoder(path, 32, num_heads=3, in_chans=1, adapt_channels="repeat")
    with pytest.raises(CheckpointError, match="in_chans = 3, not 1"):
        load_initial_weights(small_mae(in_chans=1), path)


def test_load_initial_weights__restarts_the_head_of_another_target(tmp_path, caplog):
    """Pixels and normalised pixels have heads of equal width, so shapes alone do not tell them apart."""
    source = small_mae(norm_pix_loss=True)
    write_backbone(source.state_dict(), tmp_path / "w.safetensors", "mae", {**HEADS, "target": "normalised pixels"})
    model = small_mae(1)
    before = model.decoder_pred.weight.clone()
    load_initial_weights(model, tmp_path / "w.safetensors")
    assert "predicts normalised pixels, the model predicts pixels: decoder_pred starts from its initial" in caplog.text
    assert torch.equal(model.decoder_pred.weight, before)
    assert torch.equal(model.decoder_embed.weight, source.decoder_embed.weight)
    same = small_mae(1, norm_pix_loss=True)
    load_initial_weights(same, tmp_path / "w.safetensors")
    assert torch.equal(same.decoder_pred.weight, source.decoder_pred.weight)
    load_initial_weights(same, saved(source.state_dict(), tmp_path / "w.pth"))
    assert "does not record its target: decoder_pred is loaded" in caplog.text


# ---- training arguments ----


class Arguments:
    def __init__(self):
        self.lr, self.names = np.float64(0.1), ["a"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        np.float64(0.5), np.float32(1e-3), np.int64(3), np.bool_(True), np.arange(3.0), PosixPath("/data/x"),
        argparse.Namespace(norm_pix_loss=True, out=PosixPath("/x"), best=np.float64(1)), Arguments(), np.dtype("float32"),
        {"betas": (0.9, np.float64(0.95)), "root": Path("x")}, complex(1, 2), slice(3), {1, 2}, np.random.RandomState(0),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_case__W12_training_arguments_do_not_hide_the_weights(tmp_path, arguments, legacy):
    content = {"model": encoder_state(small_mae()), "args": arguments, "epoch": 3}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert_same_features(tmp_path / "w.pth", small_mae())


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [(os.system, "touch ran"), (exec, "open('ran', 'w')"), (subprocess.call, ["touch", "ran"]), (os.mkdir, "ran"),
     (eval, "open('ran', 'w')")],
    ids=lambda call: call[0].__name__,
)  # fmt: skip
def test_case__W12_code_is_refused_in_our_words_and_not_run(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    saved({"model": encoder_state(small_mae()), "args": Runs(*call)}, tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"which could run code; nothing was run\): save its weights alone"
    ) as caught:
        read_weights("w.pth")
    assert "weights_only" not in str(caught.value)
    assert not Path("ran").exists()


def test_case__W12_a_placeholder_runs_nothing(tmp_path, monkeypatch):
    """A function of a module that is not known to run code is not called either."""
    monkeypatch.chdir(tmp_path)
    saved({"model": encoder_state(small_mae()), "args": Runs(save_file, {}, "ran")}, tmp_path / "w.pth")
    assert_same_features("w.pth", small_mae())
    assert not Path("ran").exists()


# ---- exports ----


def vit_file(tmp_path, change=lambda state: None, **options):
    state = small_vit(**options).state_dict()
    change(state)
    return saved(state, tmp_path / "source.pth")


def strictly_loaded(lines):
    scope = {}
    exec(lines, scope)
    return scope["model"].eval()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_case__E1_export_of_a_classifier_leaves_out_the_head(tmp_path, caplog, pool):
    classifier = small_vit(num_classes=5, global_pool=pool)
    path = saved(classifier.state_dict(), tmp_path / "source.pth")
    out = tmp_path / "out.safetensors"
    metadata = export(path, out) | {"num_heads": "3"}
    assert "left out the classification head: head.weight, head.bias" in caplog.text
    images = torch.randn(2, 3, 32, 32)
    model = strictly_loaded(loading_lines(metadata, out))
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), classifier.forward_head(classifier.forward_features(images), pre_logits=True)
        )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.update({"dist_token": torch.zeros(1, 1, 48)}), r"dist_token"),
        (lambda s: s.update({"blocks.0.attn.rel_pos_h": torch.zeros(27, 16)}), r"blocks\.0\.attn\.rel_pos_h"),
        (lambda s: s.update({"blocks.1.attn.q_norm.weight": torch.zeros(16)}), r"blocks\.1\.attn\.q_norm\.weight"),
        (lambda s: [s.pop("cls_token"), s.pop("norm.weight"), s.pop("norm.bias")], "lacks cls_token, norm.weight"),
        (lambda s: s.pop("blocks.0.mlp.fc1.bias"), r"lacks blocks\.0\.mlp\.fc1\.bias"),
        (lambda s: s.pop("pos_embed"), "lacks pos_embed"),
    ],
)
def test_case__E1_what_timm_would_refuse_is_not_written(tmp_path, change, named):
    with pytest.raises(CheckpointError, match=f"cannot be exported.*{named}"):
        export(vit_file(tmp_path, change), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_case__E1_layer_scale(tmp_path):
    torch.manual_seed(0)
    theirs = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, init_values=0.3
    ).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    out = tmp_path / "out.safetensors"
    metadata = export(saved(theirs.state_dict(), tmp_path / "dino.pth"), out) | {"num_heads": "3"}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            strictly_loaded(loading_lines(metadata, out))(images), theirs(images), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_case__E2_own_linear_probe_is_read(tmp_path, caplog, pool):
    probe = LinearProbe(small_vit(), 5, pool)
    write_safetensors(probe.state_dict(), tmp_path / "classifier.safetensors", {"num_heads": "3"})
    assert_same_features(tmp_path / "classifier.safetensors", small_mae())
    assert "left out 5 tensors outside 'encoder.': norm.running_mean" in caplog.text or "head.weight" in caplog.text
    export(tmp_path / "classifier.safetensors", tmp_path / "out.safetensors")
    assert_same_features(tmp_path / "out.safetensors", small_mae())


@pytest.mark.parametrize(
    ("size", "image_size", "changes"),
    [
        ("tiny", 224, {}),
        ("tiny", 96, {"patch_size": 8}),
        ("small", 112, {"in_chans": 1}),
        ("tiny", 64, {"depth": 2}),
        ("tiny", 32, {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.7}),
        ("tiny", 56, {"patch_size": 14}),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_case__E3_the_lines_load_the_backbone(tmp_path, size, image_size, changes, suffix):
    torch.manual_seed(0)
    vit = random_vit(image_size, size, **changes).eval()
    path = tmp_path / f"it's a backbone.{suffix}"
    metadata = write_backbone(vit.state_dict(), path, "timm", {"num_heads": str(vit.blocks[0].attn.num_heads)})
    images = torch.randn(1, changes.get("in_chans", 3), image_size, image_size)
    lines = loading_lines(read_backbone(path)[1], path)
    assert lines == loading_lines(metadata, path)
    with torch.no_grad():
        torch.testing.assert_close(strictly_loaded(lines)(images), vit(images))


def test_case__E3_uses_timms_name_where_there_is_one():
    metadata = {
        "embed_dim": "768",
        "depth": "12",
        "num_heads": "12",
        "patch_size": "16",
        "in_chans": "3",
        "image_size": "224",
    }
    assert 'timm.create_model("vit_base_patch16_224", num_classes=0)' in loading_lines(metadata)
    assert "VisionTransformer(" in loading_lines(metadata | {"depth": "11"})
    with pytest.raises(CheckpointError, match="does not record num_heads"):
        loading_lines({key: value for key, value in metadata.items() if key != "num_heads"})


def run_folder(tmp_path, finished):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for step in (5, 10):
        state = {"model": small_mae(step).state_dict(), "metadata": {**HEADS, "target": "pixels"}, "num_steps": 10,
                 "progress": {"step": step}}  # fmt: skip
        save_checkpoint(state, folder / "checkpoints", step, keep=2)
    if finished:
        write_backbone(small_mae(10).state_dict(), folder / "backbone.safetensors", "timm", HEADS)
    return folder


@pytest.mark.parametrize("finished", [False, True])
def test_case__C12_a_run_folder_is_as_good_as_its_file(tmp_path, finished):
    folder = run_folder(tmp_path, finished)
    assert find_weights(folder).name == ("backbone.safetensors" if finished else "step_00000010.pt")
    assert find_weights(folder, with_decoder=True).name == "step_00000010.pt"
    assert find_weights(folder / "checkpoints").name == "step_00000010.pt"
    assert_same_features(folder, small_mae(10))
    assert torch.equal(load_mae(folder)[0].mask_token, small_mae(10).mask_token)
    assert export(folder, tmp_path / "mae.pth", "mae")["source"] == "step_00000010.pt"
    with pytest.raises(CheckpointError, match="holds no weights"):
        find_weights(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_weights(tmp_path / "absent")


@pytest.mark.parametrize("tool", ["export", "doctor"])
def test_case__C12_tools_take_a_run_folder(tmp_path, tool):
    folder = run_folder(tmp_path, finished=False)
    words = [str(folder), str(tmp_path / "out.safetensors")] if tool == "export" else [str(folder)]
    done = subprocess.run(
        [sys.executable, f"tools/{tool}.py", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if tool == "export":
        code = done.stdout.split("\n", 1)[1]
        assert strictly_loaded(code).embed_dim == 48


# ---- other libraries load our exports ----


@pytest.mark.parametrize("options", [{}, {"init_values": 1.0}, {"init_values": 0.5}])
def test_case__X1_mmseg_loads_its_layout(tmp_path, options):
    mmseg = pytest.importorskip("mmseg.models.backbones")
    mae, path = small_mae(), tmp_path / "out.pth"
    export(saved(mae.state_dict(), tmp_path / "source.pth"), path, "mmseg")
    theirs = mmseg.MAE(
        img_size=(32, 32), patch_size=8, embed_dims=48, num_layers=2, num_heads=3, norm_cfg={"type": "LN", "eps": 1e-6},
        out_indices=(0, 1), init_cfg={"type": "Pretrained", "checkpoint": str(path)}, **options,
    )  # fmt: skip
    theirs.init_weights()
    theirs.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = mae.features(images, [0, 1]), theirs(images)
    for ours, features in zip(expected, found, strict=True):
        difference = (ours[:, 1:] - features.flatten(2).transpose(1, 2)).abs().max() / ours.std()
        assert difference < 1e-6


def dense_vit():
    """A backbone under the names of ViTDet, loaded by mmengine: mmdetection's package does not contain ViTDet."""
    base = pytest.importorskip("mmengine.model").BaseModule

    class Backbone(base):
        def __init__(self, init_cfg=None):
            super().__init__(init_cfg)
            vit = small_vit()
            self.patch_embed, self.blocks, self.pos_embed = vit.patch_embed, vit.blocks, vit.pos_embed
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

        def forward(self, images):
            tokens = self.patch_embed(images) + self.pos_embed[:, 1:]
            for block in self.blocks:
                tokens = block(tokens)
            return tokens

    return Backbone


@pytest.mark.parametrize("loader", ["mmengine", "vitdet"])
def test_case__X1_mmdet_loads_its_layout(tmp_path, loader):
    checkpoint = pytest.importorskip("mmengine.runner.checkpoint")
    mae, path = small_mae(), tmp_path / "out.pth"
    export(saved(mae.state_dict(), tmp_path / "source.pth"), path, "mmdet")
    model = dense_vit()({"type": "Pretrained", "checkpoint": str(path)})
    if loader == "mmengine":
        model.init_weights()
    else:  # the loader of the ViTDet project: the entry `model`, not strict
        model.load_state_dict(
            checkpoint.CheckpointLoader.load_checkpoint(str(path), map_location="cpu")["model"], False
        )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = mae.patch_embed(images) + mae.pos_embed[:, 1:]
        for block in mae.blocks:
            expected = block(expected)
        assert (model(images) - expected).abs().max() / expected.std() < 1e-6


@pytest.mark.parametrize("layout", ["mmdet", "mmseg"])
def test_case__X1_what_their_loader_cannot_read_is_refused(tmp_path, layout):
    path = saved(small_mae().state_dict(), tmp_path / "source.pth")
    with pytest.raises(UserError, match=rf"a file in layout '{layout}' must end in \.pth or \.pt"):
        export(path, tmp_path / "out.safetensors", layout)
    with pytest.raises(UserError, match="unknown layout 'mmpose'; known: timm, mae, mmdet, mmseg"):
        to_layout(small_mae().state_dict(), "mmpose")


# ---- damage and hostile files ----


@pytest.mark.parametrize("layout", ["timm", "mae"])
@pytest.mark.parametrize("place", [0.01, 0.3, 0.6, 0.99])
def test_case__F2_a_flipped_bit_is_found(tmp_path, layout, place):
    path = tmp_path / "backbone.safetensors"
    write_backbone(small_mae().state_dict(), path, layout, HEADS)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int(place * (len(content) - start)) // 4 * 4] ^= 1  # a low bit, which stays finite
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"tensors_sha256 is recorded as [0-9a-f]{64}, but the tensors give"
    ) as caught:
        read_backbone(path)
    assert str(path) in str(caught.value)


def test_case__F2_tensors_under_the_header_of_another_file(tmp_path):
    for seed in (0, 1):
        write_backbone(small_mae(seed).state_dict(), tmp_path / f"{seed}.safetensors", "timm", HEADS)
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        header = file.metadata()
    forged = tmp_path / "forged.safetensors"
    other = load_file(tmp_path / "1.safetensors")
    save_file(other, forged, header)
    with pytest.raises(CheckpointError, match=r"forged\.safetensors: the tensors do not match the metadata"):
        load_encoder(forged, 32)
    for digest in ("tensors_sha256", "encoder_sha256"):
        save_file(other, forged, {key: value for key, value in header.items() if key != digest})
        with pytest.raises(CheckpointError, match="the tensors do not match the metadata"):
            load_encoder(forged, 32)
    content = torch.load(saved({"model": other, "metadata": header}, tmp_path / "forged.pth"), weights_only=True)
    assert content["metadata"] == header
    with pytest.raises(CheckpointError, match="the tensors do not match the metadata"):
        load_encoder(tmp_path / "forged.pth", 32)


def test_case__F2_classifier_too(tmp_path):
    path = tmp_path / "classifier.safetensors"
    write_safetensors(small_vit(num_classes=5).state_dict(), path, {"num_heads": "3"})
    state = load_file(path)
    state["head.bias"][0] += 1
    with safe_open(path, "pt") as file:
        assert file.metadata()["tensors_sha256"] != state_digest(state)
        save_file(state, tmp_path / "edited.safetensors", file.metadata())
    with pytest.raises(CheckpointError, match="the tensors do not match"):
        read_weights(tmp_path / "edited.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_case__F2b_nan_and_inf_are_named(tmp_path, value, dtype):
    state = {key: tensor.to(dtype) for key, tensor in encoder_state(small_mae()).items()}
    state["blocks.1.attn.proj.weight"][3, 4] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        CheckpointError, match=r"NaN or infinite values in 1 of \d+ tensors: blocks\.1\.attn\.proj\.weight"
    ):
        load_encoder(tmp_path / "w.safetensors", 32, num_heads=3)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.proj\.weight"):
        read_weights(saved({"model": state}, tmp_path / "w.pth"))


HOSTILE = [
    ("image_size", "abc"), ("image_size", "1e9"), ("image_size", "1000000000"), ("image_size", "-32"), ("image_size", "32.5"),
    ("image_size", "NaN"), ("num_heads", "0"), ("num_heads", "three"), ("num_heads", "true"), ("num_heads", "[3]"),
    ("decoder_num_heads", ""), ("mean", "{}"), ("mean", "[]"), ("mean", '["a", "b", "c"]'), ("mean", "[NaN, 0, 0]"),
    ("mean", "[" * 100000), ("std", "[0, 1, 1]"), ("std", "[-1, 1, 1]"), ("std", "null"), ("eval_crop_ratio", "nan"),
    ("eval_crop_ratio", "NaN"), ("eval_crop_ratio", "0"), ("eval_crop_ratio", "7"), ("mask_ratio", "1"), ("mask_ratio", "x"),
    ("bandwidths", "[0]"), ("bandwidths", "5"), ("curriculum", "[]"), ("curriculum", "{"), ("class_names", "[1]"),
    ("target", "depth"), ("hog_cell_size", "1e3"), ("step", "-1"), ("num_steps", "many"), ("patch_size", "Infinity"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=[f"{key}={value[:9]}" for key, value in HOSTILE])
def test_case__F12_hostile_metadata_is_named(tmp_path, key, value):
    path = tmp_path / "w.safetensors"
    save_file(encoder_state(small_mae()), path, {**HEADS, key: value})
    with pytest.raises(CheckpointError, match=rf"the metadata has {key} = ") as caught:
        load_encoder(path, 32)
    assert str(path) in str(caught.value)
    assert repr(value[:60])[1:-1] in str(caught.value)
    assert len(str(caught.value)) < 600
    saved({"model": encoder_state(small_mae()), "metadata": {**HEADS, key: value}}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"the metadata has {key} = "):
        read_backbone(tmp_path / "w.pth")


# ---- writing ----


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("name", ["b.safetensors", "b.pth", "step_00000001.pt"])
def test_case__F11_files_get_the_mode_of_the_umask(tmp_path, umask, name):
    before = os.umask(umask)
    try:
        if name.startswith("step"):
            save_checkpoint({"w": torch.zeros(2)}, tmp_path, 1, keep=1)
        else:
            write_backbone(small_mae().state_dict(), tmp_path / name, "timm", HEADS)
        with atomic_path(tmp_path / "replaced") as temporary:  # a writer that renames its own file over ours
            save_file({"a": torch.zeros(2)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "replaced").stat().st_mode & 0o777 == 0o666 & ~umask
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


WRITE_ERRORS = [
    (errno.ENOSPC, r"the disk is full \(\d+ MiB are free\).*free space, then"),
    (errno.EDQUOT, "the disk quota is used up.*raise the quota"),
    (errno.EROFS, "is on a read-only file system.*choose a folder that can be written"),
    (errno.EACCES, "no permission to write in .*change its permissions"),
    (errno.EIO, "Input/output error.*check the disk"),
]


@pytest.mark.parametrize(("code", "message"), WRITE_ERRORS, ids=[errno.errorcode[code] for code, _ in WRITE_ERRORS])
@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_case__F8_write_errors_name_the_file_the_cause_and_a_fix(tmp_path, monkeypatch, code, message, step):
    path = tmp_path / "backbone.safetensors"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code), str(path.with_name(f".{path.name}.writing")))

    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr("builtins.open", fail)
        else:
            patch.setattr(atomic.os, step, fail)
        with pytest.raises(CheckpointError, match=f"cannot write {re.escape(str(path))}: .*{message}") as caught:
            write_backbone(small_mae().state_dict(), path, "timm", HEADS)
    assert "--resume" not in str(caught.value)  # tools that write backbones have no such option
    assert "then run the command again" in str(caught.value)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"), torch.cuda.OutOfMemoryError("CUDA out of memory"), ValueError("x"),
        OSError(errno.ECONNRESET, "Connection reset"), FileNotFoundError(errno.ENOENT, "No such file", "/data/other.jpg"),
        PermissionError(errno.EACCES, "Permission denied", "/data/other.jpg"), OSError("cannot identify image file"),
        KeyError("bug"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_case__F8_other_errors_pass_through_unchanged(tmp_path, error):
    def fail():
        with atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("new")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_case__F8_missing_folder_and_folder_of_the_same_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent is not a folder.*create it"), atomic_path(tmp_path / "absent/x"):
        pass
    (tmp_path / "x/y").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="a folder has this name"), atomic_path(tmp_path / "x"):
        pass


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_case__F8_full_disk_while_metrics_are_written(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.close()
    with open("/dev/full", "a", buffering=1) as full:
        metrics._file = full
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: the disk is full.*--resume"):
            metrics.write({"step": 1})
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl"):
            metrics.close()
