"""What classification trains or runs: a backbone file turned into an encoder, a classifier or a linear probe.

Shapes: n images, L patches, D width.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars
from torch import Tensor, nn

from mae_et.config import BackboneConfig, ClassifyConfig
from mae_et.dims import MAE_SIZES
from mae_et.errors import CheckpointError
from mae_et.export import read_backbone
from mae_et.models.vit import NUM_HEADS, num_blocks, random_vit, vit_from_state
from mae_et.optim import param_groups

log = logging.getLogger(__name__)

NO_DECAY = ("pos_embed", "cls_token")  # not decayed in fine-tuning, as in MAE's released recipe


class Backbone(NamedTuple):
    """The weights to judge and what their file says of them."""

    state: Mapping[str, Tensor]
    metadata: dict[str, str]


def open_backbone(config: ClassifyConfig) -> Backbone | None:
    """Reads the config's backbone file; None where the weights are to be random.

    Raises:
        CheckpointError: if the file is of another architecture, naming the differences.
    """
    if config.backbone is None:
        return None
    backbone = Backbone(*read_backbone(config.backbone))
    check_architecture(*backbone, config.model, config.backbone)
    for name in ("mean", "std"):
        theirs, ours = json.loads(backbone.metadata.get(name, "null")), getattr(config.data, name)
        if theirs is not None and not all(map(partial(math.isclose, abs_tol=1e-3), theirs, ours)):
            log.warning("%s was trained with data.%s = %s, not %s", config.backbone, name, theirs, list(ours))
    return backbone


def build_classifier(config: ClassifyConfig, num_classes: int, backbone: Backbone | None = None) -> nn.Module:
    """Builds what is trained: the ViT with a head, or a frozen ViT under a linear probe."""
    if config.protocol == "linear_probe":
        return LinearProbe(build_encoder(config, backbone), num_classes, config.model.pool)
    model = build_encoder(
        config, backbone,
        num_classes=num_classes, drop_path_rate=config.model.drop_path_rate, global_pool=config.model.pool,
    )  # fmt: skip
    nn.init.trunc_normal_(model.head.weight, std=config.model.head_init_std)  # type: ignore[arg-type]
    model.set_grad_checkpointing(config.run.activation_checkpointing)
    return model


def build_encoder(config: ClassifyConfig, backbone: Backbone | None = None, **kwargs: Any) -> VisionTransformer:
    """Builds the config's ViT with a backbone's weights, or random ones.

    Raises:
        CheckpointError: if the weights do not fit, naming the keys.
    """
    dims, model = config.model.dims, config.model
    if backbone is None:
        return random_vit(
            config.data.image_size, patch_size=dims.patch_size, in_chans=model.in_chans, embed_dim=dims.embed_dim,
            depth=dims.depth, num_heads=dims.num_heads, mlp_ratio=dims.mlp_ratio, **kwargs,
        )  # fmt: skip
    return vit_from_state(
        backbone.state, config.data.image_size, metadata=backbone.metadata, where=str(config.backbone),
        patch_size=dims.patch_size, in_chans=model.in_chans, num_heads=dims.num_heads, **kwargs,
    )  # fmt: skip


def check_architecture(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], model: BackboneConfig, path: str
) -> None:
    """Compares a backbone file with the config.

    Raises:
        CheckpointError: naming each difference and the options that mend it.
    """
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4:
        return  # vit_from_state says what the file is instead
    width = kernel.shape[0]
    found = {
        "embed_dim": width,
        "depth": num_blocks(state, "blocks."),
        "in_chans": kernel.shape[1],
        "patch_size": kernel.shape[2],
    }
    if "num_heads" in metadata:
        found["num_heads"] = int(metadata["num_heads"])
    elif model.num_heads is None and width in NUM_HEADS:  # the tensors do not tell: that of the published width
        found["num_heads"] = NUM_HEADS[width]

    def different(config: BackboneConfig) -> dict[str, int]:
        wanted = {**vars(config.dims), "in_chans": config.in_chans}
        return {name: value for name, value in found.items() if value != wanted[name]}

    faults = different(model)
    if not faults:
        return
    options: list[list[str]] = [[f"model.{name}={value}" for name, value in faults.items()]]
    for size in MAE_SIZES:
        remaining = different(dataclasses.replace(model, size=size))  # type: ignore[arg-type]
        options.append([f"model.size={size}", *(f"model.{name}={value}" for name, value in remaining.items())])
    shortest = min(options, key=len)
    wanted = {**vars(model.dims), "in_chans": model.in_chans}
    raise CheckpointError(
        f"{path} is another network than the config's: "
        + ", ".join(f"{name} = {value} (config: {wanted[name]})" for name, value in faults.items())
        + ". Use --cfg-options "
        + " ".join(shortest)
    )


def classifier_metadata(config: ClassifyConfig, class_names: list[str]) -> dict[str, str]:
    """Says how a classifier's images are to be prepared and what its outputs mean, for a safetensors header."""
    dims, data = config.model.dims, config.data
    values = {
        "class_names": class_names,
        "protocol": config.protocol,
        "pool": config.model.pool,
        "embed_dim": dims.embed_dim,
        "depth": dims.depth,
        "num_heads": dims.num_heads,
        "patch_size": dims.patch_size,
        "in_chans": config.model.in_chans,
        "image_size": data.image_size,
        "eval_crop_ratio": data.eval_crop_ratio,
        "mean": list(data.mean),
        "std": list(data.std),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def pooled(encoder: VisionTransformer, images: Tensor, pool: str) -> Tensor:
    """Returns the normalised cls token or the mean of the normalised patch tokens, [n, D]."""
    tokens = encoder.forward_features(images)
    return tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(dim=1)


class LinearProbe(nn.Module):
    """A frozen encoder, a BatchNorm without parameters, and a linear layer.

    In training the BatchNorm sees the statistics of one process's micro batch, as in the paper's code: with other micro
    batches or another number of processes the losses are other ones, unlike those of fine-tuning.
    Args:
        encoder: gives [n, 1 + L, D].
        num_classes: of the head.
        pool: "token" or "avg".
    Source: MAE (arXiv 2111.06377), linear probing.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int, pool: str) -> None:
        super().__init__()
        self.encoder, self.pool = encoder.requires_grad_(False), pool
        self.norm = nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6)
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> LinearProbe:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = pooled(self.encoder, images, self.pool)
        return self.head(self.norm(features))


def build_optimizer(config: ClassifyConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Builds AdamW with layer decay, or LARS; the plan sets the learning rate."""
    options = config.optimizer
    groups = param_groups(
        model, options.weight_decay, layer_decay=options.layer_decay, depth=config.model.dims.depth, no_decay=NO_DECAY
    )
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps, fused=True)
    for group in groups:  # timm's Lars takes no names; biases and norms keep their plain gradient
        group["params"] = [parameter for _, parameter in group["params"]]
        group["always_adapt"] = group["params"][0].ndim > 1
    # timm checks that lr is positive; the plan sets it before the first step.
    return Lars(groups, lr=1.0, momentum=options.momentum, trust_coeff=options.trust_coefficient, eps=0.0)
