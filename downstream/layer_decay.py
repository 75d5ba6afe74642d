"""Layer-wise learning rates for detectors and segmentors.

A plain ViT has the layers of fine-tuning for classification, `mae_et.models.param_groups`; any other timm model has those of
timm's `group_matcher`.
"""

from __future__ import annotations

import logging
from typing import Any

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from downstream.backbones.plain_vit import PlainViT
from downstream.backbones.timm_features import TimmFeatures
from mae_et.errors import ConfigError, UserError
from mae_et.models.param_groups import decays, layer_of

log = logging.getLogger(__name__)
BACKBONE = "backbone."
NO_DECAY = ("pos_embed", "cls_token")  # as in fine-tuning for classification
KNOWN = {"layer_decay": float, "no_decay": (list, tuple)}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor:
    """Builds the optimizer wrapper of a config; `optim_wrapper.constructor = "LayerDecayConstructor"`.

    Args:
        optim_wrapper_cfg: `optimizer`, whose lr and weight_decay are those of the head, and the arguments of the wrapper.
        paramwise_cfg: layer_decay: factor of the lr from each layer to the one before it; it must be 1 for the backbones of
            mmdetection and mmsegmentation. no_decay: last parts of names that do not decay, beside biases and norms.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        options = dict(paramwise_cfg or {})
        faults = [f"unknown key {key!r}; known: {', '.join(KNOWN)}" for key in options if key not in KNOWN]
        self.layer_decay = options.get("layer_decay", 1.0)
        self.no_decay = tuple(options.get("no_decay", NO_DECAY))
        if not isinstance(self.layer_decay, (int, float)) or not 0 < self.layer_decay <= 1:
            faults.append(f"layer_decay = {self.layer_decay!r} must be above 0 and at most 1")
        wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(wrapper.pop("optimizer", {}))
        if "lr" not in self.optimizer:
            faults.append("optimizer.lr is missing")
        if faults:
            raise ConfigError(faults, "optim_wrapper.paramwise_cfg")
        wrapper.setdefault("type", "OptimWrapper")
        self.wrapper = wrapper

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Returns the wrapper, its groups named by layer.

        Raises:
            UserError: if layer_decay is below 1 and the layers of the backbone are unknown.
        """
        model = getattr(model, "module", model)  # of MMDistributedDataParallel
        groups = self.groups(model)
        for group in groups:
            log.debug(
                "%s: lr %.3g, weight decay %g, %d tensors",
                *(group[k] for k in ("name", "lr", "weight_decay")),
                len(group["params"]),
            )
        optimizer = OPTIMIZERS.build({**self.optimizer, "params": groups})
        return OPTIM_WRAPPERS.build({**self.wrapper, "optimizer": optimizer})

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Splits the trainable parameters by layer and weight decay. What is outside of the backbone is the last layer."""
        layers, last = {}, 0
        if self.layer_decay != 1:
            layers = self._layers(getattr(model, "backbone", None))
            last = max(layers.values()) + 1
        lr, weight_decay = self.optimizer["lr"], self.optimizer.get("weight_decay", 0.0)
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = layers.get(name, last)
            decayed = decays(name, parameter, self.no_decay)
            scale = self.layer_decay ** (last - layer)
            group = groups.setdefault(
                (layer, decayed),
                {
                    "params": [],
                    "lr": lr * scale,
                    "lr_scale": scale,
                    "weight_decay": weight_decay if decayed else 0.0,
                    "name": f"layer_{layer}_{'decay' if decayed else 'no_decay'}",
                },
            )
            group["params"].append(parameter)
        return [groups[key] for key in sorted(groups)]

    def _layers(self, backbone: nn.Module | None) -> dict[str, int]:
        """Returns the layer of each parameter of the pre-trained network, by its name in the detector or segmentor."""
        if isinstance(backbone, TimmFeatures):
            return {f"{BACKBONE}net.{name}": layer for name, layer in backbone.layer_ids().items()}
        if not isinstance(backbone, PlainViT):
            raise UserError(
                f"optim_wrapper.paramwise_cfg.layer_decay = {self.layer_decay} needs ViTDet, ViTSeg or TimmFeatures as "
                f"model.backbone, not {type(backbone).__name__}: set it to 1"
            )
        names = [name for name, _ in backbone.named_parameters()]
        layers = {f"{BACKBONE}{name}": layer_of(name, backbone.depth) for name in names}
        return {name: layer for name, layer in layers.items() if layer <= backbone.depth}
