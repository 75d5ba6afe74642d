"""Training and evaluating with the runner, as a user does."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.models.vit import random_vit
from mae_et.report.scan import discover
from mae_et.storage.backbone import read_backbone, write_backbone
from tests.conftest import REPOSITORY
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import METRICS, SHORT, environment, losses, main, read, tool, words, write_data
from tests.processes import start_command

pytestmark = [pytest.mark.mm, needs_mm]
LONGER = {**SHORT, "train_cfg.max_iters": 4, "model.backbone.drop_path_rate": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mm"))


@pytest.fixture(scope="module", params=METRICS)
def trained(request, data):
    """A run of four steps with validations after the second and the last, started from another folder."""
    task, work_dir = request.param, data / request.param
    done = tool(
        data, "train", REPOSITORY / f"configs/{task}/demo.py", "--work-dir", request.param,
        "--backbone", "backbone.safetensors", "--amp", "--cfg-options", *words(LONGER),
        "default_hooks.checkpoint.max_keep_ckpts=3", cwd=data,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return task, work_dir, done


def test_train__summary(trained, data):
    task, work_dir, done = trained
    summary = json.loads((work_dir / "summary.json").read_text())
    assert summary["num_steps"] == 4
    assert [entry["step"] for entry in summary["all_metrics"]] == [2, 4]
    assert 0 <= summary["metrics"][METRICS[task]] <= 100
    curve = losses(work_dir)
    assert (summary["first_loss"], summary["last_loss"]) == pytest.approx((curve[1], curve[4]), abs=1e-3)
    assert summary["images_per_second"] == pytest.approx(6 / summary["train_seconds"])
    assert summary["seconds"] > summary["train_seconds"]
    assert summary["peak_memory_mb"] > 100
    assert summary["initial_weights"]["file"] == str((data / "backbone.safetensors").resolve())
    digest = hashlib.sha256((data / "backbone.safetensors").read_bytes()).hexdigest()
    assert summary["initial_weights"]["sha256"] == digest
    assert summary["initial_weights"]["metadata"]["seed"] == "5"
    known = read_backbone(data / "backbone.safetensors")[1]["encoder_sha256"]
    assert summary["initial_weights"]["encoder_sha256"] == known
    (run,) = discover([work_dir])  # as the report reads it
    assert (run.kind, run.weights.encoder_sha256) == (task, known)
    environment = json.loads((work_dir / "environment.json").read_text())
    assert (environment["device"], environment["world_size"]) == (run.environment.device, 1)
    assert environment["command"][:2] == ["mae-et", "train"]
    assert (summary["kind"], summary["max_iters"], summary["seed"], summary["num_val"]) == (task, 4, 0, 2)
    assert summary["data"] == {"detection": "coco", "segmentation": "ade"}[task]
    assert "float32 in place of mixed precision" in done.stderr or torch.cuda.is_available()


def test_train__files(trained):
    task, work_dir, _ = trained
    pictures = list(work_dir.rglob("vis_image/*.png"))
    assert len(pictures) >= 2
    assert all(picture.stat().st_size > 1000 for picture in pictures)
    (folder,) = {path.parent for path in work_dir.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
    assert len(events.Scalars(METRICS[task])) == 2
    saves = {path.name.split("_iter")[0] for path in work_dir.glob("*.pth")}
    assert "best_" + METRICS[task].replace("/", "_") in saves
    assert len(list(work_dir.glob("iter_*.pth"))) == 3


def test_train__a_resumed_run_has_the_same_losses(trained, data, tmp_path, caplog):
    """From a folder that was moved and lost its newest checkpoints; the backbone file may be gone."""
    task, work_dir, _ = trained
    moved = tmp_path / "moved"
    shutil.copytree(work_dir, moved)
    (moved / "iter_3.pth").unlink()
    (moved / "iter_4.pth").unlink()
    for folder in moved.glob("*/vis_data"):
        shutil.rmtree(folder)
    caplog.set_level("INFO")
    main(
        data, "train", REPOSITORY / f"configs/{task}/demo.py", "--work-dir", moved, "--resume", "--backbone", "gone.safetensors",
        "--cfg-options", *words(LONGER),
    )  # fmt: skip
    assert f"resuming from {moved / 'iter_2.pth'}" in caplog.text
    expected = losses(work_dir)
    assert losses(moved) == {3: expected[3], 4: expected[4]}
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (work_dir, moved))
    assert (after["num_steps"], after["num_steps_this_process"]) == (4, 2)
    for key in ("first_loss", "last_loss", "initial_weights", "metrics"):
        assert after[key] == before[key], key
    # A checkpoint is saved before the validation of its step.
    assert [entry["step"] for entry in after["all_metrics"]] == [4]


def test_test__same_metric_as_in_training(trained, data, tmp_path):
    task, work_dir, _ = trained
    main(
        data, "test", REPOSITORY / f"configs/{task}/demo.py", work_dir / "iter_4.pth", "--work-dir", tmp_path,
        "--show-dir", tmp_path / "shown",
    )  # fmt: skip
    found = json.loads((tmp_path / "test_summary.json").read_text())
    expected = json.loads((work_dir / "summary.json").read_text())
    assert found["metrics"][METRICS[task]] == pytest.approx(expected["metrics"][METRICS[task]], abs=1e-3)
    for key in ("initial_weights", "weights_sha256", "kind", "data", "seed", "num_val"):
        assert found[key] == expected[key], key
    assert (found["tta"], found["checkpoint"]) == (False, "iter_4.pth")
    assert len(list((tmp_path / "shown").rglob("*.png"))) == 2


def test_test__wrong_checkpoint_stops(trained, data, tmp_path):
    from downstream import run

    task, work_dir, _ = trained
    other = next(name for name in METRICS if name != task)
    config = read(data, other, tmp_path)
    run.prepare(config)
    with pytest.raises(CheckpointError, match=r"missing: (.|\n)*unexpected: "):
        run.evaluate(config, work_dir / "iter_4.pth")
    with pytest.raises(CheckpointError, match="goes to --backbone"):
        run.evaluate(config, data / "backbone.safetensors")
    (tmp_path / "x.pth").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run.evaluate(config, tmp_path / "x.pth")


def test_test__several_scales_and_flips(data, trained, tmp_path):
    from downstream import run

    task, work_dir, _ = trained
    config = read(data, task, tmp_path)
    run.prepare(config)
    if task == "detection":
        with pytest.raises(ConfigError, match="tta_model"):
            run.evaluate(config, work_dir / "iter_4.pth", tta=True)
    else:
        assert 0 <= run.evaluate(config, work_dir / "iter_4.pth", tta=True)["mIoU"] <= 100
        found = json.loads((tmp_path / "test_summary_tta.json").read_text())
        expected = json.loads((work_dir / "summary.json").read_text())
        assert found["tta"] is True
        for key in ("weights_sha256", "initial_weights", "kind", "data"):
            assert found[key] == expected[key], key


def test_set_start__which_checkpoint(data, tmp_path):
    from downstream import run

    config = read(data, "detection", tmp_path)
    assert not run.set_start(config, None)
    assert not run.set_start(config, "auto")
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        run.set_start(config, str(tmp_path / "x.pth"))
    for name in ("iter_9.pth", "iter_10.pth", "best_iter_11.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"already holds a run \(iter_10.pth\)"):
        run.set_start(config, None)
    (tmp_path / "last_checkpoint").write_text("elsewhere/iter_12.pth")  # the note of a save that is gone
    assert run.set_start(config, "auto")
    assert config.load_from == str(tmp_path / "iter_10.pth")
    (tmp_path / "last_checkpoint").write_text("elsewhere/iter_9.pth")
    assert run.set_start(config, "auto")
    assert config.load_from == str(tmp_path / "iter_9.pth")


@pytest.mark.slow
@pytest.mark.parametrize("task", METRICS)
def test_train__two_processes(data, tmp_path, task):
    arguments = ["train", f"configs/{task}/demo.py", "--launcher", "pytorch", "--work-dir", tmp_path / "run"]
    started = start_command([*arguments, "--cfg-options", *words(SHORT)], tmp_path / "output", 2, **environment(data))
    shown = started.wait()
    assert started.returncode == 0, shown[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["images_per_second"] == pytest.approx(4 / summary["train_seconds"])


def test_train__wrong_backbone_stops(data, tmp_path):
    state = random_vit(64, patch_size=8, embed_dim=64, depth=4, num_heads=4).state_dict()
    write_backbone(state, tmp_path / "narrow.safetensors", "timm", {"num_heads": "4"})
    done = tool(
        data, "train", "configs/detection/demo.py", "--work-dir", tmp_path, "--backbone", tmp_path / "narrow.safetensors"
    )  # fmt: skip
    assert done.returncode == 1
    assert "embed_dim = 64, not 128" in done.stderr
    assert "Traceback" not in done.stderr


def test_read_config__faults(tmp_path):
    from downstream import run

    with pytest.raises(ConfigError, match="no such file"):
        run.read_config(tmp_path / "x.py")
    (tmp_path / "x.py").write_text("model = dict(")
    with pytest.raises(ConfigError, match="SyntaxError"):
        run.read_config(tmp_path / "x.py")
    (tmp_path / "x.py").write_text("a = 1")
    with pytest.raises(ConfigError, match="has no 'model'"):
        run.read_config(tmp_path / "x.py")
    (tmp_path / "x.py").write_text("model = dict(type='A')\ndefault_scope = 'mmpose'")
    with pytest.raises(UserError, match="mmpose"):
        run.read_config(tmp_path / "x.py")


def test_set_backbone__faults(tmp_path):
    from downstream import run

    config = run.read_config(REPOSITORY / "configs/detection/demo.py")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        run.set_backbone(config, tmp_path / "x")
    (tmp_path / "x").touch()
    config.model.backbone = {"type": "mmdet.ResNet", "depth": 50}
    with pytest.raises(UserError, match="without an error where they do not fit"):
        run.set_backbone(config, tmp_path / "x")
