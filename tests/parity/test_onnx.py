"""ONNX files in onnxruntime against the models in torch, on random weights."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from mae_et.errors import UserError
from mae_et.models.linear_probe import PROBES, make_probe
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.timm_backbone import create_backbone
from mae_et.models.vit import random_vit, vit_from_state
from mae_et.storage.backbone import write_backbone, write_safetensors
from mae_et.storage.onnx_file import export_onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: requirements-dev.txt")
pytest.importorskip("onnxscript", reason="needs onnxscript: requirements-dev.txt")

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
HEADS = {"num_heads": "4", "image_size": "32"}


def randomized(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "pos_embed" not in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@torch.no_grad()
def assert_same(path, model, *shapes):
    session = onnxruntime.InferenceSession(str(path))
    for shape in shapes:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        (computed,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(computed, model(images).numpy(), rtol=1e-5, atol=1e-5)
    return session


def test_encoder_of_any_size(tmp_path):
    mae = randomized(MaskedAutoencoder(32, 8, 3, 32, 1, 4, 16, 1, 2))
    write_backbone(mae.state_dict(), tmp_path / "b.safetensors", "timm", {**HEADS, "mean": "[0.5, 0.5, 0.5]"})
    file = export_onnx(tmp_path / "b.safetensors", tmp_path / "e.onnx", dynamic="size")
    session = assert_same(tmp_path / "e.onnx", mae.features, (1, 3, 32, 32), (4, 3, 8, 56), (1, 3, 64, 40))
    assert [*file.outputs] == [session.get_outputs()[0].name] == ["tokens"]
    assert session.get_modelmeta().custom_metadata_map["mean"] == "[0.5, 0.5, 0.5]"


def test_fine_tuned_classifier_of_any_size(tmp_path):
    model = randomized(random_vit(32, **VIT, num_classes=3, global_pool="avg"))
    write_safetensors(model.state_dict(), tmp_path / "c.safetensors", HEADS | {"class_names": '["a", "b", "c"]'})
    file = export_onnx(tmp_path / "c.safetensors", tmp_path / "c.onnx", dynamic="size")
    assert [*file.outputs] == ["logits"]
    assert_same(tmp_path / "c.onnx", model, (1, 3, 32, 32), (3, 3, 32, 32))


@pytest.mark.parametrize("protocol", PROBES)
def test_probe(tmp_path, protocol):
    probe = randomized(make_probe(protocol, random_vit(32, **VIT), 3, "avg"))
    probe.norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    probe.norm.running_var.uniform_(0.5, 2)
    metadata = HEADS | {"class_names": '["a", "b", "c"]', "protocol": protocol, "pool": "avg"}
    write_safetensors(probe.state_dict(), tmp_path / "p.safetensors", metadata)
    export_onnx(tmp_path / "p.safetensors", tmp_path / "p.onnx")
    assert_same(tmp_path / "p.onnx", probe, (1, 3, 32, 32), (3, 3, 32, 32))
    with pytest.raises(UserError, match="is exported at one size"):
        export_onnx(tmp_path / "p.safetensors", tmp_path / "p.onnx", dynamic="size")


def supervised(path, name, size=32, **options):
    torch.manual_seed(0)
    model = create_backbone(name, size, num_classes=3, in_chans=3, **options).eval()
    metadata = {"objective": "supervised", "architecture": name, "model_options": json.dumps(options), "in_chans": "3",
                "image_size": str(size), "class_names": '["a", "b", "c"]'}  # fmt: skip
    write_safetensors(model.state_dict(), path, metadata)
    return model


def test_supervised_convolutional_net_of_any_size(tmp_path):
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    model = supervised(tmp_path / "r.safetensors", "resnet18", **options)
    export_onnx(tmp_path / "r.safetensors", tmp_path / "r.onnx", dynamic="size")
    assert_same(tmp_path / "r.onnx", model, (1, 3, 32, 32), (3, 3, 96, 64))


def test_a_supervised_transformer_of_one_size_is_refused_at_any_size(tmp_path):
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    supervised(tmp_path / "v.safetensors", "vit_tiny_patch16_224", 48, **options)
    with pytest.raises(UserError, match="takes images of one size: use --dynamic batch and --image-size"):
        export_onnx(tmp_path / "v.safetensors", tmp_path / "v.onnx", dynamic="size")


def test_learnt_positions_are_not_resampled_in_the_graph(tmp_path):
    model = random_vit(32, **VIT)
    torch.nn.init.normal_(model.pos_embed)
    write_backbone(model.state_dict(), tmp_path / "b.safetensors", "timm", HEADS)
    with pytest.raises(UserError, match="has learnt positions"):
        export_onnx(tmp_path / "b.safetensors", tmp_path / "e.onnx", dynamic="size")
    export_onnx(tmp_path / "b.safetensors", tmp_path / "e.onnx", image_size=16, dynamic="none")
    model = vit_from_state(model.state_dict(), 16, metadata=HEADS).eval()
    assert_same(tmp_path / "e.onnx", model.forward_features, (1, 3, 16, 16))
    with pytest.raises(Exception, match="Got invalid dimensions"):
        assert_same(tmp_path / "e.onnx", model.forward_features, (2, 3, 16, 16))


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'mae_et\[onnx\]'"):
        export_onnx(tmp_path / "b.safetensors", tmp_path / "e.onnx")


def test_an_operator_without_onnx_is_named(tmp_path, monkeypatch):
    model = random_vit(32, **VIT)
    write_backbone(model.state_dict(), tmp_path / "b.safetensors", "timm", HEADS)
    monkeypatch.setattr("mae_et.storage.onnx_file._Tokens.forward", lambda self, images: torch.linalg.eig(images)[0])
    with pytest.raises(UserError, match=r"cannot be exported to ONNX \(.*linalg_eig"):
        export_onnx(tmp_path / "b.safetensors", tmp_path / "e.onnx")
    assert not (tmp_path / "e.onnx").exists()
