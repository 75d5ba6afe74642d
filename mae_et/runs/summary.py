"""Summarizes what a finished training cost and reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae_et.curriculum.plan import Plan
from mae_et.engine.distributed import World
from mae_et.engine.loggers import Loggers
from mae_et.engine.progress import Progress, StageStats
from mae_et.models.sizes import area_ratio
from mae_et.runs.provenance import peak_memory_mb
from mae_et.runs.records import StageSummary

STAGE_SCALARS = (
    "images_per_second", "waiting_fraction", "tflops_per_second", "mfu", "speed_over_full_size",
    "speed_over_ideal_by_area", "speed_over_ideal_by_flops",
)  # fmt: skip


def summarize(
    plan: Plan, progress: Progress, metrics: list[dict[str, Any]], world: World, peak_tflops: float | None
) -> dict[str, Any]:
    """Returns the fields that all trainings put into their `TrainingSummary`.

    Speed-ups are measured against the images/s of the run's own stage at full image size; without such a stage they are
    None. `speedup_against_baseline` is the time that `baseline_equivalent_epochs` would take at that speed, divided by
    the time of the run.

    Args:
        plan, progress, metrics, world: of the run.
        peak_tflops: of one device; None: unknown, and then `mfu` (model FLOPs utilization) is None.
    """
    stats = [progress.stages[stage.index] for stage in plan.stages]
    full = plan.stages[-1].input_size == plan.image_size
    full_rate = stats[-1].num_images / stats[-1].seconds if full else None
    stages = [_summarize_stage(plan, i, stats[i], full_rate, world, peak_tflops) for i in range(len(plan.stages))]
    petaflops = sum(stage.petaflops for stage in stages)
    losses = [line["loss"] for line in metrics if "loss" in line]
    baseline_images = plan.baseline_equivalent_epochs * plan.dataset_size
    speedup = baseline_images / full_rate / progress.seconds if full_rate else None
    return {
        "seconds": progress.seconds,
        "peak_memory_mb": peak_memory_mb(),
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
        **_utilization(petaflops, progress.seconds, world, peak_tflops),
        "peak_tflops": peak_tflops,
        "stages": stages,
        "baseline_equivalent_epochs": plan.baseline_equivalent_epochs,
        "nominal_speedup": plan.nominal_speedup,
        "nominal_speedup_flops": plan.nominal_speedup_flops,
        "speedup_against_baseline": speedup,
        "speedup_over_nominal": speedup / plan.nominal_speedup if speedup else None,
        "speedup_over_nominal_flops": speedup / plan.nominal_speedup_flops if speedup else None,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "bad_images": len(progress.bad_images),
        "skipped_steps": progress.num_skipped,
        "lost_entries": {name: number for name, number in progress.lost_entries.items() if number},
        "world_size": world.size,
    }


def _summarize_stage(
    plan: Plan, index: int, stats: StageStats, full_rate: float | None, world: World, peak_tflops: float | None
) -> StageSummary:
    planned, rate = plan.stages[index], stats.num_images / stats.seconds
    petaflops = plan.backward_factor * planned.gflops_per_image * stats.num_images / 1e6
    by_area = area_ratio(plan.image_size, planned.input_size)
    by_flops = plan.stages[-1].gflops_per_image / planned.gflops_per_image if full_rate else None
    speed = rate / full_rate if full_rate else None
    return StageSummary(
        bandwidth=planned.bandwidth,
        input_size=planned.input_size,
        num_steps=planned.num_steps,
        num_images=stats.num_images,
        num_fresh_images=planned.num_fresh_images,
        load_reduction=planned.num_images / planned.num_fresh_images,
        seconds=stats.seconds,
        images_per_second=rate,
        waiting_fraction=stats.waiting_seconds / stats.seconds,
        petaflops=petaflops,
        **_utilization(petaflops, stats.seconds, world, peak_tflops),
        speed_over_full_size=speed,
        ideal_by_area=by_area,
        ideal_by_flops=by_flops,
        speed_over_ideal_by_area=speed / by_area if speed else None,
        speed_over_ideal_by_flops=speed / by_flops if speed and by_flops else None,
    )


def _utilization(petaflops: float, seconds: float, world: World, peak_tflops: float | None) -> dict[str, float | None]:
    tflops = petaflops * 1e3 / seconds
    return {"tflops_per_second": tflops, "mfu": tflops / (peak_tflops * world.size) if peak_tflops else None}


def write_stage_scalars(summary: Mapping[str, Any], plan: Plan, work_dir: Path, loggers: Sequence[str]) -> None:
    """Adds the speed of each stage to TensorBoard and CSV at the last step of the stage.

    The loggers with a server are closed by then.
    """
    local = [name for name in loggers if name in ("tensorboard", "csv")]
    writer = Loggers(local, work_dir, plan.num_steps, {}, {})
    for planned, stage in zip(plan.stages, summary["stages"], strict=True):
        scalars = {f"stage/{name}": stage[name] for name in STAGE_SCALARS}
        writer.add_scalars(scalars, planned.first_step + planned.num_steps)
    writer.close()
