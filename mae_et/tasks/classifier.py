"""What classification trains or runs: a backbone file turned into an encoder, a classifier or a linear probe.

Shapes: n images, L patches, D width.
"""

from __future__ import annotations

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

from mae_et.config.schema import BackboneConfig, ClassifyConfig
from mae_et.errors import CheckpointError
from mae_et.models.architecture import differences, encoder_options, published_heads
from mae_et.models.linear_probe import PROBES, make_probe
from mae_et.models.param_groups import param_groups
from mae_et.models.sizes import MAE_SIZES, plain_size, recorded_size, size_text
from mae_et.models.vit import random_vit, vit_from_state
from mae_et.storage.backbone import read_backbone
from mae_et.storage.metadata import stored_range

log = logging.getLogger(__name__)

# Not decayed: the first two as in MAE's released recipe of fine-tuning, registers and further cls tokens as the cls token; the
# last is that of the attentive probe.
NO_DECAY = ("pos_embed", "cls_token", "reg_token", "query")


class Backbone(NamedTuple):
    """The weights to evaluate and the metadata of their file."""

    state: Mapping[str, Tensor]
    metadata: dict[str, str]


def open_backbone(config: ClassifyConfig) -> Backbone | None:
    """Reads the config's backbone file; returns None if the weights are to be random.

    Raises:
        CheckpointError: if the file is of another architecture or normalisation, naming the differences.
    """
    if config.backbone is None:
        return None
    backbone = Backbone(*read_backbone(config.backbone))
    check_backbone(*backbone, config, config.backbone)
    return backbone


def build_classifier(config: ClassifyConfig, num_classes: int, backbone: Backbone | None = None) -> nn.Module:
    """Builds what is trained: the ViT with a head, or a frozen ViT under a probe."""
    if config.protocol in PROBES:
        return make_probe(config.protocol, build_encoder(config, backbone), num_classes, config.model.pool)
    model = build_encoder(
        config, backbone,
        num_classes=num_classes, drop_path_rate=config.model.drop_path_rate, global_pool=config.model.pool,
    )  # fmt: skip
    nn.init.trunc_normal_(model.head.weight, std=config.model.head_init_std)  # type: ignore[arg-type]
    return model


def build_encoder(config: ClassifyConfig, backbone: Backbone | None = None, **kwargs: Any) -> VisionTransformer:
    """Builds the config's ViT with a backbone's weights, or random ones.

    Raises:
        CheckpointError: if the weights do not fit, naming the keys.
    """
    dims, model = config.model.dims, config.model
    if backbone is None:
        return random_vit(config.data.image_size, **model.encoder_options, **kwargs)
    return vit_from_state(
        backbone.state, config.data.image_size, metadata=backbone.metadata, where=str(config.backbone),
        patch_size=dims.patch_size, in_chans=model.in_chans, num_heads=dims.num_heads, **kwargs,
    )  # fmt: skip


def check_backbone(state: Mapping[str, Tensor], metadata: Mapping[str, str], config: ClassifyConfig, path: str) -> None:
    """Compares a backbone file with the config. Another image size alone is allowed and logged.

    Raises:
        CheckpointError: if the architecture, mean or std differs. It names each difference and all options that fix them.
    """
    faults, options = _architecture_differences(state, metadata, config.model)
    for name in ("mean", "std"):
        theirs, ours = json.loads(metadata.get(name, "null")), getattr(config.data, name)
        if theirs is None:  # timm's and official files do not say
            continue
        if len(theirs) != len(ours) or not all(map(partial(math.isclose, abs_tol=1e-3), theirs, ours)):
            faults.append(f"data.{name} = {theirs} (config: {list(ours)})")
            options.append(f"data.{name}=[{','.join(map(str, theirs))}]")
    if "mean" in metadata and (theirs := stored_range(metadata)) != config.data.value_range:
        log.warning(
            "%s was trained with data.value_range = %s, this config has %s", path, theirs, config.data.value_range
        )
    size, own = recorded_size(metadata, config.data.image_size), config.data.image_size
    if size != own:
        option = f"data.image_size={','.join(map(str, dict.fromkeys(size)))}"
        if faults:
            faults.append(f"data.image_size = {size_text(size)} (config: {size_text(own)})")
            options.append(option)
        else:
            log.info(
                "%s was pre-trained at %s px, this config uses %s px: the position table is resampled. "
                "--cfg-options %s uses the size of the pre-training",
                path, size_text(size), size_text(own), option,
            )  # fmt: skip
    if faults:
        raise CheckpointError(
            f"{path} does not fit the config: {', '.join(faults)}. Use --cfg-options {' '.join(options)}"
        )


def _architecture_differences(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], model: BackboneConfig
) -> tuple[list[str], list[str]]:
    """Returns each difference between a backbone file and the config, and the fewest options that remove them."""
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4:
        return [], []  # vit_from_state reports what the file is instead
    found = encoder_options(state)
    width, heads = found["embed_dim"], published_heads(state)
    if "num_heads" in metadata:
        found["num_heads"] = int(metadata["num_heads"])
    elif model.num_heads is None and width in heads:  # the tensors do not show it: use that of the published width
        found["num_heads"] = heads[width]

    def different(config: BackboneConfig) -> dict[str, Any]:
        return differences(found, config.encoder_options)

    if not (own := different(model)):
        return [], []
    options: list[list[str]] = [[f"model.{name}={value}" for name, value in own.items()]]
    for size in MAE_SIZES:
        remaining = different(model.model_copy(update={"size": size}))
        options.append([f"model.size={size}", *(f"model.{name}={value}" for name, value in remaining.items())])
    faults = [f"{name} = {value} (config: {model.encoder_options[name]})" for name, value in own.items()]
    return faults, min(options, key=len)


def classifier_metadata(config: ClassifyConfig, class_names: list[str], norm_eps: float) -> dict[str, str]:
    """Says how a classifier's images are to be prepared and what its outputs mean, for a safetensors header.

    Args:
        config: of the training.
        class_names: of the outputs.
        norm_eps: epsilon of the LayerNorms, which is that of the backbone.
    """
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
        "norm_eps": norm_eps,
        "image_size": plain_size(data.image_size),
        "eval_crop_ratio": data.eval_crop_ratio,
        "mean": list(data.mean),
        "std": list(data.std),
        **({"num_cls_tokens": config.model.num_cls_tokens} if config.model.num_cls_tokens > 1 else {}),
        **({"rotary_positions": True} if config.model.rotary_positions else {}),
        **({} if data.value_range is None else {"value_range": list(data.value_range)}),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


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
