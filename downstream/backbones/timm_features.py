"""Any timm model as a backbone that returns feature maps: ResNet, ConvNeXt, Swin, DeiT, CSWin, PVT v1, CAFormer, ..."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import PatchEmbed
from timm.models import FeatureInfo, group_parameters
from timm.models.metaformer import MetaFormer
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from downstream.backbones.loading import Account, load_strictly
from downstream.backbones.plain_vit import ChannelLayerNorm, checkpoint_path
from downstream.backbones.swin import pad_before_shift
from mae_et.errors import CheckpointError, UserError
from mae_et.models.cswin import CSWin
from mae_et.models.pvt import PVT
from mae_et.models.resize import has_fixed_size
from mae_et.models.sizes import as_size, plain_size, recorded_size
from mae_et.models.timm_backbone import create_backbone
from mae_et.storage.weights import read_weights

log = logging.getLogger(__name__)

# timm's options with which a model takes images of any size, where it has them.
ANY_SIZE: Mapping[str, bool] = {"strict_img_size": False, "dynamic_img_size": True}
# timm has no layers for this family.
METAFORMER_LAYERS = {
    "stem": r"^stem",
    "blocks": [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)],
}


@MODELS.register_module()
class TimmFeatures(BaseModule):
    """Wraps a timm model without its classifier, as the backbone of FPN or UperNet. State names are `net.` and timm's.

    Swin uses the windows of the published detectors and segmentors; see `downstream.backbones.swin`. PVT pads images to
    multiples of 32 px and resamples its position tables, CSWin pads its maps to multiples of the stripes.

    Args:
        model_name: as for timm.create_model, e.g. "resnet50", "swin_tiny_patch4_window7_224", "cswin_tiny_224", "pvt_small".
        out_indices: stages (of a ViT: blocks) whose maps are returned. The first stage with stride 4 is 1 for ResNet and 0
            for other models with stages.
        image_size: px of the images that the weights were trained on, side or (H, W). It sets the windows of Swin, the
            stripes of CSWin and the position tables of ViT and PVT. None: the published size. Inputs of any size work.
        in_channels: channels of the images.
        out_norm: add a LayerNorm to each map, as published for Swin, ConvNeXt and CSWin in dense prediction.
        norm_eval: keep the loaded statistics of BatchNorm, for small batches.
        freeze_at: number of timm's stages that are not trained, with the stem counted in the first; 0: all are trained.
        model_options: further arguments for timm, e.g. dict(drop_path_rate=0.2).
        init_cfg: dict(type="Pretrained", checkpoint=FILE), a backbone file or state dict under timm's names;
            dict(type="Pretrained", checkpoint="timm"): timm's own weights, downloaded; None: random.
    Raises:
        UserError: if timm has no such model, or the model has no such stages.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        image_size: int | Sequence[int] | None = None,
        in_channels: int = 3,
        out_norm: bool = False,
        norm_eval: bool = False,
        freeze_at: int = 0,
        model_options: Mapping[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.model_name, self.out_indices, self.norm_eval = model_name, tuple(out_indices), norm_eval
        self.image_size, self.in_channels = as_size(image_size or published_size(model_name)), in_channels
        self.model_options = dict(model_options or {})
        cls = _class_of(model_name)
        options = {key: value for key, value in ANY_SIZE.items() if key in inspect.signature(cls).parameters}
        if issubclass(cls, SwinTransformer):
            options["always_partition"] = True  # else a grid of one window is not shifted
        net: Any = create_backbone(
            model_name,
            self.image_size,
            in_chans=in_channels,
            num_classes=0,
            pretrained=checkpoint_path(init_cfg) == "timm",
            **{**options, **self.model_options},
        )
        info = FeatureInfo(net.feature_info, list(range(len(net.feature_info))))  # type: ignore[arg-type]
        if not self.out_indices or not set(self.out_indices) <= set(range(len(info))):
            raise UserError(
                f"backbone.out_indices = {list(self.out_indices)} must be among the {len(info)} stages of {model_name}, "
                f"0 to {len(info) - 1}"
            )
        net.prune_intermediate_layers(list(self.out_indices), prune_norm=True, prune_head=True)
        pad_before_shift(net)
        self.net: Any = net
        self.multiple = _multiple(net)
        self.channels = [info.channels(i) for i in self.out_indices]
        self.strides = [info.reduction(i) for i in self.out_indices]
        eps = 1e-5 if isinstance(net, (SwinTransformer, CSWin)) else 1e-6  # each as published
        self.norms = nn.ModuleList(ChannelLayerNorm(width, eps) for width in self.channels) if out_norm else None
        self._freeze(freeze_at, [info.module_name(i) for i in range(max(self.out_indices) + 1)])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps [N, C, H, W] to one [N, channels[i], H / strides[i], W / strides[i]] for each stage, rounded up or down."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        maps = self.net.forward_intermediates(images, indices=list(self.out_indices), intermediates_only=True)
        if self.norms is not None:
            maps = [norm(features) for norm, features in zip(self.norms, maps, strict=True)]
        return tuple(maps)

    def train(self, mode: bool = True) -> TimmFeatures:
        """Sets the mode as torch does, but BatchNorm stays in eval mode with `norm_eval`, or where it is frozen."""
        super().train(mode)
        for module in self.net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                frozen = module.weight is not None and not module.weight.requires_grad
                module.train(mode and not self.norm_eval and not frozen)
        return self

    def init_weights(self) -> None:
        """Loads the file of `init_cfg`, if there is one; see `load_backbone` for the errors."""
        path = checkpoint_path(self.init_cfg)
        if path not in (None, "timm"):
            self.load_backbone(path)
        self._is_init = True

    def load_backbone(self, path: str | Path) -> Account:
        """Loads a backbone file or state dict under timm's names.

        Returns:
            The place of each key. The classifier, the final norm and later stages are left out.
        Raises:
            CheckpointError: if the file is of another model, a key of these stages is missing or has another shape, or a
                key of the file is not one of the model.
        """
        state, metadata = read_weights(path)
        arguments = {key: getattr(self, key) for key in ("model_name", "image_size", "in_channels", "model_options")}
        if faults := [str(fault) for fault in differences(arguments, metadata)]:
            raise CheckpointError(f"{path} does not fit: {'; '.join(faults)}")
        with torch.device("meta"):
            whole = create_backbone(self.model_name, self.image_size, in_chans=self.in_channels, **self.model_options)
        own, names = self.net.state_dict(), whole.state_dict()
        unused = [key for key in state if key in names and key not in own]
        used = {key: value for key, value in state.items() if key not in unused}
        hint = "Set backbone.model_name, image_size, in_channels and model_options to those of the file, or choose another file"
        load_strictly(self.net, used, path, hint=hint)
        account = Account(arrived=list(used), left_out=unused)
        log.info("%s: %s", path, account)
        return account

    def layer_ids(self) -> dict[str, int]:
        """Returns the layer of each parameter of `net`, by name: 0 for the stem, then timm's groups in order.

        Raises:
            UserError: if timm has no layers for the model.
        """
        if isinstance(self.net, MetaFormer):
            matcher: Any = METAFORMER_LAYERS
        elif hasattr(self.net, "group_matcher"):
            matcher = self.net.group_matcher(coarse=False)
        else:
            raise UserError(
                f"timm has no layers (group_matcher) for {self.model_name}, so layer_decay must be 1 and freeze_at 0"
            )
        return group_parameters(self.net, matcher, reverse=True)

    def _freeze(self, num_stages: int, stages: Sequence[str]) -> None:
        """Freezes the first stages with everything before them."""
        if not num_stages:
            return
        if not 0 < num_stages <= len(stages):
            raise UserError(
                f"backbone.freeze_at = {num_stages}, but {self.model_name} has {len(stages)} stages up to the last of "
                f"out_indices: choose 0 to {len(stages)}"
            )
        layers = self.layer_ids()
        # A stage without parameters is the activation at the end of ResNet's stem.
        last = max(
            (layer for name, layer in layers.items() if name.startswith(f"{stages[num_stages - 1]}.")), default=0
        )
        for name, parameter in self.net.named_parameters():
            if layers[name] <= last:
                parameter.requires_grad_(False)


@dataclass(frozen=True)
class Difference:
    """A difference between the arguments of a `TimmFeatures` and a backbone file.

    Args:
        key: dotted name of the argument.
        found: its value; None: not set.
        wanted: the value of the file; None: the file has none.
    """

    key: str
    found: Any
    wanted: Any

    def __str__(self) -> str:
        found = "is not set" if self.found is None else f"= {self.found!r}"
        if self.wanted is None:
            return f"backbone.{self.key} {found}, but the file was trained without it: remove it from the config"
        return f"backbone.{self.key} {found}, but the file was trained with {self.wanted!r}"


def differences(arguments: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[Difference]:
    """Compares the arguments of a `TimmFeatures` with the metadata of a file of supervised training.

    Regularization and the options for images of any size may differ. Other files do not record timm's arguments.

    Args:
        arguments: of `TimmFeatures`; absent ones have their defaults.
        metadata: of a backbone file.
    """
    if metadata.get("objective") != "supervised":
        return
    name, architecture = str(arguments.get("model_name")), metadata.get("architecture")
    if architecture is not None and name.split(".")[0] != architecture.split(".")[0]:
        yield Difference("model_name", name, architecture)
        return  # the other arguments belong to another model
    channels, wanted = arguments.get("in_channels", 3), json.loads(metadata.get("in_chans", "null"))
    if wanted not in (None, channels):
        yield Difference("in_channels", channels, wanted)
    size = as_size(arguments.get("image_size") or published_size(name))
    wanted = recorded_size(metadata, size)
    if wanted != size and _depends_on_size(name):
        yield Difference("image_size", plain_size(size), plain_size(wanted))
    if "model_options" in metadata:
        ours, theirs = (
            _of_network(arguments.get("model_options") or {}),
            _of_network(json.loads(metadata["model_options"])),
        )
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                yield Difference(f"model_options.{key}", ours.get(key), theirs.get(key))


def published_size(model_name: str) -> int:
    """Returns the px of the images that a model is published for; 224 if that is unknown."""
    published = timm.get_pretrained_cfg(model_name) if timm.is_model(model_name) else None
    return 224 if published is None else published.input_size[-1]


def _of_network(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that change parameters or features, with lists for tuples as in JSON."""
    own = (*ANY_SIZE, "always_partition", "dynamic_img_pad")
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in options.items()
        if key not in own and "drop" not in key and not key.startswith("head_init")
    }


def _depends_on_size(model_name: str) -> bool:
    with torch.device("meta"):
        return has_fixed_size(timm.create_model(model_name))


@functools.cache
def _class_of(model_name: str) -> type[nn.Module]:
    with torch.device("meta"):
        return type(create_backbone(model_name, published_size(model_name)))


def _multiple(net: nn.Module) -> int:
    """Returns the px that a model needs as a factor of the size of its inputs."""
    if isinstance(net, PVT):
        return net.size_multiple
    patches = getattr(net, "patch_embed", None)
    return patches.patch_size[0] if isinstance(patches, PatchEmbed) else 1
