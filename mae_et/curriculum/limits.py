"""Which limit binds in each stage of a run, from a measurement, and how to lift it. Pure, without torch."""

from __future__ import annotations

from mae_et.config.training import TrainConfig
from mae_et.curriculum.hours import Measurement, StageSpeed
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.models.sizes import size_text

CLEAR = 1.1  # a side that is faster by less does not decide
BUSY = 0.7  # CPU time over wall time of a loader process that does not wait for its files
SMALL_USE = 0.5  # of the memory; below, a larger micro batch may be faster


def binding_limits(config: TrainConfig, plan: Plan, found: Measurement, num_cores: int) -> list[str]:
    """Returns a sentence for each stage: what limits its speed, and what to change.

    Args:
        config: of the run.
        plan: of the run.
        found: measured with it.
        num_cores: that the processes of this machine may use.
    """
    return [
        f"bandwidth {size_text(stage.input_size)}: {_limit(config, plan, stage, speed, found, num_cores)}"
        for stage, speed in zip(plan.stages, found.stages, strict=True)
    ]


def _limit(
    config: TrainConfig, plan: Plan, stage: PlannedStage, speed: StageSpeed, found: Measurement, num_cores: int
) -> str:
    loader, step = speed.loader_images_per_second, speed.step_images_per_second
    rates = f"loader {loader:.3g} images/s, step {step:.3g} images/s"
    if found.num_workers == 0:
        share = speed.images_per_second / loader
        if share < 1 - 1 / CLEAR:  # loading takes less than a tenth
            return f"the step's compute limits ({rates}, one after the other in one process). {_faster_step(speed)}"
        return (
            f"one process loads and trains in turn ({rates}); loading takes {min(share, 1):.0%} of the time. "
            f"{_more_workers(found, plan, num_cores)} {_lighter_loading(config, stage)}"
        )
    if loader > CLEAR * step:
        return f"the step's compute limits ({rates}). {_faster_step(speed)}"
    if speed.loader_cpu_fraction is not None and speed.loader_cpu_fraction < BUSY:
        return (
            f"disk or network limits: the loader processes compute {speed.loader_cpu_fraction:.0%} of their time and wait for "
            f"files otherwise ({rates}). Copy the data to a local disk as prepared shards (mae-et prepare), or raise "
            f"data.num_workers above {found.num_workers} so that more reads overlap"
        )
    unsure = "" if speed.loader_cpu_fraction is not None else " or the disk"
    return (
        f"the cores of the loader{unsure} limit ({rates}). {_more_workers(found, plan, num_cores)} "
        f"{_lighter_loading(config, stage)}"
    )


def _more_workers(found: Measurement, plan: Plan, num_cores: int) -> str:
    most = num_cores // plan.local_world_size - 1  # the training process needs a core too
    if most > found.num_workers:
        return f"Raise data.num_workers from {found.num_workers} to {most}: this machine has {num_cores} cores."
    return f"All {num_cores} core{'s are' if num_cores > 1 else ' is'} in use, so more loader processes do not help."


def _lighter_loading(config: TrainConfig, stage: PlannedStage) -> str:
    options = []
    if config.data.loading == "exact" and config.model.in_chans == 3:
        options.append('data.loading = "fast" for JPEG files')
    options.append("prepared shards of smaller images (mae-et prepare)")
    if not stage.replay.is_on:
        options.append('replay.mode = "mix", which changes the training')
    return f"Load with less work: {', '.join(options)}."


def _faster_step(speed: StageSpeed) -> str:
    if speed.memory_limit is not None and speed.memory_bytes < SMALL_USE * speed.memory_limit:
        return (
            f"Only {speed.memory_bytes / 2**30:.2g} of {speed.memory_limit / 2**30:.2g} GiB of memory are used: if the batch is "
            "accumulated, a larger micro batch may be faster (mae-et plan --fit-micro-batch); run.compile = True may be too."
        )
    return "Nothing in the data path is in the way: run.compile = True, run.precision or more devices change it."
