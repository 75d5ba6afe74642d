"""Loads weights with every key accounted for. OpenMMLab's own loaders only warn, even when nothing fits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from mae_et.errors import CheckpointError
from mae_et.models.architecture import NUM_HEADS
from mae_et.models.position_table import recorded_grid
from mae_et.models.strict import misfit, some
from mae_et.storage.backbone import read_backbone
from mae_et.storage.layouts import check_plain

log = logging.getLogger(__name__)

# Parts of a backbone file that dense prediction does not use: the ends of other tasks.
LEFT_OUT = ("norm.", "head.", "fc_norm.", "mask_token", "decoder_")
PATCHES = "patch_embed.proj.weight"


@dataclass
class Account:
    """Lists where each key of a file went.

    Args:
        arrived: keys of the file that were loaded.
        changed: key -> how it was resampled, for loaded keys that were.
        left_out: keys of the file that the model declares it does not use.
        new: parameters that the model declares as its own, which keep their initial values.
    """

    arrived: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.arrived)} tensors arrived"]
        parts += [f"{key} {how}" for key, how in self.changed.items()]
        if self.left_out:
            parts.append(f"left out: {some(self.left_out)}")
        if self.new:
            parts.append(f"new: {some(self.new)}")
        return "; ".join(parts)


def load_vit(model: Any, path: str | Path) -> Account:
    """Loads a backbone file into one of the ViTs of `downstream.backbones.plain_vit`.

    Args:
        model: a `PlainViT`.
        path: any file that `mae_et.storage.backbone.read_backbone` reads.
    Returns:
        The place of each key.
    Raises:
        CheckpointError: naming keys and shapes, unless every encoder key arrives and only `model.new_parameters` are missing.
    """
    state, metadata = read_backbone(path)
    check_plain(state, "a backbone of detection or segmentation", str(path))
    account = Account()
    skipped = LEFT_OUT if model.has_cls_token else (*LEFT_OUT, "cls_token")
    encoder = {key: value for key, value in state.items() if not key.startswith(skipped)}
    account.left_out = [key for key in state if key not in encoder]

    heads = metadata.get("num_heads")
    if heads is not None and int(heads) != model.num_heads:
        raise CheckpointError(
            f"{path} has {heads} attention heads, the model {model.num_heads}: set backbone.num_heads"
        )
    published = NUM_HEADS.get(model.embed_dim, model.num_heads)
    if heads is None and published != model.num_heads:  # the shapes are the same, the features are not
        log.warning(
            "%s does not give its number of attention heads; ViTs of width %d are published with %d, the model has %d",
            path, model.embed_dim, published, model.num_heads,
        )  # fmt: skip
    kernel, wanted = encoder.get(PATCHES), model.patch_embed.proj.weight
    if kernel is not None and kernel.ndim == 4 and model.resample_patches and kernel.shape[2:] != wanted.shape[2:]:
        account.changed[PATCHES] = f"resampled from {tuple(kernel.shape[2:])} to {tuple(wanted.shape[2:])} px"
        encoder[PATCHES] = resample_patch_embed(kernel.float(), list(wanted.shape[2:]))
    table = encoder.get("pos_embed")
    # A table of another width is left to load_strictly, which names embed_dim.
    if table is not None and table.ndim == 3 and table.shape[2] == model.embed_dim:
        encoder["pos_embed"] = model.fit_positions(table, str(path), recorded_grid(state, metadata))
        if table.shape != encoder["pos_embed"].shape:
            account.changed["pos_embed"] = f"from {tuple(table.shape)} to {tuple(encoder['pos_embed'].shape)}"
    load_strictly(model, encoder, path, may_miss=model.new_parameters)
    account.arrived = list(encoder)
    account.new = [key for key in model.state_dict() if key not in encoder]
    log.info("%s: %s", path, account)
    return account


def load_checkpoint(model: Any, path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint of a training run, every key accounted for; returns its content.

    Args:
        model: a detector or segmentor, also within a wrapper for several processes or scales.
        path: a checkpoint of mmengine.
    Raises:
        CheckpointError: if it is no checkpoint, would run code, or does not fit, naming keys and shapes.
    """
    content = read_checkpoint(path)
    load_strictly(_unwrapped(model), content["state_dict"], path)
    return content


def load_new_heads(model: Any, path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Loads a checkpoint like `load_checkpoint`, but keeps the model's own layers where the number of classes differs.

    Such a layer is outside of backbone and neck, and its tensors differ in their first dimension alone.

    Returns:
        The content of the checkpoint, and the keys that keep their initial values.
    """
    content, model = read_checkpoint(path), _unwrapped(model)
    own, state = model.state_dict(), content["state_dict"]
    new = [key for key, value in state.items() if key in own and _differs_in_classes(key, value, own[key])]
    layers = {key.rpartition(".")[0] for key in new}
    new = [key for key in state if key.rpartition(".")[0] in layers]  # a layer is new as a whole
    load_strictly(model, {key: value for key, value in state.items() if key not in new}, path, may_miss=new)
    if new:
        log.warning(
            "%s has another number of classes: %s start from new weights (%s)",
            path,
            ", ".join(sorted(layers)),
            some(new),
        )
    return content, new


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of mmengine without running code; keys of `state_dict` are those of the bare model.

    Raises:
        CheckpointError: if it is no checkpoint of a training run, or would run code.
    """
    if Path(path).suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is a backbone file, not a checkpoint of a training run. It goes to --backbone of train.py"
        )
    from mmengine.runner.checkpoint import _load_checkpoint  # needs cv2, which the backbones do without

    try:
        content = _load_checkpoint(str(path), map_location="cpu")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} is not a checkpoint of a training run. A backbone file goes to --backbone of tools/train.py"
        )
    content["state_dict"] = {key.removeprefix("module."): value for key, value in state.items()}
    return content


def _differs_in_classes(key: str, value: Tensor, own: Tensor) -> bool:
    return not key.startswith(("backbone.", "neck.")) and value.shape != own.shape and value.shape[1:] == own.shape[1:]


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    where: str | Path,
    may_miss: Sequence[str] = (),
    hint: str | None = None,
) -> None:
    """Loads a state dict if every key fits.

    Args:
        model: the receiver.
        state: names as in the model.
        where: the file, for the message.
        may_miss: beginnings or last parts of names that may be missing from the state.
        hint: how to fix a file that does not fit; None: for a ViT.
    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    faults = misfit(state, own, lambda key: key.startswith(tuple(may_miss)) or key.split(".")[-1] in may_miss)
    if faults:
        raise CheckpointError(f"{where} does not fit {type(model).__name__}: {faults}. {hint or _hint(own, state)}")
    with torch.no_grad():
        model.load_state_dict(dict(state), strict=False)


def _hint(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    kernel, wanted = state.get(PATCHES), own.get(PATCHES)
    if kernel is not None and wanted is not None and kernel.ndim == 4 and kernel.shape != wanted.shape:
        (dim, channels, side, _), (own_dim, own_channels, own_side, _) = kernel.shape, wanted.shape
        different = [
            f"{name} = {found}, not {given}"
            for name, found, given in (
                ("embed_dim", dim, own_dim),
                ("in_channels", channels, own_channels),
                ("patch_size", side, own_side),
            )
            if found != given
        ]
        also = (
            "; or resample_patches=True, to train on from resampled patches"
            if (dim, channels) == (own_dim, own_channels)
            else ""
        )
        return f"The file has {', '.join(different)}: set it in model.backbone{also}"
    if "cls_token" in own and "cls_token" not in state:
        return "The file was written for ViTDet, without the cls token. Export with layout 'timm'"
    return "Set model.backbone (depth, embed_dim, mlp_ratio, ...) to the file's architecture, or choose another file"
