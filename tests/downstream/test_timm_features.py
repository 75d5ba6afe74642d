"""Backbones of timm, a tiny one of each family: features, strict loading, freezing, and a step of both kinds of heads."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, register_model
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv

from downstream import TimmFeatures
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.runs.provenance import describe_weights
from mae_et.storage.digest import encoder_digest
from mae_et.tasks.supervised_weights import write_files
from tests.conftest import REPOSITORY
from tests.downstream.conftest import needs_mm
from tests.downstream.small import batch, build, read, shrink

__all__: list[str] = []  # register_model adds to it


@register_model
def caformer_of_tests(pretrained: bool = False, **options: Any) -> MetaFormer:
    """Builds a tiny CAFormer: timm's own take neither depths nor widths."""
    return build_model_with_cfg(
        MetaFormer, "caformer_s18", pretrained, feature_cfg={"out_indices": (0, 1, 2, 3)}, depths=[1] * 4,
        dims=[16, 24, 32, 64], token_mixers=[SepConv, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2, **options,
    )  # fmt: skip


STAGES = (0, 1, 2, 3)
FAMILIES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "resnet": ("resnet18", (1, 2, 3, 4), {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
    "convnext": ("convnext_atto", STAGES, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        STAGES,
        {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)},
    ),
    "deit": ("deit_tiny_patch16_224", STAGES, {"embed_dim": 16, "depth": 4, "num_heads": 2}),
    "pvt": ("pvt_tiny", STAGES, {"depths": (1, 1, 1, 1)}),
    "cswin": ("cswin_tiny_224", STAGES, {"embed_dim": 8, "depths": (1, 3, 1, 1), "num_heads": (2, 2, 2, 1)}),
    "caformer": ("caformer_of_tests", STAGES, {}),
}
METADATA = {"objective": "supervised", "image_size": "224", "in_chans": "3"}


@dataclass
class Family:
    """A backbone file of a tiny model, and what reads it."""

    name: str
    file: Path
    arguments: dict[str, Any]
    whole: Any  # timm's own model

    def features(self, **changes: Any) -> TimmFeatures:
        return TimmFeatures(**{**self.arguments, **changes})

    def options(self, **changes: Any) -> dict[str, Any]:
        """Returns the backbone of a config."""
        start = {"type": "Pretrained", "checkpoint": str(self.file)}
        return {"type": "TimmFeatures", **self.arguments, "init_cfg": start, **changes}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    name, indices, options = FAMILIES[request.param]
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=0, **options).eval()
    for module in whole.modules():  # not the identity that norms and layer scales are at the start
        for parameter in module.parameters(recurse=False):
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    file = tmp_path_factory.mktemp(request.param) / "backbone.safetensors"
    metadata = {**METADATA, "architecture": name, "model_options": json.dumps(options)}
    save_file({key: value.contiguous() for key, value in whole.state_dict().items()}, file, metadata)
    return Family(request.param, file, {"model_name": name, "out_indices": indices, "model_options": options}, whole)


@torch.no_grad()
def test_features__equal_timms_own(family):
    """At a size without padding; with padding the windows of Swin are those of the published detectors."""
    model = family.features(init_cfg={"type": "Pretrained", "checkpoint": str(family.file)}).eval()
    model.init_weights()
    images = torch.randn(1, 3, 224, 224)
    indices = list(model.out_indices)
    expected = family.whole.forward_intermediates(images, indices=indices, intermediates_only=True)
    for ours, theirs in zip(model(images), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert ours.std() > 1e-3
    maps = model(torch.randn(2, 3, 45, 70))
    assert [m.shape[1] for m in maps] == model.channels
    for features, stride in zip(maps, model.strides, strict=True):
        for side, px in zip(features.shape[-2:], (45, 70), strict=True):
            assert px // stride <= side <= -(-px // 32) * 32 // stride


@torch.no_grad()
def test_out_norm__normalizes_each_map_as_published(family):
    plain, normed = family.features().eval(), family.features(out_norm=True).eval()
    for model in (plain, normed):
        model.load_backbone(family.file)
    eps = 1e-5 if family.name in ("swin", "cswin") else 1e-6
    assert {norm.eps for norm in normed.norms} == {eps}
    images = torch.randn(1, 3, 64, 64)
    for ours, features in zip(normed(images), plain(images), strict=True):
        expected = torch.nn.functional.layer_norm(features.permute(0, 2, 3, 1), features.shape[1:2], eps=eps)
        assert torch.allclose(ours, expected.permute(0, 3, 1, 2), atol=1e-5)


def test_load_backbone__one_error_for_all_keys(family, tmp_path):
    state = family.whole.state_dict()
    missing, misshaped = [key for key in state if ".mlp." in key or "conv1" in key][:2]
    broken = {key: value for key, value in state.items() if key != missing}
    broken |= {misshaped: torch.zeros(5), "stages.9.weight": torch.zeros(3)}
    save_file(broken, tmp_path / "broken.safetensors", {})
    model = family.features()
    before = {key: value.clone() for key, value in model.net.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        model.load_backbone(tmp_path / "broken.safetensors")
    for part in (
        f"missing: {missing} ",
        "unexpected: stages.9.weight",
        f"another shape: {misshaped} (5,)",
        "model_options",
    ):
        assert part in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in model.net.state_dict().items())


def test_freeze_at__what_the_first_stages_need(family):
    model = family.features(freeze_at=2)
    (features,) = family.whole.forward_intermediates(torch.randn(1, 3, 224, 224), indices=[1], intermediates_only=True)
    family.whole.zero_grad()
    features.sum().backward()
    needed = {name for name, parameter in family.whole.named_parameters() if parameter.grad is not None}
    assert {name for name, parameter in model.net.named_parameters() if not parameter.requires_grad} == needed
    layers = model.layer_ids()
    assert set(layers) == {name for name, _ in model.net.named_parameters()}
    assert set(layers.values()) == set(range(max(layers.values()) + 1))
    assert max(layers[name] for name in needed) < min(layers[name] for name in set(layers) - needed)


@functools.cache
def small(name: str) -> Any:
    """Reads a config and makes its heads small, once for all families."""
    config = read(REPOSITORY / "configs" / name)
    shrink(config.model)
    return config


def mask_rcnn(family: Family) -> Any:
    config = copy.deepcopy(small("detection/mask_rcnn_resnet50_coco_1x.py"))
    model = config.model
    model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
    if family.name == "deit":  # one map at stride 16, as in ViTDet
        model.backbone = family.options(out_indices=(3,))
        model.neck = {"type": "SimpleFeaturePyramid", "in_channels": 16, "out_channels": 8, "num_outs": 5}
    else:
        model.backbone = family.options()
        model.neck.in_channels = family.features().channels
    return config


def upernet(family: Family) -> Any:
    config = copy.deepcopy(small("segmentation/upernet_swin_tiny_ade20k_160k.py"))
    model, channels = config.model, family.features().channels
    model.backbone = family.options(out_norm=True)
    model.data_preprocessor.size = (64, 64)
    model.decode_head.in_channels, model.auxiliary_head.in_channels = channels, channels[2]
    return config


@pytest.mark.mm
@needs_mm
@pytest.mark.parametrize("make", [mask_rcnn, upernet])
def test_step__all_losses_are_finite_and_all_weights_move(family, make):
    from mmengine.optim import build_optim_wrapper

    torch.manual_seed(0)
    config = make(family)
    model = build(config).train()
    model.init_weights()
    options = {"optimizer": {"type": "AdamW", "lr": 1e-3}, "paramwise_cfg": {"layer_decay": 0.9}}
    wrapper = build_optim_wrapper(model, {**options, "constructor": "LayerDecayConstructor"})
    before = {name: parameter.detach().clone() for name, parameter in model.backbone.named_parameters()}
    assert torch.equal(before["net." + (first := next(iter(dict(model.backbone.net.named_parameters()))))],
                       family.whole.get_parameter(first))  # fmt: skip
    logs = model.train_step(batch(config), wrapper)
    assert all(np.isfinite(float(value)) for name, value in logs.items() if "loss" in name), logs
    still = [name for name, parameter in model.backbone.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


def test_arguments__faults_are_named():
    with pytest.raises(UserError, match=r"unknown model 'resnet1800'.*resnet18"):
        TimmFeatures("resnet1800")
    with pytest.raises(UserError, match=r"out_indices = \[7\] must be among the 5 stages of resnet18, 0 to 4"):
        TimmFeatures("resnet18", out_indices=(7,))
    with pytest.raises(UserError, match="freeze_at = 4, but resnet18 has 3 stages"):
        TimmFeatures("resnet18", out_indices=(1, 2), freeze_at=4)


def test_train__frozen_and_kept_statistics():
    model = TimmFeatures("resnet18", out_indices=(1, 2, 3, 4), freeze_at=2).train()
    training = {
        name
        for name, module in model.net.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d) and module.training
    }
    assert training
    assert all(name.startswith(("layer2", "layer3", "layer4")) for name in training)
    model.norm_eval = True
    assert not any(m.training for m in model.train().modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_load_backbone__later_stages_and_a_classifier_are_left_out(tmp_path):
    options = FAMILIES["cswin"][2]
    state = timm.create_model("cswin_tiny_224", num_classes=7, **options).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    account = TimmFeatures("cswin_tiny_224", (0, 1), model_options=options).load_backbone(tmp_path / "w.safetensors")
    left_out = {key.split(".")[0] for key in account.left_out}
    assert left_out == {"merge2", "stage3", "merge3", "stage4", "norm", "head"}
    assert len(account.arrived) + len(account.left_out) == len(state)


def test_init_cfg__timms_own_weights(tmp_path):
    """timm reads the file in place of a download."""
    source = timm.create_model("convnext_atto", dims=(8, 16, 24, 32))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth")}, "dims": (8, 16, 24, 32)}
    model = TimmFeatures("convnext_atto", model_options=overlay, init_cfg={"type": "Pretrained", "checkpoint": "timm"})
    model.init_weights()
    assert torch.equal(model.net.stages[0].blocks[0].mlp.fc1.weight, source.stages[0].blocks[0].mlp.fc1.weight)


SWIN = {
    "objective": "supervised", "architecture": "swin_tiny_patch4_window7_224", "image_size": "160", "in_chans": "3",
    "model_options": '{"patch_size": 2, "depths": [1, 1, 1, 1]}', "mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]",
}  # fmt: skip


def test_check_backbone__all_differences_and_their_fix():
    from mmengine.config import Config

    from downstream.checks.backbone import check_backbone
    from downstream.checks.overrides import parse_value

    images = {"mean": [123.675, 116.28, 103.53], "std": [63.75] * 3, "bgr_to_rgb": True}
    backbone = {
        "type": "TimmFeatures", "model_name": "swin_tiny_patch4_window7_224", "out_norm": True,
        "model_options": {"depths": (1, 1, 1, 1), "window_size": 14, "drop_path_rate": 0.2, "strict_img_size": False},
    }  # fmt: skip
    config = Config({"model": {"backbone": backbone, "data_preprocessor": images}})
    with pytest.raises(ConfigError) as error:
        check_backbone(config, {"file": "b.safetensors", "metadata": SWIN})
    for part in (
        "backbone.image_size = 224, but the file was trained with 160", "backbone.model_options.patch_size is not set",
        "backbone.model_options.window_size = 14, but the file was trained without it: remove it", "data_preprocessor.mean = ",
    ):  # fmt: skip
        assert part in str(error.value)
    assert len(error.value.faults) == 5  # four differences and the fix
    del config.model.backbone.model_options["window_size"]
    fix = error.value.faults[-1].partition("--cfg-options ")[2].replace("'", "").split()
    config.merge_from_dict({key: parse_value(value, None) for key, value in (word.split("=") for word in fix)})
    check_backbone(config, {"file": "b.safetensors", "metadata": SWIN})
    with pytest.raises(ConfigError, match=r"model_name = .* trained with 'pvt_tiny'"):
        check_backbone(config, {"file": "b.safetensors", "metadata": {**SWIN, "architecture": "pvt_tiny"}})


def test_load_backbone__another_model_is_named(family):
    model = family.features()
    model.model_options = {**family.arguments["model_options"], "patch_size": 2}
    with pytest.raises(CheckpointError, match=r"model_options\.patch_size = 2, but the file was trained without it"):
        model.load_backbone(family.file)


def test_encoder_digest__covers_every_network(family):
    """A result names the training that its weights come from by this digest."""
    state = family.whole.state_dict()
    digest = encoder_digest(state)
    last = [key for key in state if ".mlp." in key or "layer4" in key][-1]
    assert digest
    assert encoder_digest({**state, last: state[last] + 1}) != digest
    assert encoder_digest({**state, "head.fc.weight": torch.zeros(3)}) == digest


def test_describe_weights__the_file_of_a_supervised_run(family, tmp_path):
    """The record of a detector has the digest and the metadata of the training."""
    classifier = timm.create_model(family.arguments["model_name"], num_classes=5, **family.arguments["model_options"])
    metadata = {**METADATA, "architecture": family.arguments["model_name"], "class_names": '["a", "b", "c", "d", "e"]'}
    digest = write_files(classifier, metadata, tmp_path)
    found = describe_weights(tmp_path)
    assert found.encoder_sha256 == digest
    assert found.metadata["objective"] == "supervised"
    assert describe_weights(tmp_path / "classifier.safetensors").encoder_sha256 == digest
    assert family.features().load_backbone(tmp_path).arrived
