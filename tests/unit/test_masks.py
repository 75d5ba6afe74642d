"""Masks in blocks and grids, registers and the moving average of a pre-training."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae_et.config.schema import ClassifyConfig, ModelConfig, PretrainConfig, from_dict
from mae_et.curriculum.cost import mae_parameters
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.masks import BLOCK_AREA, BLOCK_ASPECT, NUM_BLOCKS, Masks, mask_order, num_uniform
from mae_et.models.position_table import with_register_rows
from mae_et.models.sizes import num_visible_patches
from mae_et.storage.backbone import load_encoder, load_mae, read_backbone, write_backbone
from mae_et.storage.huggingface import export_hugging_face
from mae_et.storage.metadata import loading_lines
from mae_et.storage.onnx_file import export_onnx
from mae_et.storage.plain import plain_vit
from mae_et.tasks import pretrain
from mae_et.tasks.classifier import check_backbone
from mae_et.tasks.run import run_training
from tests.conftest import Stop, killed_before, losses, small_values
from tests.plans import plan_for

OPTIONS: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
    "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip
VIT = {key: OPTIONS[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}


def visible(kind: str, grid: tuple[int, int], ratio: float = 0.75, n: int = 64, square: int = 1) -> Tensor:
    """Returns which patches stay visible, [n, gh, gw] bool."""
    masks = Masks(kind, square)
    uniform = torch.rand(n, num_uniform(masks, grid), generator=torch.Generator().manual_seed(0))
    order = mask_order(masks, uniform, grid, ratio)
    num = num_visible_patches(grid[0] * grid[1], ratio)
    return (
        torch.zeros(n, grid[0] * grid[1], dtype=torch.bool).scatter_(1, order.argsort(1)[:, :num], True).view(n, *grid)
    )


def test_mask_order__random_is_unchanged() -> None:
    uniform = torch.rand(3, num_uniform(Masks(), (6, 6)))
    assert torch.equal(mask_order(Masks(), uniform, (6, 6), 0.75), uniform)
    assert uniform.shape == (3, 36)


@pytest.mark.parametrize("grid", [(6, 6), (10, 10), (14, 14), (4, 6)])
def test_mask_order__grid_keeps_one_of_four(grid: tuple[int, int]) -> None:
    masks = visible("grid", grid)
    assert (masks.flatten(1).sum(1) == grid[0] * grid[1] // 4).all()
    # One of each 2 x 2 patches, always at the same place of the four in an image, at all four places over the images.
    cells = masks.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 2, 4).flatten(3)
    assert (cells.sum(-1) == 1).all()
    places = cells.int().argmax(-1).flatten(1)
    assert (places == places[:, :1]).all()
    assert set(places[:, 0].tolist()) == {0, 1, 2, 3}


def test_mask_order__grid_of_an_odd_number_of_patches_has_the_planned_number() -> None:
    masks = visible("grid", (7, 7))
    assert (masks.flatten(1).sum(1) == 12).all()
    ninths = visible("grid", (6, 6), 8 / 9)
    assert (ninths.flatten(1).sum(1) == num_visible_patches(36, 8 / 9)).all()


@pytest.mark.parametrize(("grid", "square"), [((16, 16), 4), ((6, 6), 2), ((4, 8), 2)])
def test_mask_order__squares_are_removed_as_a_whole(grid: tuple[int, int], square: int) -> None:
    masks = visible("random", grid, square=square)
    assert (masks.flatten(1).sum(1) == grid[0] * grid[1] // 4).all()
    squares = masks.unflatten(1, (-1, square)).unflatten(3, (-1, square)).permute(0, 1, 3, 2, 4).flatten(3).sum(-1)
    whole = (squares == 0) | (squares == square**2)
    # Where a quarter of the patches is no whole number of squares, one square is divided.
    assert ((~whole).flatten(1).sum(1) == int(grid[0] * grid[1] // 4 % square**2 > 0)).all()
    shares = (squares > 0).float().mean(0)
    assert 0.05 < shares.min() < shares.max() < 0.55, "no square is always or never visible"
    assert len(masks.unique(dim=0)) > 10


def test_mask_order__squares_that_do_not_tile_the_grid_keep_the_planned_number() -> None:
    masks = visible("random", (10, 8), square=4)  # shifted along the first axis only
    assert (masks.flatten(1).sum(1) == 20).all()
    for mask in masks:
        partly = []
        for shift in range(4):
            edges = [0, *range(4 - shift, 10, 4), 10] if shift else [0, 4, 8, 10]
            squares = [mask[a:b, c : c + 4] for a, b in itertools.pairwise(edges) for c in (0, 4)]
            partly.append(sum(0 < int(square.sum()) < square.numel() for square in squares))
        assert min(partly) <= 1, "no shift explains the mask by whole squares"


@pytest.mark.parametrize(("grid", "square"), [((16, 16), 4), ((6, 6), 4), ((6, 6), 5), ((10, 10), 4), ((6, 6), 8)])
def test_mask_order__squares_prefer_no_patch(grid: tuple[int, int], square: int) -> None:
    shares = visible("random", grid, n=8000, square=square).float().mean(0)
    assert 0.18 < shares.min() < shares.max() < 0.32


def test_config__squares_belong_to_random_masks() -> None:
    with pytest.raises(ConfigError, match=r"mask_grid = 2 has no effect with mask_kind = 'block'"):
        from_dict(PretrainConfig, small_values(model__mask_kind="block", model__mask_grid=2))


def naive_block_removed(uniform: Tensor, rows: int, columns: int, num_removed: int) -> set[int]:
    """Removes rectangle after rectangle, patch by patch in reading order, until enough are removed."""
    draws = uniform[rows * columns :].view(4, NUM_BLOCKS).double()
    removed: list[int] = []
    for m in range(NUM_BLOCKS):
        area = (BLOCK_AREA[0] + (BLOCK_AREA[1] - BLOCK_AREA[0]) * draws[0, m].item()) * rows * columns
        aspect = math.exp(math.log(BLOCK_ASPECT[0]) + math.log(BLOCK_ASPECT[1] / BLOCK_ASPECT[0]) * draws[1, m].item())
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        top, left = round(draws[2, m].item() * rows - height / 2), round(draws[3, m].item() * columns - width / 2)
        for i in range(rows):
            for j in range(columns):
                inside = top <= i < top + height and left <= j < left + width
                if inside and i * columns + j not in removed and len(removed) < num_removed:
                    removed.append(i * columns + j)
    return set(removed)


def test_mask_order__block_equals_a_naive_reference() -> None:
    rows, columns = 6, 10
    uniform = torch.rand(20, num_uniform(Masks("block"), (rows, columns)), generator=torch.Generator().manual_seed(1))
    order = mask_order(Masks("block"), uniform, (rows, columns), 0.75)
    for one, numbers in zip(uniform, order, strict=True):
        # Rectangles are placed from the smallest number on, and the largest numbers are removed.
        removed = set(numbers.argsort(descending=True)[:45].tolist())
        naive = naive_block_removed(one, rows, columns, 45)
        assert len(removed & naive) >= 44  # float32 may round the side of a rectangle the other way


def test_mask_order__block_removes_neighbours_everywhere_alike() -> None:
    def edges(masks: Tensor) -> float:
        across = (masks[:, 1:] != masks[:, :-1]).float().mean() + (masks[:, :, 1:] != masks[:, :, :-1]).float().mean()
        return float(across)

    masks = visible("block", (14, 14), n=512)
    assert (masks.flatten(1).sum(1) == 49).all()
    assert edges(masks) < 0.6 * edges(visible("random", (14, 14), n=512))
    assert 0.4 < 1 - masks.float().mean(0).max() < 0.75  # no corner is always visible


def test_config__a_grid_needs_its_ratio() -> None:
    with pytest.raises(ConfigError, match=r"mask_ratio = 0.5 must be one of 0.75, 0.8889, 0.9375"):
        from_dict(PretrainConfig, small_values(model__mask_kind="grid"))
    from_dict(PretrainConfig, small_values(model__mask_kind="grid", model__mask_ratio=0.75))


def registered(num_registers: int = 3) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(**OPTIONS, num_registers=num_registers).eval()


def test_registers__all_other_weights_are_those_of_a_model_without() -> None:
    plain, more = registered(0).state_dict(), registered().state_dict()
    assert more.pop("reg_token").shape == (1, 3, 32)
    assert plain.keys() == more.keys()
    assert all(torch.equal(plain[key], more[key]) for key in plain)


@torch.no_grad()
def test_registers__change_the_features_but_not_the_shapes() -> None:
    images = torch.randn(2, 3, 32, 32)
    model, noise = registered(), torch.rand(2, 16)
    tokens = model.features(images)
    assert isinstance(tokens, Tensor)
    assert tokens.shape == (2, 17, 32)
    before = model(images, 0.75, noise)[0]
    assert model.reg_token is not None
    model.reg_token.mul_(30)
    assert not torch.allclose(model.features(images), tokens)  # type: ignore[arg-type]
    assert model(images, 0.75, noise)[0] != before
    # Masking nothing, the encoder of the training is that of `features`.
    patches, grid = model._patchify(images)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(model._encode(patches, grid, everything), model.features(images))


@torch.no_grad()
def test_registers__export_gives_timms_reg_tokens_at_any_size(tmp_path: Path) -> None:
    model, path = registered(), tmp_path / "b.safetensors"
    written = write_backbone(model.state_dict(), path, "timm", {})
    namespace: dict[str, Any] = {}
    assert "reg_tokens=3" in loading_lines({"num_heads": "2", **written}, path)
    exec(loading_lines({"num_heads": "2", **written}, path), namespace)
    images = torch.randn(2, 3, 32, 32)
    theirs = namespace["model"].eval().forward_features(images)
    assert namespace["model"].num_prefix_tokens == 4
    ours = model.features(images)
    torch.testing.assert_close(torch.cat([theirs[:, :1], theirs[:, 4:]], 1), ours, rtol=1e-5, atol=1e-5)
    # At another size the fixed table is computed again, and the registers stay without position.
    images = torch.randn(2, 3, 48, 48)
    larger = load_encoder(path, 48, num_heads=2).eval().forward_features(images)
    torch.testing.assert_close(larger[:, 4:], model.features(images)[:, 1:], rtol=1e-5, atol=1e-5)  # type: ignore[call-overload]
    # Back into an MAE, with its decoder.
    write_backbone(
        model.state_dict(),
        tmp_path / "mae.safetensors",
        "mae",
        {"target": "pixels", "num_heads": "2", "decoder_num_heads": "2"},
    )
    again, _ = load_mae(tmp_path / "mae.safetensors", norm_pix_loss=False)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    torch.save(model.state_dict(), tmp_path / "b.pth")
    written = export_hugging_face(tmp_path / "b.pth", tmp_path / "folder", num_heads=2)
    assert written["hugging_face_class"] == "Dinov2WithRegistersModel"
    again_state, _ = read_backbone(tmp_path / "folder")
    assert torch.equal(again_state["reg_token"], model.state_dict()["reg_token"])
    with pytest.raises(UserError, match="registers, which are exported at one size"):
        export_onnx(tmp_path / "b.pth", tmp_path / "b.onnx", dynamic="size", num_heads=2)
    for layout in ("mmdet", "mmseg"):
        with pytest.raises(CheckpointError, match="3 registers"):
            write_backbone(model.state_dict(), tmp_path / "b.pth", layout, {})


@torch.no_grad()
def test_registers__learnt_positions_of_registers_are_read_exactly(tmp_path: Path) -> None:
    torch.manual_seed(1)
    timms = VisionTransformer(**VIT, reg_tokens=3, num_classes=0).eval()
    timms.pos_embed.normal_()  # type: ignore[union-attr, operator]
    write_backbone(plain_vit(timms.state_dict(), "timm"), tmp_path / "b.safetensors", "timm", {"num_heads": "2"})
    state, metadata = read_backbone(tmp_path / "b.safetensors")
    assert state["pos_embed"].shape == (1, 17, 32)
    assert metadata["image_size"] == "32"
    images = torch.randn(2, 3, 32, 32)
    ours = load_encoder(tmp_path / "b.safetensors", 32).eval()
    torch.testing.assert_close(ours.forward_features(images), timms.forward_features(images), rtol=1e-4, atol=1e-5)
    assert with_register_rows(state["pos_embed"], 3).shape == timms.pos_embed.shape  # type: ignore[union-attr]


def test_registers__a_classifier_names_the_option_that_fits_the_file(tmp_path: Path) -> None:
    write_backbone(registered().state_dict(), tmp_path / "b.safetensors", "timm", {"num_heads": "2"})
    state, metadata = read_backbone(tmp_path / "b.safetensors")
    model = {"size": "tiny", **{key: VIT[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}}
    data = {"train": "x", "val": "x", "image_size": 32}
    fitting = from_dict(ClassifyConfig, {"data": data, "model": {**model, "num_registers": 3}})
    check_backbone(state, metadata, fitting, "b")
    with pytest.raises(CheckpointError, match=r"--cfg-options model.num_registers=3"):
        check_backbone(state, metadata, from_dict(ClassifyConfig, {"data": data, "model": model}), "b")


def test_plan__names_the_cost_of_each_option() -> None:
    dims = {key: value for key, value in OPTIONS.items() if key != "img_size"}
    config = ModelConfig(size="tiny", num_registers=3, **dims)
    model = registered()
    assert mae_parameters(config) == sum(p.numel() for p in model.parameters())

    values = small_values(
        model__num_registers=2, model__ema_decay=0.99, model__mask_kind="grid", model__mask_ratio=0.75
    )
    notes = "\n".join(plan_for(from_dict(PretrainConfig, values), 20).notes)
    assert "num_registers = 2: 96 parameters; FLOPs +" in notes
    assert "ema_decay = 0.99: the average keeps" in notes
    assert "at 24 px the number of patches along a side is not a multiple of 2" in notes
    values = small_values(model__num_cls_tokens=3, model__mask_grid=2)
    notes = "\n".join(plan_for(from_dict(PretrainConfig, values), 20).notes)
    assert "num_cls_tokens = 3: 96 parameters; FLOPs +" in notes
    assert "mask_grid = 2: as many visible patches" in notes
    assert "so the squares are shifted at random there, and those at the borders are smaller" in notes
    assert "model." not in "\n".join(plan_for(from_dict(PretrainConfig, small_values()), 20).notes)


def test_pretrain__squares_further_tokens_and_average_resume_to_the_bit_and_are_exported(tmp_path: Path) -> None:
    values = small_values(
        model__mask_grid=2, model__num_registers=2, model__num_cls_tokens=2, model__ema_decay=0.9, model__depth=1,
        run__loggers=[], run__save_interval=6, curriculum__equivalent_epochs=3.0,
    )  # fmt: skip
    config = from_dict(PretrainConfig, values)
    run_training(pretrain.MAETask, config, tmp_path / "whole", device="cpu")
    with pytest.raises(Stop):
        run_training(killed_before(pretrain.MAETask, 8), config, tmp_path / "killed", device="cpu")
    run_training(pretrain.MAETask, config, tmp_path / "killed", resume=True, device="cpu")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")

    files = [load_file(tmp_path / name / "backbone.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    state = torch.load(sorted((tmp_path / "whole/checkpoints").iterdir())[-1], weights_only=True)
    tokens = {name: torch.cat([state[name]["cls_token"], state[name]["reg_token"]], dim=1) for name in ("ema", "model")}
    assert torch.equal(torch.cat([files[0]["cls_token"], files[0]["reg_token"]], dim=1), tokens["ema"])
    assert not torch.equal(tokens["ema"], tokens["model"])
    _, metadata = read_backbone(tmp_path / "whole/backbone.safetensors")
    wanted = {"mask_grid": "2", "num_cls_tokens": "2", "num_registers": "2", "ema_decay": "0.9"}
    assert {key: metadata[key] for key in wanted} == wanted
