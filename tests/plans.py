"""Plans of configs, with the cost of their task."""

from mae_et.config.schema import ClassifyConfig
from mae_et.curriculum.cost import mae_cost, vit_cost
from mae_et.curriculum.plan import make_plan


def plan_for(config, dataset_size, world_size=1, local_world_size=None):
    if isinstance(config, ClassifyConfig):
        cost = vit_cost(config.model, backward_factor=1 if config.protocol == "linear_probe" else 3)
    else:
        cost = mae_cost(config.model, config.curriculum.decoder_warmup_fraction)
    return make_plan(config, cost, dataset_size, world_size, local_world_size)
