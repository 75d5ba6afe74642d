"""The folder of a run: opened or resumed, described, summed up. The same for pre-training and classification."""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import mae_et
from mae_et.config.files import load_config, save_config
from mae_et.config.schema import RESUME_FREE, changed_keys, from_dict, to_dict
from mae_et.curriculum.plan import Plan
from mae_et.data.sources.source import ImageSource
from mae_et.engine.distributed import World
from mae_et.engine.progress import Progress, StageStats
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.storage.checkpoint import atomic_path, list_checkpoints, load_newest

log = logging.getLogger(__name__)


def open_run(
    config: Any,
    kind: str,
    work_dir: Path,
    resume: bool,
    source: ImageSource,
    plan: Plan,
    world: World,
    metadata: Mapping[str, str],
    weights: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Makes or reopens the folder of a run and writes config.py, plan.json and environment.json into it.

    Args:
        config: a dataclass of config.py.
        kind: "pretrain" or "classify".
        work_dir: the folder.
        resume: go on from its newest whole checkpoint.
        source: the training images.
        plan: of this run.
        world: this process among the others.
        metadata: what a backbone exported from a checkpoint of this run says about itself.
        weights: a digest of the weights that the run starts from, where another file would make it another run.
    Returns:
        What each checkpoint has to hold to be recognised, and the checkpoint to resume from (None: from the start).
    Raises:
        UserError: if the folder holds a run and resume is off.
        CheckpointError: if there is nothing to resume, or it was another run, naming what differs.
    """
    identity = {
        "kind": kind,
        "config": to_dict(config),
        "metadata": dict(metadata),
        "data_fingerprint": _fingerprint(source),
        "dataset_size": len(source),
        "num_steps": plan.num_steps,
        "version": mae_et.__version__,
        "initial_weights": weights,
    }
    state = _find_state(work_dir, resume, identity, type(config))
    # Every process has looked before the main one writes.
    steps = world.gather(None if state is None else state["progress"]["step"])
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the processes found checkpoints of different steps ({steps}) in {work_dir}: --work-dir must be on a disk that "
            "all machines share"
        )
    if world.is_main:
        make_work_dir(config, work_dir, world)
        _clean(work_dir, keep_metrics=state is not None)
        write_json(work_dir / "plan.json", plan.to_dict())
    return identity, state


def check_unused(config: Any, work_dir: Path, resume: bool) -> None:
    """Refuses the folder of another run, for a run without checkpoints.

    Args:
        config: of this run.
        work_dir: the folder.
        resume: whether a finished run of the same config may be repeated.
    Raises:
        UserError: if the folder holds a training run, a run of another config, or a finished run and resume is off.
    """
    other = "choose another --work-dir"
    if list_checkpoints(work_dir / "checkpoints"):
        raise UserError(f"{work_dir} holds a training run: {other}")
    finished = (work_dir / "summary.json").exists()
    if (work_dir / "config.py").exists():
        try:
            before = to_dict(load_config(type(config), work_dir / "config.py"))
        except ConfigError as error:
            raise UserError(f"{work_dir} holds a run of another kind or version: {other}") from error
        if changes := changed_keys(before, to_dict(config)):
            raise UserError(
                f"{work_dir} holds a run with another config: {other}\n" + "\n".join(f"  - {c}" for c in changes)
            )
    elif finished:
        raise UserError(f"{work_dir} holds the results of another run (summary.json): {other}")
    if finished and not resume:
        raise UserError(f"{work_dir} holds a finished run: {other}, or repeat the run with --resume")


def make_work_dir(config: Any, work_dir: Path, world: World) -> None:
    """Makes the folder and writes config.py and environment.json into it."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with atomic_path(work_dir / "config.py") as temporary:
        save_config(config, temporary, "The resolved config of this run.")
    write_json(work_dir / "environment.json", _environment(world))


def summarize(
    plan: Plan, progress: Progress, metrics: list[dict[str, Any]], world: World, peak_tflops: float | None
) -> dict[str, Any]:
    """Returns what a finished run cost and reached.

    Speed-ups are measured where a stage at full image size gives the images/s to compare with, else None.
    `speedup_against_baseline` is the time that `baseline_equivalent_epochs` would take at that speed over the time taken.

    Args:
        plan, progress, metrics, world: of the run.
        peak_tflops: of one of its devices; None: not known, and then `mfu` (model FLOPs utilisation) is None.
    """
    stats = [progress.stages[stage.index] for stage in plan.stages]
    full = plan.stages[-1].bandwidth == plan.image_size
    full_rate = stats[-1].num_images / stats[-1].seconds if full else None
    stages = [_summarize_stage(plan, i, stats[i], full_rate, world, peak_tflops) for i in range(len(plan.stages))]
    petaflops = sum(stage["petaflops"] for stage in stages)
    losses = [line["loss"] for line in metrics if "loss" in line]
    baseline_images = plan.baseline_equivalent_epochs * plan.dataset_size
    speedup = baseline_images / full_rate / progress.seconds if full_rate else None
    return {
        "status": "finished",
        "seconds": progress.seconds,
        "num_steps": plan.num_steps,
        "num_images": sum(stage.num_images for stage in stats),
        "num_fresh_images": plan.num_fresh_images,
        "refilled_images": progress.refilled_images,
        "refill_seconds": progress.refill_seconds,
        "load_reduction": plan.num_images / (plan.num_fresh_images + progress.refilled_images),
        "dataset_size": plan.dataset_size,
        "equivalent_epochs": plan.planned_equivalent_epochs,
        "real_epochs": plan.real_epochs,
        "train_petaflops": petaflops,
        "images_per_second": sum(stage.num_images for stage in stats) / progress.seconds,
        "waiting_fraction": sum(stage.waiting_seconds for stage in stats) / progress.seconds,
        **_utilisation(petaflops, progress.seconds, world, peak_tflops),
        "peak_tflops": peak_tflops,
        "stages": stages,
        "baseline_equivalent_epochs": plan.baseline_equivalent_epochs,
        "nominal_speedup": plan.nominal_speedup,
        "nominal_speedup_flops": plan.nominal_speedup_flops,
        "speedup_against_baseline": speedup,
        "speedup_over_nominal": speedup / plan.nominal_speedup if speedup else None,
        "speedup_over_nominal_flops": speedup / plan.nominal_speedup_flops if speedup else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "bad_images": len(progress.bad_images),
        "skipped_steps": progress.num_skipped,
        "world_size": world.size,
    }


def _summarize_stage(
    plan: Plan, index: int, stats: StageStats, full_rate: float | None, world: World, peak_tflops: float | None
) -> dict[str, Any]:
    planned, rate = plan.stages[index], stats.num_images / stats.seconds
    petaflops = plan.backward_factor * planned.gflops_per_image * stats.num_images / 1e6
    by_area = (plan.image_size / planned.bandwidth) ** 2
    by_flops = plan.stages[-1].gflops_per_image / planned.gflops_per_image if full_rate else None
    speed = rate / full_rate if full_rate else None
    return {
        "bandwidth": planned.bandwidth,
        "num_steps": planned.num_steps,
        "num_images": stats.num_images,
        "num_fresh_images": planned.num_fresh_images,
        "load_reduction": planned.num_images / planned.num_fresh_images,
        "seconds": stats.seconds,
        "images_per_second": rate,
        "waiting_fraction": stats.waiting_seconds / stats.seconds,
        "petaflops": petaflops,
        **_utilisation(petaflops, stats.seconds, world, peak_tflops),
        "speed_over_full_size": speed,
        "ideal_by_area": by_area,
        "ideal_by_flops": by_flops,
        "speed_over_ideal_by_area": speed / by_area if speed else None,
        "speed_over_ideal_by_flops": speed / by_flops if speed and by_flops else None,
    }


def _utilisation(petaflops: float, seconds: float, world: World, peak_tflops: float | None) -> dict[str, float | None]:
    tflops = petaflops * 1e3 / seconds
    return {"tflops_per_second": tflops, "mfu": tflops / (peak_tflops * world.size) if peak_tflops else None}


STAGE_SCALARS = (
    "images_per_second", "waiting_fraction", "tflops_per_second", "mfu", "speed_over_full_size",
    "speed_over_ideal_by_area", "speed_over_ideal_by_flops",
)  # fmt: skip


def write_stage_scalars(summary: Mapping[str, Any], plan: Plan, work_dir: Path) -> None:
    """Adds each stage's speed to TensorBoard, at the stage's last step; what is not known (None) is left out."""
    with SummaryWriter(str(work_dir / "tensorboard")) as writer:
        for planned, stage in zip(plan.stages, summary["stages"], strict=True):
            for name in STAGE_SCALARS:
                if stage[name] is not None:
                    writer.add_scalar(f"stage/{name}", stage[name], planned.first_step + planned.num_steps)


def describe_model(model: nn.Module) -> str:
    """Returns the model's class and size in words."""
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"


def spread(num: int, most: int) -> np.ndarray:
    """Returns at most `most` indices, evenly spread over range(num)."""
    return np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(np.int64))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def _find_state(work_dir: Path, resume: bool, identity: Mapping[str, Any], kind: type) -> dict[str, Any] | None:
    """Returns the checkpoint to resume from, if there is one; refuses what must not be overwritten."""
    checkpoints = work_dir / "checkpoints"
    if (work_dir / "summary.json").exists() and not list_checkpoints(checkpoints):
        raise UserError(f"{work_dir} holds the results of another run (summary.json): choose another --work-dir")
    if not resume:
        if list_checkpoints(checkpoints):
            raise UserError(f"{work_dir} holds a run already: --resume goes on with it; or choose another --work-dir")
        return None
    if not work_dir.is_dir():
        raise CheckpointError(f"no run to resume: {work_dir} does not exist; start without --resume")
    if not list_checkpoints(checkpoints):
        log.warning("%s holds no checkpoint yet: starting from the first step", work_dir)
        return None
    path, state = load_newest(checkpoints, log.warning)
    if state.get("kind") != identity["kind"]:
        raise CheckpointError(f"{path} is not from a {identity['kind']} run: name another --work-dir")
    # In classification mixup, drop path and the probe's BatchNorm see the micro batch.
    micro = {"batch.micro_batch_size", "batch.micro_batch_sizes"}
    free = RESUME_FREE - (micro if identity["kind"] == "classify" else set())
    try:
        before = to_dict(from_dict(kind, state["config"]))  # a key that is younger than the checkpoint had its default
    except ConfigError as error:
        raise CheckpointError(
            f"{path} holds a config that this version cannot read: {'; '.join(error.faults)}. Resume with mae_et "
            f"{state.get('version', 'of its time')}"
        ) from error
    changes = changed_keys(before, identity["config"], free)
    if state["data_fingerprint"] != identity["data_fingerprint"]:
        changes.append(
            f"data.train: other images ({state['dataset_size']} before, {identity['dataset_size']} now, or other names)"
        )
    if state.get("initial_weights", identity["initial_weights"]) != identity["initial_weights"]:
        changes.append("backbone: other weights")
    if changes:
        hint = " (model.init_from takes its weights)" if identity["kind"] == "pretrain" else ""
        raise CheckpointError(
            f"{path} was made with another config:\n" + "\n".join(f"  - {change}" for change in changes) + "\n"
            f"Undo these changes to resume, or start a new run in another --work-dir{hint}"
        )
    log.info("resuming from %s", path)
    return state


def _clean(work_dir: Path, keep_metrics: bool) -> None:
    """Makes the run folder and removes what an earlier start left half done."""
    (work_dir / "checkpoints").mkdir(exist_ok=True)
    for partial_file in (*work_dir.glob(".*.writing"), *work_dir.glob("checkpoints/.*.writing")):
        partial_file.unlink()
    if not keep_metrics:
        (work_dir / "metrics.jsonl").unlink(missing_ok=True)
        for events in work_dir.glob("tensorboard/events.*"):
            events.unlink()


def _fingerprint(source: ImageSource) -> list[str]:
    """Names that tell a data set from another one, wherever it lies."""
    return [Path(source.name(int(i))).name for i in spread(len(source), 64)] + [str(len(source))]


def _environment(world: World) -> dict[str, Any]:
    gpu = world.device.type == "cuda"
    return {
        "command": sys.argv,
        "mae_et": mae_et.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "cuda": torch.version.cuda if gpu else None,
        "num_threads": torch.get_num_threads(),
        "world_size": world.size,
    }
