"""Changes the input size of a model during a run, together with its optimizer's state and its moving average.

Depends on the size: the position embeddings of ViT and PVT v1; the relative-position tables, windows and masks of Swin; the
stripes of CSWin. Convolutional models and models that were built for any size stay as they are.

Shapes: gh x gw grid of a table, D channels or heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import get_model_input_config, get_model_traits
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mae_et.errors import UserError
from mae_et.models.pos_embed import is_sincos_table, sincos_pos_embed
from mae_et.models.sizes import Size, as_size, size_text

BIAS_TABLE = "relative_position_bias_table"
WINDOWED = (SwinTransformer, SwinTransformerV2)
# CSWin and PVT v1 of this package are recognized by their attribute `size_multiple`.
RESIZABLE = (VisionTransformer, VisionTransformerRelPos, Eva, Beit, *WINDOWED)


@dataclass(frozen=True)
class Grid:
    """The grid of a position table, and its rows that belong to no place.

    Args:
        size: (gh, gw).
        extra_first: the extra rows (tokens without a place) come before the grid, else after it.
    """

    size: tuple[int, int]
    extra_first: bool


def change_input_size(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, ema: ModelEmaV3 | None, size: int | Size
) -> bool:
    """Changes the input size of a model in place. Does nothing if the model takes images of any size.

    timm replaces the parameters whose shape changes. The optimizer and the average then follow by name: the optimizer's
    groups get the new parameters, and the tensors of its state that have the parameter's shape are resampled (bilinear, because
    bicubic weights can make a second moment negative). Position embeddings are resampled by timm (bicubic), except
    fixed sine-cosine tables, which are computed again. Relative-position tables are resampled by timm's geometric
    interpolation. Statistics of BatchNorm stay.

    Args:
        model: not wrapped for several processes, and not sharded.
        optimizer: of the model's parameters; None: no optimizer yet.
        ema: average of the model's weights; None: no average.
        size: of the new inputs in px: the side of a square, or (H, W).
    Returns:
        Whether parameters or buffers were replaced. Wrappers of the model (DDP, torch.compile) must then be built again.
    Raises:
        UserError: if the model cannot change its size or cannot take this one, or if the optimizer's state cannot be
            resampled. Nothing is changed then.
    Source: released code of EfficientTrain++ (arXiv 2405.08768) for the moments.
    """
    if not has_fixed_size(model):
        return False
    size = as_size(size)
    if _is_resizable(model):
        check_input_size(model, size)
    if _input_size(model) == size:
        return False
    if not _is_resizable(model):
        raise UserError(
            f"{model_name(model)} has a fixed input size and no method to change it to {size_text(size)} px: choose a model "
            "whose size can change (ViT, DeiT, Swin, CSWin, PVT), one that takes any size (ResNet, ConvNeXt, CAFormer), or "
            "the constant schedule"
        )
    before, grids = _tensors(model), _table_grids(model)
    if optimizer is not None:
        _check_state(optimizer, {name: before[name] for name in grids})
    for net in (model,) if ema is None else (model, ema.module):
        _set_input_size(net, size)
    after, new_grids = _tensors(model), _table_grids(model)
    replaced = [name for name, tensor in before.items() if after.get(name) is not tensor]
    if optimizer is not None:
        for name in replaced:
            if isinstance(before[name], nn.Parameter):
                _replace(optimizer, before[name], after[name], grids[name], new_grids[name])
    return bool(replaced)


def has_fixed_size(model: nn.Module) -> bool:
    """Returns whether a model takes images of one size only, until `change_input_size` changes it."""
    strict = getattr(getattr(model, "patch_embed", None), "strict_img_size", False)
    return bool(get_model_traits(model).get("fixed_input_size", strict))


def check_input_size(model: nn.Module, size: int | Size) -> None:
    """Checks that a model can take images of a size.

    Args:
        model: of a class whose size can change.
        size: px, the side of a square or (H, W).
    Raises:
        UserError: if it cannot; names the nearest sizes.
    """
    size = as_size(size)
    fits, rule = _size_rule(model)
    if all(map(fits, size)):
        return
    refused = f"{model_name(model)} cannot take images of {size_text(size)} px: {rule}. "
    if size[0] == size[1]:
        raise UserError(f"{refused}The nearest sizes are {_nearest(fits, size[0])}")
    sides = (f"{name} {_nearest(fits, side)}" for name, side in zip(("height", "width"), size, strict=True))
    raise UserError(f"{refused}The nearest are {' and '.join(sides)}")


def _nearest(fits: Callable[[int], bool], side: int) -> str:
    """Names the nearest sides that fit."""
    if fits(side):
        return f"{side} px"
    below = next((near for near in range(side - 1, 0, -1) if fits(near)), None)
    above = next(near for near in range(max(1, side + 1), max(1, side) + 100_000) if fits(near))
    return f"{above} px" if below is None else f"{below} and {above} px"


def size_multiple(model: nn.Module) -> int:
    """Returns the px that the size of the images must be a multiple of; 1 if the model takes images of any size."""
    if not has_fixed_size(model) or not _is_resizable(model):
        return 1
    fits, _ = _size_rule(model)
    return next(size for size in range(1, 100_000) if fits(size))


def resample(tensor: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resamples a tensor that belongs to a position table, e.g. a moment of the optimizer.

    Args:
        tensor: [..., rows, D], with rows = gh gw + extra rows.
        old: grid of the tensor.
        new: grid of the result.
    Returns:
        [..., new rows, D], bilinear over the grid. Extra rows are unchanged. Values that are >= 0 stay >= 0.
    """
    (height, width), num_channels = old.size, tensor.shape[-1]
    rows = tensor.reshape(-1, num_channels)
    start = len(rows) - height * width if old.extra_first else 0
    end = start + height * width
    image = rows[start:end].T.reshape(1, num_channels, height, width)
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    resized = F.interpolate(image, size=new.size, mode="bilinear", antialias=True)
    grid = resized.reshape(num_channels, -1).T.to(tensor.dtype)
    return torch.cat([rows[:start], grid, rows[end:]]).reshape(*tensor.shape[:-2], -1, num_channels)


def _is_resizable(model: nn.Module) -> bool:
    return isinstance(model, RESIZABLE) or hasattr(model, "size_multiple")


def model_name(model: nn.Module) -> str:
    """Returns timm's name of a model."""
    return str(getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__)


def _input_size(model: Any) -> tuple[int, int]:
    owner = model if hasattr(model, "size_multiple") else getattr(model, "patch_embed", None)
    return tuple(getattr(owner, "img_size", None) or get_model_input_config(model)["input_size"][1:])


def _size_rule(model: Any) -> tuple[Callable[[int], bool], str]:
    """Returns a function that decides whether a side fits, and the rule in words."""
    if hasattr(model, "size_multiple"):
        multiple = model.size_multiple
        return lambda size: size > 0 and size % multiple == 0, f"the size must be a multiple of {multiple} px"
    patch: tuple[int, int] = tuple(model.patch_embed.patch_size)
    if not isinstance(model, WINDOWED):
        rule = f"the size must be a multiple of the patch size, {patch[0]} px"
        return lambda size: size > 0 and all(size % side == 0 for side in patch), rule

    # The windows scale with the grid. So each stage keeps its number of windows, as published (B / 32 for Swin).
    swin: Any = model
    reference, windows = swin._ref_grid_size, swin._ref_window_sizes

    def fits(size: int) -> bool:
        return size > 0 and all(
            size % side == 0 and window * (size // side) % cells == 0
            for stage in windows
            for window, cells, side in zip(stage, reference, patch, strict=True)
        )

    sides = ", ".join(str(stage[0]) for stage in windows)
    rule = f"its windows ({sides} patches at {reference[0] * patch[0]} px) must scale to whole numbers of patches"
    return fits, rule


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _table_grids(model: nn.Module) -> dict[str, Grid]:
    """Returns the grid of each parameter that is a position table, by the parameter's name."""
    grids = {}
    for path, module in model.named_modules():
        owner: Any = module
        for key, _ in module.named_parameters(recurse=False):
            if key == BIAS_TABLE:
                height, width = owner.window_size
                grid = Grid((2 * height - 1, 2 * width - 1), extra_first=False)
            elif key.startswith("pos_embed") and module is model:
                grid = Grid(tuple(getattr(model, key.replace("pos_embed", "patch_embed")).grid_size), extra_first=True)
            else:
                continue
            grids[f"{path}.{key}".lstrip(".")] = grid
    return grids


def _set_input_size(net: Any, size: Size) -> None:
    table = getattr(net, "pos_embed", None)
    is_fixed = table is not None and not table.is_meta and is_sincos_table(table)
    net.set_input_size(img_size=size)
    if is_fixed:
        with torch.no_grad():
            net.pos_embed.copy_(sincos_pos_embed(net.pos_embed.shape[-1], net.patch_embed.grid_size))


def _check_state(optimizer: torch.optim.Optimizer, tables: Mapping[str, Tensor]) -> None:
    """Refuses an optimizer whose state of a table has tensors of other shapes, e.g. the factored moments of Adafactor."""
    for name, table in tables.items():
        for key, value in optimizer.state.get(table, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != table.shape:
                raise UserError(
                    f"{type(optimizer).__name__} keeps {key} {tuple(value.shape)} for {name} {tuple(table.shape)}, "
                    "which cannot follow a change of the input size: use AdamW, LAMB or SGD"
                )


def _replace(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, old_grid: Grid, new_grid: Grid) -> None:
    """Puts a new parameter at the place of an old one in the groups, and its resampled state in the state."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = {
            key: resample(value, old_grid, new_grid)
            if isinstance(value, Tensor) and value.shape == old.shape
            else value
            for key, value in optimizer.state.pop(old).items()
        }
