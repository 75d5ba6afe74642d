"""The backbones for detection and segmentation: against timm's ViT, at other sizes, and their loading."""

import pytest
import torch
from mmengine.registry import MODELS

from downstream import SimpleFeaturePyramid, TimmFeatures, ViTDet, ViTSeg
from downstream.backbones.plain_vit import ChannelLayerNorm
from mae_et.errors import CheckpointError, UserError
from mae_et.models.vit import random_vit
from mae_et.storage.backbone import write_backbone, write_safetensors

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
METADATA = {"num_heads": "2", "image_size": "48"}


def small_vit(image_size=48, **changes):
    """A ViT whose every tensor matters: nothing is zero or one."""
    torch.manual_seed(3)
    model = random_vit(image_size, **{**SMALL, **changes})
    for name, value in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(value, mean=1.0 if "norm" in name and value.ndim == 1 else 0.0, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A backbone file, and the model that it came from."""
    model, path = small_vit(), tmp_path_factory.mktemp("vit") / "backbone.safetensors"
    write_backbone(model.state_dict(), path, "timm", METADATA)
    return path, model


def features_of(model, images, with_cls=True):
    """timm's own path through the blocks, before the final norm."""
    x = model.patch_embed(images)
    x = x + model.pos_embed[:, 1:]
    if with_cls:
        x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    taps = []
    for block in model.blocks:
        x = block(x)
        taps.append(x[:, 1:] if with_cls else x)
    return [tap.transpose(1, 2).unflatten(2, model.patch_embed.grid_size) for tap in taps]


def init(cls, path, **options):
    model = cls(**{**SMALL, "img_size": 48, "init_cfg": {"type": "Pretrained", "checkpoint": str(path)}, **options})
    model.init_weights()
    return model.eval()


@torch.no_grad()
def test_vit_seg__equals_timm(source):
    path, model = source
    ours = init(ViTSeg, path, rescales=None, out_indices=(0, 1, 3))
    images = torch.randn(2, 3, 48, 48)
    expected = features_of(model, images)
    for ours_map, index in zip(ours(images), (0, 1, 3), strict=True):
        assert torch.allclose(ours_map, expected[index], atol=1e-4)
    assert torch.allclose(
        expected[-1].std(), model.forward_intermediates(images, indices=[3], intermediates_only=True)[0].std()
    )


@torch.no_grad()
@pytest.mark.parametrize("window_size", [0, 6, 14])
def test_vit_det__equals_timm_without_cls_token(source, window_size):
    """The windows are as large as the grid, or off; relative positions are there, and zero."""
    path, model = source
    ours = init(ViTDet, path, window_size=window_size, global_blocks=[3])
    images = torch.randn(2, 3, 48, 48)
    (features,) = ours(images)
    assert torch.allclose(features, features_of(model, images, with_cls=False)[-1], atol=1e-4)
    assert ours.blocks[0].attn.rel_pos_h.shape == (2 * (window_size or 6) - 1, 16)


@torch.no_grad()
def test_positions__interpolate_and_recompute(source):
    path, _ = source
    stretched, counted = init(ViTSeg, path, img_size=96), init(ViTSeg, path, img_size=96, positions="recompute")
    assert torch.equal(counted.pos_embed, random_vit(96, **SMALL).pos_embed)
    table = random_vit(48, **SMALL).pos_embed[:, 1:].view(1, 6, 6, 32).permute(0, 3, 1, 2)
    wide = torch.nn.functional.interpolate(table, size=(12, 12), mode="bicubic")
    assert torch.allclose(stretched.pos_embed[:, 1:], wide.flatten(2).transpose(1, 2), atol=1e-5)
    assert (stretched.pos_embed - counted.pos_embed).abs().max() > 0.3
    assert counted.pos_embed.requires_grad


@torch.no_grad()
def test_forward__any_size(source):
    """An image that the patch does not divide equals the same one with zeros added."""
    path, _ = source
    images = torch.randn(1, 3, 37, 60)
    padded = torch.nn.functional.pad(images, (0, 4, 0, 3))
    for cls in (ViTDet, ViTSeg):
        model = init(cls, path, **({"window_size": 3, "global_blocks": [1]} if cls is ViTDet else {}))
        maps, expected = model(images), model(padded)
        assert maps[0].shape[1:] == ((32, 5, 8) if cls is ViTDet else (32, 20, 32))
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
        assert model(torch.randn(1, 3, 5, 9))[0].isfinite().all()


def test_activation_checkpointing__same_gradients(source):
    path, _ = source
    images, gradients = torch.randn(1, 3, 48, 64), []
    for on in (False, True):
        model = init(ViTDet, path, window_size=3, global_blocks=[3], activation_checkpointing=on).train()
        model(images)[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(value is not None and value.abs().max() > 0 for value in gradients[0].values())
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-3) for name in gradients[0])


def test_init_weights__account(source):
    path, _ = source
    model = ViTDet(**SMALL, img_size=48)
    account = model.load_backbone(path)
    assert set(account.left_out) == {"cls_token", "norm.weight", "norm.bias"}
    assert set(account.new) == {f"blocks.{i}.attn.rel_pos_{axis}" for i in range(4) for axis in "hw"}
    assert len(account.arrived) == 3 + 4 * 12


def test_init_weights__own_checkpoint_brings_relative_positions(source, tmp_path):
    path, _ = source
    trained = init(ViTDet, path)
    torch.nn.init.normal_(trained.blocks[1].attn.rel_pos_h)
    state = {**trained.state_dict(), "pos_embed": torch.zeros(1, 37, 32)}
    write_safetensors(state, tmp_path / "det.safetensors", METADATA)
    again = init(ViTDet, tmp_path / "det.safetensors")
    assert torch.equal(again.blocks[1].attn.rel_pos_h, trained.blocks[1].attn.rel_pos_h)


@pytest.mark.parametrize("cls", [ViTDet, ViTSeg])
@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda s: s.pop("blocks.2.mlp.fc1.bias"), {}, r"1 missing: blocks\.2\.mlp\.fc1\.bias \(128,\)"),
        (lambda s: s.update({"blocks.9.new": torch.zeros(2)}), {}, r"1 unexpected: blocks\.9\.new \(2,\)"),
        (lambda s: s.update({"blocks.0.norm1.bias": torch.zeros(3)}), {}, r"norm1\.bias \(3,\), the model has \(32,\)"),
        (lambda s: None, {"embed_dim": 64}, "embed_dim = 32, not 64"),
        (lambda s: None, {"patch_size": 16}, "patch_size = 8, not 16.*resample_patches"),
        (lambda s: None, {"in_channels": 1}, "in_channels = 3, not 1"),
        (lambda s: None, {"depth": 5}, r"missing: blocks\.4\.norm1\.weight"),
        (lambda s: None, {"depth": 3}, r"12 unexpected: blocks\.3\."),
        (lambda s: None, {"num_heads": 4}, "2 attention heads, the model 4"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 30, 32)), {}, "pos_embed"),
    ],
)
def test_init_weights__what_does_not_fit_is_named(tmp_path, cls, spoil, options, message):
    state = small_vit().state_dict()
    spoil(state)
    write_safetensors(state, tmp_path / "b.safetensors", METADATA)
    if options == {"depth": 3} and cls is ViTSeg:
        options = {"depth": 3, "out_indices": [2], "rescales": None}
    with pytest.raises(CheckpointError, match=message):
        init(cls, tmp_path / "b.safetensors", **options)


def test_init_weights__reads_mmseg_and_names_a_missing_cls_token(tmp_path):
    write_backbone(small_vit().state_dict(), tmp_path / "seg.pth", "mmseg", METADATA)
    init(ViTDet, tmp_path / "seg.pth")
    write_backbone(small_vit().state_dict(), tmp_path / "det.pth", "mmdet", METADATA)
    init(ViTDet, tmp_path / "det.pth")
    with pytest.raises(CheckpointError, match="without the cls token"):
        init(ViTSeg, tmp_path / "det.pth")


def test_init_weights__resampled_patches(source):
    path, model = source
    ours = init(ViTDet, path, patch_size=16, img_size=96, resample_patches=True)
    assert ours.patch_embed.proj.weight.shape == (32, 3, 16, 16)
    smooth = torch.linspace(-1, 1, 96).expand(1, 3, 96, 96)
    wide, narrow = ours.patch_embed.proj(smooth), model.patch_embed.proj(smooth[..., ::2, ::2])
    assert torch.nn.functional.cosine_similarity(wide.flatten(), narrow.flatten(), dim=0) > 0.95


def test_init_weights__other_kinds_are_refused():
    with pytest.raises(UserError, match="must be dict"):
        ViTDet(**SMALL, init_cfg={"type": "Kaiming"}).init_weights()


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ViTDet, {"global_blocks": [4]}, "global_blocks"),
        (ViTDet, {"positions": "none"}, "positions"),
        (ViTDet, {"num_heads": 5}, "num_heads"),
        (ViTSeg, {"out_indices": [3, 1], "rescales": None}, "out_indices"),
        (ViTSeg, {"rescales": [4, 2]}, "rescales"),
        (ViTSeg, {"norm_cfg": {"type": "GN"}}, "norm_cfg"),
    ],
)
def test_init__faults_are_named(cls, options, message):
    with pytest.raises(UserError, match=message):
        cls(**{**SMALL, **options})


def test_registered():
    for cls in (ViTDet, ViTSeg, SimpleFeaturePyramid, TimmFeatures, ChannelLayerNorm):
        assert MODELS.get(cls.__name__) is cls
    assert ViTDet(img_size=64, depth=12, embed_dim=48).blocks[5].attn.window_size == 0
    assert [i for i, b in enumerate(ViTDet(img_size=64, depth=24, embed_dim=48).blocks) if not b.attn.window_size] == [
        5,
        11,
        17,
        23,
    ]


def test_channel_layer_norm__equals_the_formula():
    x, norm = torch.randn(2, 6, 3, 4), ChannelLayerNorm(6)
    torch.nn.init.normal_(norm.weight)
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    expected = (x - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert torch.allclose(norm(x), expected, atol=1e-5)


def test_simple_feature_pyramid__strides():
    maps = SimpleFeaturePyramid(32, 16, num_outs=5)([torch.randn(1, 32, 6, 10)])
    assert [tuple(m.shape) for m in maps] == [(1, 16, *s) for s in [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]]
    assert all(
        m.shape[1:] == (16, n, n)
        for m, n in zip(SimpleFeaturePyramid(32, 16)([torch.randn(1, 32, 1, 1)]), (4, 2, 1, 1, 1), strict=True)
    )


@torch.no_grad()
def test_load__a_fixed_table_that_a_square_would_fit_too(tmp_path):
    """2 x 4 patches and a row for the cls token are as many rows as 3 x 3 patches without one."""
    model = small_vit(image_size=(16, 32))
    torch.save({"model": model.state_dict()}, tmp_path / "b.pth")  # records no image size
    ours = ViTSeg(
        **{**SMALL, "img_size": (16, 32), "init_cfg": {"type": "Pretrained", "checkpoint": str(tmp_path / "b.pth")}},
        rescales=None, out_indices=(3,),
    )  # fmt: skip
    ours.init_weights()
    images = torch.randn(1, 3, 16, 32)
    torch.testing.assert_close(ours.eval()(images)[0], features_of(model, images)[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [ViTSeg, ViTDet])
@pytest.mark.parametrize(
    ("changes", "what"), [({"num_cls_tokens": 3}, "3 cls tokens"), ({"num_registers": 2}, "2 registers")]
)
def test_load__further_tokens_are_refused(tmp_path, cls, changes, what):
    model = random_vit(48, **SMALL, **changes)
    metadata = METADATA | {key: str(value) for key, value in changes.items()}
    write_safetensors(model.state_dict(), tmp_path / "b.safetensors", metadata)
    with pytest.raises(CheckpointError, match=f"has {what}, for which a backbone of detection or segmentation has no"):
        init(cls, tmp_path / "b.safetensors")
