"""torch.compile for a curriculum: one compiled graph for each size of the images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mae_et.curriculum.plan import Plan


def compile_modules(modules: Iterable[nn.Module], plan: Plan) -> None:
    """Compiles modules in place, once for each bandwidth and micro batch of a plan.

    torch stops compiling a function after 8 graphs and runs it eagerly from then on. The limit is raised where a plan needs
    more: each shape may be met in training and in evaluation mode.

    Args:
        modules: the whole model; under FSDP2 each of its blocks, because sharding works between them.
        plan: of the run.
    """
    shapes = {(stage.input_size, stage.micro_batch_size) for stage in plan.stages}
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * len(shapes) + 2)
    for module in modules:
        module.compile(dynamic=False)
