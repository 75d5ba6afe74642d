"""Short runs of the demo configs on generated scenes, for the tests of the plug-ins."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mae_et.data.scenes.files import write_ade20k, write_coco
from mae_et.models.vit import random_vit
from mae_et.storage.backbone import write_backbone
from tests.conftest import REPOSITORY, load_tool
from tests.processes import run_command

METRICS = {"detection": "coco/bbox_mAP", "segmentation": "mIoU"}
SHORT: dict[str, Any] = {
    "train_cfg.max_iters": 2,
    "train_cfg.val_interval": 2,
    "default_hooks.logger.interval": 1,
    "default_hooks.checkpoint.interval": 1,
    "default_hooks.visualization.interval": 1,
    "train_dataloader.batch_size": 2,
    "log_processor.window_size": 1,
}
VIT = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}  # that of the demo configs
METADATA = {"num_heads": "4", "seed": "5", "mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"}


def write_data(folder: Path) -> Path:
    """Writes scenes in both layouts and a backbone."""
    write_coco(folder / "coco", 4, 2, (64, 64), 0)
    write_ade20k(folder / "ade", 4, 2, (64, 64), 0)
    write_backbone(random_vit(64, **VIT).state_dict(), folder / "backbone.safetensors", "timm", METADATA)
    return folder


def environment(data: Path) -> dict[str, str]:
    return {"MAE_ET_DEMO_COCO": str(data / "coco"), "MAE_ET_DEMO_ADE": str(data / "ade"), "OMP_NUM_THREADS": "1"}


def main(data: Path, name: str, *arguments: object) -> Any:
    """Runs a tool in this process, which saves the imports."""
    with patch.dict(os.environ, environment(data)):
        script = load_tool(name)
        return script.main(script.make_parser().parse_args([*map(str, arguments)]))


def words(options: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in options.items()]


def tool(data: Path, script: str, *arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Runs tools/SCRIPT.py as a user does, in a process that has imported the packages already."""
    return run_command(script, *arguments, cwd=cwd, **environment(data))


def read(data: Path, task: str, work_dir: Path, **changes: Any) -> Any:
    """Reads a demo config for a short run in this process; `changes` has "__" for "."."""
    from downstream import run

    options = {**SHORT, **{key.replace("__", "."): value for key, value in changes.items()}}
    with patch.dict(os.environ, environment(data)):
        config = run.read_config(REPOSITORY / "configs" / task / "demo.py", options)
    config.work_dir, config.experiment_name = (
        str(work_dir),
        uuid.uuid4().hex,
    )  # or two runs share what mmengine keeps by name
    return config


def train(data: Path, task: str, work_dir: Path, **changes: Any) -> dict[str, Any]:
    """Trains in this process; returns the summary."""
    from downstream import run

    config = read(data, task, work_dir, **changes)
    run.prepare(config)
    run.train(config)
    return json.loads((work_dir / "summary.json").read_text())


def untrained(data: Path, task: str, path: Path, classes: list[str], options: dict[str, Any] | None = None) -> Any:
    """Writes a checkpoint of the demo model with random weights; returns the model with its config, as the libraries want it."""
    import torch
    from mmengine.registry import MODELS, init_default_scope

    from downstream import run

    with patch.dict(os.environ, environment(data)):
        config = run.read_config(REPOSITORY / f"configs/{task}/demo.py", options)
    run.prepare(config)
    init_default_scope(config.default_scope)
    config.model.backbone["init_cfg"] = None
    torch.manual_seed(3)
    model = MODELS.build(config.model)
    model.init_weights()
    torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": {"classes": classes}}}, path)
    model.cfg = config
    return model.eval()


def losses(work_dir: Path) -> dict[int, float]:
    """Returns the loss of each logged step; a later run's goes before an earlier one's."""
    found: dict[int, float] = {}
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found.update({line["step"]: line["loss"] for line in lines if "loss" in line})
    return found
