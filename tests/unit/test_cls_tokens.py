"""Several cls tokens: the model, timm's form, files, and what cannot hold them. Loss and gradients: tests/parity/test_mae.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.models.cls_tokens import ManyClsTokens, cls_feature, joined_cls_tokens, split_cls_tokens
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.vit import random_vit
from mae_et.storage.backbone import load_encoder, load_initial_weights, load_mae, read_backbone, write_backbone
from mae_et.storage.metadata import loading_lines
from mae_et.storage.onnx_file import export_onnx
from mae_et.tasks.classifier import build_classifier, build_optimizer, check_backbone
from tests.conftest import small_values

OPTIONS: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
    "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip
HEADS = {"num_heads": "2", "decoder_num_heads": "2", "target": "pixels"}


def mae(num_cls_tokens: int = 3, num_registers: int = 2) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = MaskedAutoencoder(**OPTIONS, num_cls_tokens=num_cls_tokens, num_registers=num_registers).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("num_registers", [0, 2])
def test_export__timm_computes_the_same_mean_at_any_size(tmp_path: Path, num_registers: int) -> None:
    model, path = mae(3, num_registers), tmp_path / "b.safetensors"
    written = write_backbone(model.state_dict(), path, "timm", HEADS)
    assert written["num_cls_tokens"] == "3"
    lines = loading_lines(written, path)
    assert lines.endswith("# feature of an image: model.forward_features(images)[:, :3].mean(dim=1)")
    namespace: dict[str, Any] = {}
    exec(lines, namespace)
    theirs = namespace["model"].eval().forward_features(images())
    wanted = model.features(images())
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(theirs[:, :3].mean(dim=1), wanted[:, 0])
    torch.testing.assert_close(theirs[:, 3 + num_registers :], wanted[:, 1:])
    for size in (32, 48):
        encoder = load_encoder(path, size).eval()
        assert isinstance(encoder, ManyClsTokens)
        wanted = model.features(images(size))
        assert isinstance(wanted, Tensor)
        torch.testing.assert_close(encoder(images(size)), wanted[:, 0])
        torch.testing.assert_close(cls_feature(encoder, encoder.forward_features(images(size))), wanted[:, 0])


def test_read__gives_back_the_tokens_of_every_layout(tmp_path: Path) -> None:
    model = mae()
    for layout in ("timm", "mae"):
        write_backbone(model.state_dict(), tmp_path / f"{layout}.safetensors", layout, HEADS)
        state, metadata = read_backbone(tmp_path / f"{layout}.safetensors")
        assert torch.equal(state["cls_token"], model.cls_token)
        assert torch.equal(state["reg_token"], model.reg_token)  # type: ignore[arg-type]
        assert metadata["num_cls_tokens"] == "3"
    again, _ = load_mae(tmp_path / "mae.safetensors")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    for layout in ("mmdet", "mmseg"):
        with pytest.raises(CheckpointError, match=r"has \d \w+.*, for which layout"):
            write_backbone(mae(3, 0).state_dict(), tmp_path / "b.pth", layout, {})


def test_split__is_reversed_and_counts() -> None:
    state = {"cls_token": torch.randn(1, 3, 4), "reg_token": torch.randn(1, 2, 4)}
    split = split_cls_tokens(state)
    assert (split["cls_token"].shape, split["reg_token"].shape) == ((1, 1, 4), (1, 4, 4))
    joined = joined_cls_tokens(split, 3, "b")
    assert all(torch.equal(joined[key], state[key]) for key in state)
    assert split_cls_tokens({"cls_token": state["cls_token"][:, :1]}).keys() == {"cls_token"}
    with pytest.raises(CheckpointError, match="b records num_cls_tokens = 7, but has 1 cls tokens and 4 registers"):
        joined_cls_tokens(split, 7, "b")


def test_read__a_file_with_too_few_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    write_backbone(mae(3, 0).state_dict(), path, "timm", HEADS)
    tensors = load_file(path)
    save_file(
        {**tensors, "reg_token": tensors["reg_token"][:, :1].contiguous()}, path, {**HEADS, "num_cls_tokens": "3"}
    )
    with pytest.raises(CheckpointError, match=r"records num_cls_tokens = 3, but has 1 cls tokens and 1 registers"):
        read_backbone(path)


def test_faults__name_the_option(tmp_path: Path) -> None:
    write_backbone(mae(3, 0).state_dict(), tmp_path / "b.safetensors", "timm", HEADS)
    with pytest.raises(
        CheckpointError, match=r"model.num_cls_tokens = 3 \(cls_token\), not 1. .* model.num_cls_tokens=3"
    ):
        load_initial_weights(mae(1, 0), tmp_path / "b.safetensors")
    state, metadata = read_backbone(tmp_path / "b.safetensors")
    data = {"train": "x", "val": "x", "image_size": 32}
    model = {"size": "tiny", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    with pytest.raises(CheckpointError, match=r"--cfg-options model.num_cls_tokens=3"):
        check_backbone(state, metadata, from_dict(ClassifyConfig, {"data": data, "model": model}), "b")
    with pytest.raises(UserError, match="several cls tokens, which are exported at one size"):
        export_onnx(tmp_path / "b.safetensors", tmp_path / "b.onnx", dynamic="size")
    with pytest.raises(
        ConfigError, match=r"num_cls_tokens = 2 cannot be used with rotary_positions = True: set it to 1"
    ):
        from_dict(
            PretrainConfig, small_values(model__num_cls_tokens=2, model__rotary_positions=True, model__embed_dim=48)
        )
    with pytest.raises(ValueError, match="must be 1 with rotary_positions"):
        random_vit(32, "tiny", patch_size=8, num_cls_tokens=2, rotary_positions=True)


def test_tokens__all_other_weights_are_those_of_a_model_with_one() -> None:
    models = []
    for number in (1, 3):
        torch.manual_seed(0)
        models.append(
            random_vit(32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_cls_tokens=number).state_dict()
        )
    plain, more = models
    assert more.pop("reg_token").shape == (1, 2, 32)
    assert all(torch.equal(plain[key], more[key]) for key in plain if key != "pos_embed")


def test_optimizer__no_cls_token_decays(tmp_path: Path) -> None:
    data = {"train": "x", "val": "x", "image_size": 32}
    model = {"size": "tiny", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_cls_tokens": 3}
    config = from_dict(ClassifyConfig, {"data": data, "model": model, "protocol": "finetune"})
    network = build_classifier(config, 5)
    decay = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(config, network).param_groups
        for parameter in group["params"]
    }
    assert decay[id(network.cls_token)] == decay[id(network.reg_token)] == 0
    assert decay[id(network.head.weight)] > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["mae", "timm"])
@pytest.mark.parametrize(("size", "num_cls_tokens"), [((16, 32), 1), ((16, 32), 2), ((32, 32), 8)])
def test_write__a_learnt_table_of_any_grid_arrives(
    tmp_path: Path, name: str, size: tuple[int, int], num_cls_tokens: int
) -> None:
    """2 x 4 patches and a row for the cls token are as many rows as 3 x 3 patches without one."""
    torch.manual_seed(0)
    options = OPTIONS | {"img_size": size, "num_cls_tokens": num_cls_tokens, "learnt_positions": True}
    model = MaskedAutoencoder(**options).eval()
    model.pos_embed.normal_()
    if num_cls_tokens > 1:
        model.pos_embed[:, :1] = 0
    image_size = {"image_size": f"[{size[0]}, {size[1]}]"}
    write_backbone(model.state_dict(), tmp_path / "b.safetensors", name, {**HEADS, **image_size})
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        wanted = model.features(pixels)
        assert isinstance(wanted, Tensor)
        encoder = load_encoder(tmp_path / "b.safetensors", size).eval()
        torch.testing.assert_close(encoder(pixels), wanted[:, 0])
        if name == "mae":
            again, _ = load_mae(tmp_path / "b.safetensors")
            torch.testing.assert_close(again.features(pixels), wanted)
