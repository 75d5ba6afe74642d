"""What supervised training trains: a timm classifier, its cost and its optimizer."""

from __future__ import annotations

import functools
import logging
from typing import Any, cast

import torch
from timm.optim import Lamb, param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mae_et.config.supervised import SupervisedConfig
from mae_et.curriculum.cost import ModelCost
from mae_et.curriculum.plan import Plan
from mae_et.errors import ConfigError
from mae_et.models.resize import size_multiple
from mae_et.models.sizes import Size, size_text
from mae_et.models.timm_backbone import create_backbone, forward_flops, meta_backbone

log = logging.getLogger(__name__)

SMALL_BATCH = 16  # images; BatchNorm's statistics of fewer are noisy


def timm_cost(config: SupervisedConfig) -> ModelCost:
    """Returns the cost of training a config's model, by counted FLOPs.

    Raises:
        UserError: if timm has no such model, or it cannot take images of the config's size.
    """
    model = config.model
    network = meta_backbone(model.name, config.data.image_size, in_chans=model.in_chans, **model.options)

    @functools.cache
    def flops(size: Size) -> int:
        return forward_flops(network, size, model.in_chans)

    return ModelCost(size_multiple(network), None, flops)


def build_model(config: SupervisedConfig, num_classes: int, image_size: Size) -> nn.Module:
    """Builds the classifier of a config for images of a size, with random weights.

    Args:
        config: of the run.
        num_classes: outputs of the head.
        image_size: px, of the first stage.
    """
    model, options = config.model, dict(config.model.options)
    if rate := config.scaled_drop_path_rate:
        options["drop_path_rate"] = rate
    built: Any = create_backbone(model.name, image_size, num_classes=num_classes, in_chans=model.in_chans, **options)
    if config.run.activation_checkpointing:
        try:
            built.set_grad_checkpointing(True)
        except AssertionError as error:
            raise ConfigError(
                [f"run.activation_checkpointing = True, but {model.name} does not support it: set it to False"]
            ) from error
    return cast(nn.Module, built)


def check_batch_norm(model: nn.Module, plan: Plan) -> None:
    """Checks that micro batches are large enough for BatchNorm.

    Raises:
        ConfigError: if a device sees one image at a time.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    smallest = min(plan.stages, key=lambda stage: stage.micro_batch_size)
    if smallest.micro_batch_size == 1:
        raise ConfigError(
            [
                f"the model has BatchNorm, which needs several images at once, but the stage at bandwidth "
                f"{size_text(smallest.input_size)} "
                "has micro batches of 1 image: raise batch.micro_batch_size"
            ]
        )
    if smallest.micro_batch_size < SMALL_BATCH:
        log.warning(
            "the model has BatchNorm, but the stage at bandwidth %s has micro batches of %d images, so its statistics are "
            "noisy: raise batch.micro_batch_size if memory allows", size_text(smallest.input_size), smallest.micro_batch_size,
        )  # fmt: skip


def build_optimizer(config: SupervisedConfig, model: Any) -> torch.optim.Optimizer:
    """Builds AdamW or LAMB with timm's parameter groups; the plan sets the learning rate.

    Biases, norms and what the model's own `no_weight_decay` names are not decayed. The layers of layer decay are those of
    the model's `group_matcher`, or where it has none (CAFormer) twelve parameters each.
    """
    options = config.optimizer
    if options.layer_decay < 1 and not hasattr(model, "group_matcher"):
        log.warning(
            "timm defines no layers for %s: optimizer.layer_decay takes each twelve parameters for a layer",
            config.model.name,
        )
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if options.layer_decay == 1:
        groups = param_groups_weight_decay(model, options.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(
            model, options.weight_decay, no_weight_decay_list=exempt, layer_decay=options.layer_decay
        )
        for group in groups:
            group.pop("param_names", None)
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps, fused=True)
    # The trainer clips. timm checks that lr is positive; the plan sets it before the first step.
    return Lamb(groups, lr=1.0, betas=options.betas, eps=options.eps, max_grad_norm=None)
