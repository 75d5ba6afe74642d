"""A verdict on a backbone by labelled images: fine-tuning or a probe, as the config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mae_et.config.schema import ClassifyConfig
from mae_et.tasks.finetune import FinetuneTask
from mae_et.tasks.knn import judge_by_knn
from mae_et.tasks.linear_probe import AttentiveProbeTask, LinearProbeTask
from mae_et.tasks.linear_sweep import judge_by_sweep
from mae_et.tasks.run import TrainingTask, run_training

TRAINED: dict[str, type[TrainingTask]] = {
    "finetune": FinetuneTask,
    "linear_probe": LinearProbeTask,
    "attentive_probe": AttentiveProbeTask,
}


def classify(
    config: ClassifyConfig, work_dir: str | Path, resume: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Judges a backbone by the protocol of the config.

    Args:
        config: as checked.
        work_dir: gets config.py, environment.json, summary.json, per_class.csv, confusion.csv, confusion.png; from a
            training also plan.json, run.log, metrics.jsonl, tensorboard/, checkpoints/ and classifier.safetensors.
        resume: continue from the newest checkpoint there. kNN and the sweep have none: they start again.
        device: "cpu" or "cuda"; None: CUDA where available.
    Returns:
        The summary, as in summary.json: top1, top5 (with more than five classes), the interval of top1, and the cost.
        Empty on other processes than the main one.
    Raises:
        UserError: what the user can fix; see errors.py.
    """
    if config.protocol == "knn":
        return judge_by_knn(config, work_dir, resume, device)
    if config.protocol == "linear_sweep":
        return judge_by_sweep(config, work_dir, resume, device)
    return run_training(TRAINED[config.protocol], config, work_dir, resume, device)
