"""Prints the plan of a training: steps, batches, learning rates and cost of each stage.

Needs neither data nor a GPU. With --fit-micro-batch it first finds, by a dry run on this device, how many images of each
stage fit at once. --measure and --hours measure the loader and the step on this device, with the images of data.train.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from mae_et.config.files import add_config_arguments
from mae_et.config.schema import PretrainConfig
from mae_et.config.supervised import SupervisedConfig
from mae_et.config.training_files import load_training_config
from mae_et.curriculum.cost import ModelCost, mae_cost
from mae_et.curriculum.hours import Measurement
from mae_et.curriculum.plan import Plan, make_plan
from mae_et.curriculum.replay import GIB
from mae_et.engine.hardware import PEAK_TFLOPS
from mae_et.errors import UserError
from mae_et.models.sizes import size_text

log = logging.getLogger(__name__)

EXAMPLE = """examples:
  mae-et plan mae_base_etpp_400e_imagenet --world-size 8
  mae-et plan photos --dataset-size 20000
  mae-et plan photos --hours 8 --cfg-options data.train=/data/photos
  mae-et plan supervised/swin_tiny
"""

ASSUMED_UTILIZATION = 0.3  # of the peak; not measured: a cautious value for the estimate of the time


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--dataset-size", type=int, metavar="N", help="images; default: data.num_images of the config")
    parser.add_argument("--world-size", type=int, default=1, metavar="W", help="training processes (GPUs); default: 1")
    parser.add_argument(
        "--local-world-size", type=int, metavar="L", help="processes on one machine, for its memory; default: all"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--fit-micro-batch",
        action="store_true",
        help="find the largest micro batch of each stage on this device, leaving a tenth of its memory free; takes minutes",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure each stage for a minute or two, and print its speed, which limit binds and what to change",
    )
    parser.add_argument(
        "--hours",
        type=float,
        metavar="H",
        help="measure, and plan the equivalent epochs that fit into H hours, as curriculum.budget_hours does",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="for what is measured; default: cuda if available, else cpu"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    if args.hours is not None:
        args.cfg_options["curriculum.budget_hours"] = str(args.hours)
    config = load_training_config(args.config, args.cfg_options)
    if args.measure or config.curriculum.budget_hours is not None:
        measured(args, config)
        return
    dataset_size = config.data.num_images if args.dataset_size is None else args.dataset_size
    if dataset_size is None:
        raise UserError(
            f"{args.config} does not set data.num_images, and a plan reads no data: give --dataset-size N; `mae-et stats "
            f"{config.data.train}` counts the images"
        )
    sizes = (dataset_size, args.world_size, args.local_world_size)
    plan = make_plan(config, cost_of(config), *sizes)
    if args.fit_micro_batch:
        if not isinstance(config, PretrainConfig):
            raise UserError("--fit-micro-batch measures pre-trainings only")
        fitted = ",".join(map(str, fit(config, plan, args.device)))
        config = load_training_config(args.config, {**args.cfg_options, "batch.micro_batch_sizes": f"[{fitted}]"})
        plan = make_plan(config, cost_of(config), *sizes)
        log.info("to train with it: --cfg-options 'batch.micro_batch_sizes=[%s]'", fitted)
    elif args.device:
        raise UserError("--device has an effect only with --fit-micro-batch, --measure and --hours")
    print(json.dumps(plan.to_dict(), indent=1) if args.json else table(plan))
    published = config.curriculum.published_speedup if isinstance(config, SupervisedConfig) else None
    if published is not None and not args.json:
        print(
            f"published speed-up by compute: {published:.2f}x; ours by counted FLOPs: {plan.nominal_speedup_flops:.2f}x "
            f"({plan.nominal_speedup_flops / published - 1:+.1%})"
        )


def cost_of(config: PretrainConfig | SupervisedConfig) -> ModelCost:
    """Returns what a plan needs to know about the network of a config."""
    if isinstance(config, PretrainConfig):
        return mae_cost(config.model, config.curriculum.decoder_warmup_fraction)
    from mae_et.tasks.supervised_model import timm_cost  # imports torch, which a pre-training's plan does not need

    return timm_cost(config)


def measured(args: argparse.Namespace, config: PretrainConfig | SupervisedConfig) -> None:
    """Prints the plan of a config with what was measured of it on this device.

    Raises:
        UserError: for options that do not go with a measurement, or too few hours.
    """
    given = [name for name in ("dataset_size", "local_world_size") if getattr(args, name) is not None]
    given += ["world_size"] if args.world_size != 1 else []
    given += ["fit_micro_batch"] if args.fit_micro_batch else []
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} does not go with a measurement (--measure, --hours or curriculum.budget_hours): "
            "that is made with one process on all images of data.train. Leave the option out"
        )
    from mae_et.tasks.pretrain import MAETask
    from mae_et.tasks.resolve import measure_plan
    from mae_et.tasks.supervised import SupervisedTask

    task_type = MAETask if isinstance(config, PretrainConfig) else SupervisedTask
    plan, found, limits = measure_plan(task_type, config, args.device)
    if args.json:
        print(json.dumps({**plan.to_dict(), "measurement": dataclasses.asdict(found), "limits": limits}, indent=1))
        return
    print(table(plan))
    print()
    print("\n".join([*measurement_table(found, plan), "", *limits]))


def measurement_table(found: Measurement, plan: Plan) -> list[str]:
    """Returns what was measured of the stages of a plan, as lines of text."""
    sizes = {stage.bandwidth: size_text(stage.input_size) for stage in plan.stages}
    columns = (
        ("bandwidth", lambda s: sizes[s.bandwidth]),
        ("batch", lambda s: str(s.global_batch_size)),
        ("images/s", lambda s: f"{s.images_per_second:.4g}"),
        ("loader alone", lambda s: f"{s.loader_images_per_second:.4g}"),
        ("step alone", lambda s: f"{s.step_images_per_second:.4g}"),
        ("loader busy", lambda s: "-" if s.loader_cpu_fraction is None else f"{s.loader_cpu_fraction:.0%}"),
        ("memory, GiB", lambda s: f"{s.memory_bytes / GIB:.2g}"),
        ("of", lambda s: "-" if s.memory_limit is None else f"{s.memory_limit / GIB:.3g}"),
    )
    workers = f"{found.num_workers} loader process{'' if found.num_workers == 1 else 'es'}"
    return [
        f"measured on {found.device} with {workers}, images/s:",
        *aligned(columns, found.stages),
        f"a checkpoint: {found.checkpoint_seconds:.2g} s; evaluations and pictures of this plan: {found.hook_seconds:.3g} s",
    ]


def fit(config: PretrainConfig, plan: Plan, device: str | None) -> tuple[int, ...]:
    """Returns the micro batch of each stage that fits on a device; None: CUDA if available."""
    import torch  # a plan alone does not need it

    from mae_et.tasks.micro_batch import fit_micro_batches

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible here")
    return fit_micro_batches(config, plan, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def table(plan: Plan) -> str:
    """Returns the plan as text."""
    columns = (
        ("stage", lambda s: str(s.index + 1)),
        ("bandwidth", lambda s: size_text(s.input_size)),
        *([("patches", lambda s: f"{s.num_visible}/{s.num_patches}")] if plan.stages[0].num_patches else []),
        ("by area", lambda s: f"{s.compute_fraction:.1%}"),
        ("by FLOPs", lambda s: f"{plan.flops_fraction(s):.1%}"),
        ("steps", lambda s: f"{s.num_steps:,}"),
        ("equiv. epochs", lambda s: f"{s.equivalent_epochs:.1f}"),
        ("real epochs", lambda s: f"{s.real_epochs:.1f}"),
        ("images shown", lambda s: f"{s.num_images:,}"),
        ("images read", lambda s: f"{s.num_fresh_images:,}"),
        ("batch", lambda s: f"{s.global_batch_size} = {plan.world_size} x {s.accum_steps} x {s.micro_batch_size}"),
        ("peak lr", lambda s: f"{s.lr:.2e}"),
        ("GFLOP/image", lambda s: f"{s.gflops_per_image:.3g}"),
    )
    return "\n".join(
        [
            *aligned(columns, plan.stages),
            "",
            f"{'patches: visible/all; ' if plan.stages[0].num_patches else ''}by area, by FLOPs: share of the compute; batch: "
            "images per step = processes x accumulation x micro batch; GFLOP: forward pass",
            f"steps: {plan.num_steps:,}",
            f"equivalent epochs: {plan.planned_equivalent_epochs:.2f} by area (budget: {plan.equivalent_epochs:g}), "
            f"{plan.equivalent_epochs_flops:.2f} by counted FLOPs",
            f"images shown: {plan.num_images:,} = {plan.real_epochs:.1f} real epochs of {plan.dataset_size:,} images",
            f"images read: {plan.num_fresh_images:,} = {plan.fresh_epochs:.1f} passes over the data",
            f"nominal speed-up against {plan.baseline_equivalent_epochs:g} epochs at full size: "
            f"{plan.nominal_speedup:.2f}x by area, {plan.nominal_speedup_flops:.2f}x by counted FLOPs",
            f"training compute: {plan.train_petaflops:,.4g} PFLOP (backward = {plan.backward_factor - 1} forward)",
            time_line(plan),
            *replay_lines(plan),
            *(f"note: {note}" for note in plan.notes),
        ]
    )


def aligned(columns: Sequence[tuple[str, Callable[[Any], str]]], items: Sequence[Any]) -> list[str]:
    """Returns a table with one row for each item, as lines of text.

    Args:
        columns: titles, and functions that return the cell of an item.
        items: of the rows.
    """
    rows = [[title for title, _ in columns], *([cell(item) for _, cell in columns] for item in items)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def time_line(plan: Plan) -> str:
    """Returns an estimate of the duration on known GPUs, as text."""
    seconds = {
        name: plan.train_petaflops * 1e3 / (ASSUMED_UTILIZATION * PEAK_TFLOPS[name]["bf16"] * plan.world_size)
        for name in ("A100-SXM4", "H100", "RTX 4090")
    }
    known = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
    return (
        f"estimated time if loading keeps up, at {ASSUMED_UTILIZATION:.0%} of the bf16 peak (assumed; the log of a run shows the "
        f"time left), on {plan.world_size} GPU{'s' if plan.world_size > 1 else ''}: {known}"
    )


def _duration(seconds: float) -> str:
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 3600:,.3g} h"


def replay_lines(plan: Plan) -> list[str]:
    """Returns the memory and the savings of the replay buffers as text; nothing if there are none."""
    if not plan.replay_bytes:
        return []
    buffers = [
        f"replay at bandwidth {size_text(stage.input_size)}: factor {stage.replay.factor}, {stage.replay.mode}; each process "
        f"holds {stage.replay.buffer_images:,} images in {stage.replay.buffer_bytes / GIB:.4g} GiB"
        for stage in plan.stages
        if stage.replay.is_on
    ]
    return [
        *buffers,
        f"memory for replay: {plan.replay_bytes / GIB:.4g} GiB per process, "
        f"{plan.replay_bytes * plan.local_world_size / GIB:.4g} GiB per machine with {plan.local_world_size} processes",
        f"load reduction by replay: {plan.num_images / plan.num_fresh_images:.2f}x",
    ]
