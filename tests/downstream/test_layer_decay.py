"""Learning rates by layer, against the published rule and against classification's own groups."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from downstream import SimpleFeaturePyramid, TimmFeatures, ViTDet, ViTSeg
from downstream.layer_decay import LayerDecayConstructor
from mae_et.errors import ConfigError, UserError
from mae_et.models.param_groups import param_groups

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32}


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.neck = backbone, SimpleFeaturePyramid(32, 8)
        self.blocks = nn.Linear(2, 2)  # a name that only means a layer within the backbone


def config(**paramwise):
    optimizer = {"type": "AdamW", "lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.999)}
    return {"optimizer": optimizer, "constructor": "LayerDecayConstructor", "paramwise_cfg": paramwise}


def by_name(model, wrapper):
    groups = {id(p): group for group in wrapper.optimizer.param_groups for p in group["params"]}
    return {name: groups[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_call__published_rates():
    model = Detector(ViTDet(**SMALL))
    wrapper = build_optim_wrapper(model, config(layer_decay=0.5))
    groups = by_name(model, wrapper)
    expected = {
        "backbone.pos_embed": (0.01 / 16, 0),
        "backbone.patch_embed.proj.weight": (0.01 / 16, 0.1),
        "backbone.patch_embed.proj.bias": (0.01 / 16, 0),
        "backbone.blocks.0.attn.rel_pos_h": (0.01 / 8, 0.1),
        "backbone.blocks.2.mlp.fc1.weight": (0.01 / 2, 0.1),
        "backbone.blocks.2.norm1.weight": (0.01 / 2, 0),
        "neck.outputs.0.0.weight": (0.01, 0.1),
        "neck.outputs.0.1.weight": (0.01, 0),
        "blocks.weight": (0.01, 0.1),
    }
    for name, (lr, weight_decay) in expected.items():
        assert groups[name]["lr"] == pytest.approx(lr), name
        assert groups[name]["weight_decay"] == weight_decay, name
    assert sum(len(g["params"]) for g in wrapper.optimizer.param_groups) == len(list(model.parameters()))
    assert wrapper.optimizer.defaults["betas"] == (0.9, 0.999)


def test_groups__equal_classifications():
    """One place decides: the same encoder gets the same scales and decay in all three stages."""
    backbone = ViTSeg(**SMALL, rescales=None, out_indices=[2])
    model = nn.Module()
    model.backbone = backbone
    ours = LayerDecayConstructor({"optimizer": config()["optimizer"]}, {"layer_decay": 0.7}).groups(model)
    theirs = param_groups(backbone, 0.1, 0.7, 3, no_decay=("pos_embed", "cls_token"))
    names = {id(p): n for n, p in backbone.named_parameters()}
    as_dict = [
        {n: (g["lr_scale"], g["weight_decay"]) for g in groups for n in map(name, g["params"])}
        for groups, name in ((ours, lambda p: names[id(p)]), (theirs, lambda pair: pair[0]))
    ]
    assert as_dict[0] == as_dict[1]
    assert len(as_dict[0]) == len(names)


def test_groups__timms_layers():
    """The released layers of CSWin: two blocks are one, a merge belongs to the first one after it."""
    backbone = TimmFeatures(
        "cswin_tiny_224",
        out_norm=True,
        model_options={"embed_dim": 8, "depths": (1, 3, 1, 1), "num_heads": (2, 2, 2, 1)},
    )
    model = Detector(backbone)
    groups = by_name(model, build_optim_wrapper(model, config(layer_decay=0.5)))
    steps = {
        "stage1_conv_embed.0.weight": 6, "stage1.0.qkv.weight": 5, "merge1.conv.weight": 4, "stage2.1.proj.weight": 4,
        "stage2.2.proj.weight": 3, "merge2.conv.bias": 2, "stage3.0.norm1.weight": 2, "stage4.0.mlp.fc1.weight": 1,
    }  # fmt: skip
    for name, below in steps.items():
        assert groups[f"backbone.net.{name}"]["lr"] == pytest.approx(0.01 / 2**below), name
    for name in ("backbone.norms.0.weight", "neck.outputs.0.0.weight"):
        assert groups[name]["lr"] == pytest.approx(0.01), name


def test_groups__frozen_parameters_are_left_out():
    model = Detector(TimmFeatures("resnet18", out_indices=(1,), freeze_at=1))
    wrapper = build_optim_wrapper(model, config())
    assert set(by_name(model, wrapper)) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {g["lr"] for g in wrapper.optimizer.param_groups} == {0.01}


def test_faults__are_named():
    with pytest.raises(UserError, match=r"needs ViTDet, ViTSeg or TimmFeatures as model\.backbone, not Conv2d"):
        build_optim_wrapper(Detector(nn.Conv2d(3, 8, 3)), config(layer_decay=0.5))
    with pytest.raises(UserError, match=r"no layers .* for pit_ti_224"):
        build_optim_wrapper(Detector(TimmFeatures("pit_ti_224", out_indices=(0,))), config(layer_decay=0.5))
    with pytest.raises(ConfigError, match=r"layer_decay_rate(.|\n)*must be above 0"):
        build_optim_wrapper(Detector(ViTDet(**SMALL)), config(layer_decay_rate=0.5, layer_decay=2))


def test_schedule__keeps_the_ratios():
    from mmengine.optim import LinearLR

    model = Detector(ViTDet(**SMALL))
    wrapper = build_optim_wrapper(model, config(layer_decay=0.5))
    schedule = LinearLR(wrapper, start_factor=0.1, begin=0, end=10, by_epoch=False)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        wrapper.step()
        schedule.step()
    groups = by_name(model, wrapper)
    assert groups["backbone.pos_embed"]["lr"] / groups["blocks.weight"]["lr"] == pytest.approx(1 / 16)
    assert groups["blocks.weight"]["lr"] < 0.009
