"""Any timm backbone with a pyramid of maps: ResNet, ConvNeXt, Swin, ..."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from downstream.backbones.loading import Account, load_strictly
from downstream.backbones.plain_vit import ChannelLayerNorm, checkpoint_path
from downstream.backbones.swin import pad_before_shift
from mae_et.errors import UserError
from mae_et.storage.weights import read_weights

log = logging.getLogger(__name__)


@MODELS.register_module()
class TimmFeatures(BaseModule):
    """Wraps a timm model without its classifier, as the backbone of FPN or UperNet.

    Swin uses the windows of the published detectors and segmentors; see `downstream.backbones.swin`.

    Args:
        model_name: as for timm.create_model, e.g. "resnet50", "convnext_tiny", "swin_tiny_patch4_window7_224".
        out_indices: stages whose maps are returned; the first with stride 4 is 1 for ResNet, 0 for ConvNeXt and Swin.
        out_norm: add a LayerNorm to each map, as for Swin and ConvNeXt in dense prediction.
        norm_eval: keep the loaded statistics of BatchNorm, for small batches.
        freeze_at: number of timm's stages that are not trained, with the stem counted; 0: all are trained.
        model_options: further arguments for timm, e.g. dict(drop_path_rate=0.2).
        init_cfg: dict(type="Pretrained", checkpoint=FILE), a state dict under timm's names; dict(type="Pretrained",
            checkpoint="timm"): timm's own weights, downloaded; None: random.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = False,
        norm_eval: bool = False,
        freeze_at: int = 0,
        model_options: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not timm.is_model(model_name.split(".")[0]):
            close = timm.list_models(f"*{model_name.split('_')[0]}*")[:6]
            raise UserError(
                f"backbone.model_name = {model_name!r} is not a model of timm. Similar names: {', '.join(close) or 'none'}"
            )
        self.model_name, self.out_indices = model_name, tuple(out_indices)
        options = dict(model_options or {})
        if "swin" in model_name:
            options.setdefault("strict_img_size", False)  # other models have no such option
        is_first_swin = model_name.startswith("swin_")
        if is_first_swin:
            options.setdefault("always_partition", True)  # else a grid of one window is not shifted
        self.options = options
        pretrained = checkpoint_path(init_cfg) == "timm"
        net: Any = timm.create_model(
            model_name, features_only=True, out_indices=self.out_indices, pretrained=pretrained, **options
        )
        self.net: Any = net
        if is_first_swin:
            pad_before_shift(net)
        self.patch_size = net.patch_embed.patch_size[0] if is_first_swin else 1
        self.channels: list[int] = net.feature_info.channels()
        self.strides: list[int] = net.feature_info.reduction()
        eps = 1e-5 if is_first_swin else 1e-6  # each as published
        self.norms = nn.ModuleList(ChannelLayerNorm(width, eps) for width in self.channels) if out_norm else None
        self._flattened = [name for name, _ in self.net.named_children() if name.rpartition("_")[2].isdecimal()]
        self.norm_eval = norm_eval
        self._freeze(freeze_at)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps [N, C, H, W] to one [N, channels[i], H / strides[i], W / strides[i]] for each stage, rounded up or down."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        maps = list(self.net(images))
        if str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC"):
            maps = [features.permute(0, 3, 1, 2).contiguous() for features in maps]
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
        """Loads the file of `init_cfg`, if there is one.

        Raises:
            CheckpointError: if a key of these stages is missing or has another shape, or a key of the file is neither of these
                stages, of a later one nor of the classifier.
        """
        path = checkpoint_path(self.init_cfg)
        if path not in (None, "timm"):
            self.load_backbone(path)
        self._is_init = True

    def load_backbone(self, path: str | Path) -> Account:
        """Loads a state dict under timm's names; see `init_weights` for the errors."""
        state, _ = read_weights(path)
        own = self.net.state_dict()
        whole = timm.create_model(self.model_name, **self.options).state_dict()
        account, renamed = Account(), {}
        for key, value in state.items():
            name = self._own_name(key)
            if name in own or key not in whole:
                renamed[name] = value  # load_strictly reports unexpected ones
                account.arrived.append(key)
            else:
                account.left_out.append(key)
        load_strictly(self.net, renamed, path)
        log.info("%s: %s", path, account)
        return account

    def _own_name(self, key: str) -> str:
        """Renames stages.0 to stages_0, as in timm's features-only models."""
        for child in self._flattened:
            if key.startswith(child.replace("_", ".") + "."):
                return child + key[len(child) :]
        return key

    def _freeze(self, num_stages: int) -> None:
        """Freezes the first stages with everything before them; children are in the order of the computation."""
        if not num_stages:
            return
        stages = [info["module"] for info in self.net.feature_info.info]
        if num_stages > len(stages):
            raise UserError(f"backbone.freeze_at = {num_stages}, but {self.model_name} has {len(stages)} stages")
        last = stages[num_stages - 1].replace(".", "_")
        for name, child in self.net.named_children():
            child.requires_grad_(False)
            if name == last:
                return
