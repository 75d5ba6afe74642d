"""Training and evaluating with the libraries' own runner, and the configs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from mae_et.data.scene_files import write_ade20k, write_coco
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.export import write_backbone
from mae_et.models.vit import random_vit
from tests.conftest import REPOSITORY
from tests.downstream.conftest import needs_mm

pytestmark = [pytest.mark.mm, needs_mm]
CONFIGS = sorted(
    path for task in ("detection", "segmentation") for path in (REPOSITORY / "configs" / task).glob("*.py")
)
TASKS = {"detection": "coco/bbox_mAP", "segmentation": "mIoU"}
SHORT = [
    "train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.logger.interval=1",
    "default_hooks.checkpoint.interval=1", "default_hooks.visualization.interval=1", "train_dataloader.batch_size=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Generated scenes in both layouts and a backbone for the demo configs."""
    folder = tmp_path_factory.mktemp("mm")
    write_coco(folder / "coco", 4, 2, (64, 64), 0)
    write_ade20k(folder / "ade", 4, 2, (64, 64), 0)
    model = random_vit(64, patch_size=8, embed_dim=128, depth=4, num_heads=4)
    write_backbone(model.state_dict(), folder / "backbone.safetensors", "timm", {"num_heads": "4", "seed": "5"})
    return folder


def tool(data, *arguments, launch=()):
    environment = {
        **os.environ, "MAE_ET_DEMO_COCO": str(data / "coco"), "MAE_ET_DEMO_ADE": str(data / "ade"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, *launch, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module", params=TASKS)
def trained(request, data):
    """A run of two steps."""
    task, work_dir = request.param, data / request.param
    done = tool(
        data, "tools/train.py", f"configs/{task}/demo.py", "--work-dir", work_dir, "--backbone", data / "backbone.safetensors",
        "--amp", "--cfg-options", *SHORT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return task, work_dir, done


def test_train__summary_pictures_and_curves(trained):
    task, work_dir, done = trained
    summary = json.loads((work_dir / "summary.json").read_text())
    assert summary["num_steps"] == 2
    assert 0 <= summary["metrics"][TASKS[task]] <= 100
    assert summary["last_loss"] > 0
    assert summary["images_per_second"] > 0
    assert summary["peak_memory_mb"] > 100
    assert summary["backbone"]["file"] == "backbone.safetensors"
    assert summary["backbone"]["seed"] == "5"
    assert len(list(work_dir.rglob("vis_image/*.png"))) >= 1
    assert len(list(work_dir.rglob("events.out.tfevents*"))) == 1
    assert "float32 in place of mixed precision" in done.stderr or torch.cuda.is_available()


def test_train__resume_goes_on(trained, data, tmp_path):
    """Also from a folder that was moved, and without the backbone file, which may be gone."""
    task, work_dir, _ = trained
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", work_dir, moved], check=True)
    (moved / "iter_1.pth").unlink()
    done = tool(
        data, "tools/train.py", f"configs/{task}/demo.py", "--work-dir", moved, "--resume", "--cfg-options", *SHORT,
        "train_cfg.max_iters=3", "optim_wrapper.optimizer.lr=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {moved / 'iter_2.pth'}" in done.stderr
    summary = json.loads((moved / "summary.json").read_text())
    assert (summary["num_steps"], summary["num_steps_this_process"]) == (3, 1)


def test_test__same_metric_as_in_training(trained, data, tmp_path):
    task, work_dir, _ = trained
    done = tool(
        data, "tools/test.py", f"configs/{task}/demo.py", work_dir / "iter_2.pth", "--work-dir", tmp_path,
        "--cfg-options", "default_hooks.visualization.draw=False",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "test_summary.json").read_text())["metrics"][TASKS[task]]
    expected = json.loads((work_dir / "summary.json").read_text())["metrics"][TASKS[task]]
    assert found == pytest.approx(expected, abs=1e-3)


def test_test__wrong_checkpoint_stops(trained, data, tmp_path):
    task, work_dir, _ = trained
    other = next(name for name in TASKS if name != task)
    done = tool(data, "tools/test.py", f"configs/{other}/demo.py", work_dir / "iter_2.pth", "--work-dir", tmp_path)
    assert done.returncode == 1
    assert "missing: " in done.stderr
    assert "unexpected: " in done.stderr


def test_test__several_scales_and_flips(data, trained, tmp_path):
    task, work_dir, _ = trained
    if task != "segmentation":
        pytest.skip("tta is configured for segmentation alone")
    done = tool(
        data, "tools/test.py", f"configs/{task}/demo.py", work_dir / "iter_2.pth", "--tta", "--work-dir", tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mIoU: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_train__two_processes(data, tmp_path, task):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = tool(
        data, "tools/train.py", f"configs/{task}/demo.py", "--launcher", "pytorch", "--work-dir", tmp_path, "--cfg-options",
        *SHORT, launch=launch,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "summary.json").read_text())["num_processes"] == 2


def test_train__wrong_backbone_stops(data, tmp_path):
    state = random_vit(64, patch_size=8, embed_dim=64, depth=4, num_heads=4).state_dict()
    write_backbone(state, tmp_path / "narrow.safetensors", "timm", {"num_heads": "4"})
    done = tool(
        data, "tools/train.py", "configs/detection/demo.py", "--work-dir", tmp_path, "--backbone", tmp_path / "narrow.safetensors"
    )  # fmt: skip
    assert done.returncode == 1
    assert "embed_dim = 64, not 128" in done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config__builds(path):
    """Every config reads and builds its model, its optimizer groups cover it, and its header says what it has to."""
    from mmdet.registry import MODELS as DETECTORS
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS as SEGMENTORS

    from downstream import run
    from downstream.layer_decay import LayerDecayConstructor

    config = run.read_config(path)
    run.prepare(config)
    init_default_scope(config.default_scope)
    with torch.device("meta"):
        model = {"mmdet": DETECTORS, "mmseg": SEGMENTORS}[config.default_scope].build(config.model)
    assert config.optim_wrapper.constructor == "LayerDecayConstructor"
    groups = LayerDecayConstructor(
        {"optimizer": config.optim_wrapper.optimizer}, config.optim_wrapper.get("paramwise_cfg")
    ).groups(model)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    assert config.auto_scale_lr.enable
    assert all(word in path.read_text() for word in ("Command:", "Hardware:", "Expected:", "Source:"))


def test_config__vitdet_recipe():
    from downstream import run

    config = run.read_config(REPOSITORY / "configs/detection/mask_rcnn_vitdet_base_coco_100e.py")
    assert config.train_cfg.max_iters == 184375
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 64
    assert list(config.model.backbone.global_blocks) == [2, 5, 8, 11]
    assert config.model.test_cfg.rcnn.nms.type == "nms"


def test_read_config__faults(tmp_path):
    from downstream import run

    with pytest.raises(ConfigError, match="no such file"):
        run.read_config(tmp_path / "x.py")
    (tmp_path / "x.py").write_text("model = dict(")
    with pytest.raises(ConfigError, match="SyntaxError"):
        run.read_config(tmp_path / "x.py")
    (tmp_path / "x.py").write_text("a = 1")
    with pytest.raises(ConfigError, match="no model"):
        run.read_config(tmp_path / "x.py")
    (tmp_path / "x.py").write_text("model = dict(type='A')\ndefault_scope = 'mmpose'")
    with pytest.raises(UserError, match="mmpose"):
        run.read_config(tmp_path / "x.py")


def test_set_backbone__faults(tmp_path):
    from downstream import run

    config = run.read_config(REPOSITORY / "configs/detection/demo.py")
    with pytest.raises(CheckpointError, match="no such backbone"):
        run.set_backbone(config, tmp_path / "x")
    (tmp_path / "x").touch()
    config.model.backbone = {"type": "mmdet.ResNet", "depth": 50}
    with pytest.raises(UserError, match="load in silence"):
        run.set_backbone(config, tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"classes": ["a", "b"]}', "lists 2 classes"),
        ("{}", "does not list"),
        (None, "does not list"),
        ("18", None),
    ],
)
def test_classes_file_dataset__faults(tmp_path, content, said):
    from downstream.segmentation.dataset import ClassesFileDataset
    from mae_et.errors import DataError

    write_ade20k(tmp_path, 2, 0, (32, 32), 0)
    path = tmp_path / "classes.json"
    num_classes = 18
    if said is None:  # a class fewer than the masks have
        values = json.loads(path.read_text())
        num_classes = 3
        path.write_text(json.dumps({"classes": values["classes"][:3]}))
        said = r"00000000\.png has label"
    elif content is None:
        path.unlink()
    else:
        path.write_text(content)
    prefix = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    with pytest.raises(DataError, match=said):
        ClassesFileDataset(num_classes, str(tmp_path), data_prefix=prefix, pipeline=[])
