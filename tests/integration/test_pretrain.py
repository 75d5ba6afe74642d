"""Whole runs: what they write, how they go on after a stop or a kill, and what must not change their losses."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae_et.config.files import save_config
from mae_et.config.schema import PretrainConfig, from_dict, to_dict
from mae_et.config.validation import flat
from mae_et.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StoppedEarly, UserError
from mae_et.models.mae import build_mae
from mae_et.storage import checkpoint
from mae_et.storage.backbone import load_mae
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks import pretrain
from mae_et.tasks.run import run_training
from tests.conftest import Stop, changing_loss, killed_before, losses, small_values
from tests.plans import plan_for
from tests.processes import Started, start_command

WIDTHS = {"embed_dim": 48, "depth": 3, "num_heads": 3}
# For the longer runs: what they write beside their losses takes a third of their time.
QUIET: dict[str, Any] = {"run__save_interval": 1000, "run__loggers": []}


def small_config(**overrides: Any) -> PretrainConfig:
    return from_dict(PretrainConfig, small_values(**overrides))


def run(work_dir: Path, resume: bool = False, task_type: type = pretrain.MAETask, **overrides: Any) -> dict[str, Any]:
    return run_training(task_type, small_config(**overrides), work_dir, resume=resume, device="cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    work_dir = tmp_path_factory.mktemp("run") / "uninterrupted"
    run(work_dir, run__num_pictures=2)
    return work_dir


# -------------------------------------------------------------------- what a run writes


def test_pretrain__writes_exactly_these_files(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        ".lock", "run.log", "config.py", "plan.json", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints",
        "reconstructions", "backbone.safetensors", "summary.json",
    }  # fmt: skip
    plan = plan_for(small_config(), 20)
    ends = [stage.first_step + stage.num_steps for stage in plan.stages]
    assert sorted(p.name for p in (finished / "reconstructions").iterdir()) == [f"step_{e:08d}.png" for e in ends]
    assert len(list((finished / "checkpoints").iterdir())) == 2  # rotated


def test_pretrain__metrics_follow_the_plan(finished: Path) -> None:
    plan = plan_for(small_config(), 20)
    lines = [line for line in read_jsonl(finished / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, plan.num_steps + 1))
    for line in lines:
        step = line["step"] - 1
        assert line["bandwidth"] == plan.stage_at(step).bandwidth
        assert line["lr"] == plan.lr(step)
    assert lines[-1]["compute_fraction"] == 1.0


def test_pretrain__learns(tmp_path: Path) -> None:
    # Raw pixels in small patches: neighbours tell most of a removed patch, so a hundred steps must get far below the first loss.
    small = {"model__patch_size": 4, "model__norm_pix_loss": False, "optimizer__base_lr": 0.03}
    summary = run(tmp_path / "run", curriculum__equivalent_epochs=24.0, **small, **QUIET)
    assert summary["last_loss"] < 0.5 * summary["first_loss"]


def test_pretrain__summary_adds_up(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    plan = plan_for(small_config(), 20)
    assert summary["num_images"] == plan.num_images == sum(stage["num_images"] for stage in summary["stages"])
    assert summary["train_petaflops"] == pytest.approx(plan.train_petaflops, rel=1e-9)
    assert sum(stage["seconds"] for stage in summary["stages"]) == pytest.approx(summary["seconds"])
    rate = summary["stages"][-1]["images_per_second"]
    assert summary["speedup_against_baseline"] == pytest.approx(1600 * 20 / rate / summary["seconds"])


def test_pretrain__summary_and_tensorboard_tell_where_the_time_went(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    plan = plan_for(small_config(), 20)
    full = summary["stages"][-1]
    for stage, planned in zip(summary["stages"], plan.stages, strict=True):
        speed = stage["images_per_second"] / full["images_per_second"]
        assert stage["speed_over_full_size"] == pytest.approx(speed)
        assert stage["ideal_by_area"] == pytest.approx((32 / planned.bandwidth) ** 2)
        ideal = plan.stages[-1].gflops_per_image / planned.gflops_per_image
        assert stage["speed_over_ideal_by_flops"] == pytest.approx(speed / ideal)
        assert stage["speed_over_ideal_by_area"] == pytest.approx(speed / (32 / planned.bandwidth) ** 2)
        flops = 3 * planned.gflops_per_image * 1e9 * stage["num_images"] / stage["seconds"]
        assert stage["tflops_per_second"] == pytest.approx(flops / 1e12)
        assert stage["mfu"] is None  # a CPU's peak is not known
        assert 0 <= stage["waiting_fraction"] <= 1
    assert full["speed_over_ideal_by_area"] == full["speed_over_ideal_by_flops"] == 1
    assert summary["speedup_over_nominal"] == pytest.approx(summary["speedup_against_baseline"] / plan.nominal_speedup)
    waited = sum(stage["waiting_fraction"] * stage["seconds"] for stage in summary["stages"])
    assert summary["waiting_fraction"] == pytest.approx(waited / summary["seconds"])

    for line in read_jsonl(finished / "metrics.jsonl"):
        planned = plan.stages[line["stage"]] if "stage" in line else None
        if planned is not None:
            rate = line["images_per_second"]
            assert line["equivalent_images_per_second"] == pytest.approx(rate * (planned.bandwidth / 32) ** 2)
            assert line["tflops_per_second"] == pytest.approx(rate * 3 * planned.gflops_per_image / 1e3)
            assert "mfu" not in line

    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    ends = [stage.first_step + stage.num_steps for stage in plan.stages]
    for name in ("images_per_second", "waiting_fraction", "speed_over_ideal_by_area", "speed_over_ideal_by_flops"):
        seen = events.Scalars(f"stage/{name}")
        assert [event.step for event in seen] == ends
        assert [event.value for event in seen] == pytest.approx([stage[name] for stage in summary["stages"]])
    assert "stage/mfu" not in events.Tags()["scalars"]
    assert len(events.Scalars("train/tflops_per_second")) == plan.num_steps


def test_pretrain__utilisation_on_a_known_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mae_et.tasks.run", "mae_et.engine.trainer"):
        monkeypatch.setattr(f"{module}.device_peak_tflops", lambda precision, device: 0.5)
    summary = run(tmp_path / "run", run__log_interval=5)
    for values in (summary, *summary["stages"]):
        assert values["mfu"] == pytest.approx(values["tflops_per_second"] / 0.5)
    lines = [line for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "stage" in line]
    assert [line["mfu"] for line in lines] == pytest.approx([line["tflops_per_second"] / 0.5 for line in lines])
    assert "stage/mfu" in EventAccumulator(str(tmp_path / "run/tensorboard")).Reload().Tags()["scalars"]


def test_pretrain__no_stage_at_full_size_leaves_the_speed_ups_open(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", curriculum__stages=[{"compute_fraction": 1.0, "bandwidth": 16}])
    (stage,) = summary["stages"]
    for key in ("speed_over_full_size", "ideal_by_flops", "speed_over_ideal_by_area", "speed_over_ideal_by_flops"):
        assert stage[key] is None
    assert stage["ideal_by_area"] == 4
    assert summary["speedup_over_nominal"] is None


def test_pretrain__early_large_batch_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    early = {
        "batch__early_large_batch": {"rule": "area"},
        "curriculum__equivalent_epochs": 5.0,
        "run__save_interval": 4,
    }
    plan = plan_for(small_config(**early), 20)
    assert [stage.global_batch_size for stage in plan.stages] == [32, 14, 8]
    run(tmp_path / "whole", **early)
    assert len(losses(tmp_path / "whole")) == plan.num_steps
    with pytest.raises(Stop):
        run(tmp_path / "parts", **early, task_type=killed_before(pretrain.MAETask, 6))
    with pytest.raises(CheckpointError, match=r"batch\.early_large_batch\.rule: 'area' -> 'none'"):
        run(tmp_path / "parts", resume=True, curriculum__equivalent_epochs=5.0)
    run(tmp_path / "parts", resume=True, **early)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    run(tmp_path / "small", batch__micro_batch_sizes=[8, 7, 2], **early)  # the split changes nothing but rounding
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_pretrain__backbone_loads_in_timm_with_equal_features(finished: Path) -> None:
    backbone = finished / "backbone.safetensors"
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0, **WIDTHS)
    vit.load_state_dict(load_file(backbone), strict=True)
    state = checkpoint.load_newest(finished / "checkpoints", print)[1]["model"]
    ours = build_mae(
        "tiny", img_size=32, patch_size=8, **WIDTHS, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2
    )
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit.eval().forward_features(images), ours.eval().features(images), atol=1e-5, rtol=0)
    with safe_open(backbone, "pt") as file:
        metadata = file.metadata()
    assert metadata["architecture"] == "vit_width48_depth3_patch8_32"
    assert json.loads(metadata["curriculum"])["equivalent_epochs"] == 5.2


def test_pretrain__config_py_repeats_the_run(finished: Path) -> None:
    from mae_et.config.files import load_config

    assert load_config(PretrainConfig, finished / "config.py") == small_config(run__num_pictures=2)


# -------------------------------------------------------------------- going on after a stop


@pytest.mark.parametrize("step", [0, 3, 10, 11, 17])  # before a save, at one, inside a stage, after a boundary
def test_resume__after_a_kill_has_equal_losses(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with pytest.raises(Stop):
        run(tmp_path / "run", task_type=killed_before(pretrain.MAETask, step))
    run(tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(finished)
    equal = load_file(finished / "backbone.safetensors"), load_file(tmp_path / "run/backbone.safetensors")
    assert all(torch.equal(equal[0][key], equal[1][key]) for key in equal[0])


def test_resume__several_weighted_sources(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 8, 0)
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted((tmp_path / "images").iterdir())[:3]))
    mixed = {
        "data__train": [str(tmp_path / "images"), f"{tmp_path}/list.txt", "scenes:9@32,seed=3"],
        "data__train_weights": [1, 2, 1],
        "curriculum__equivalent_epochs": 2.0,
    }
    summary = run(tmp_path / "whole", **mixed)
    (sampling,) = [row["text"] for row in summary["data_findings"]["count"] if row["kind"] == "sampling"]
    assert "a pass of 20 images shows 5 of" in sampling
    assert "list.txt (3 images, 3.33 times each)" in sampling
    with pytest.raises(Stop):
        run(tmp_path / "parts", **mixed, run__save_interval=3, task_type=killed_before(pretrain.MAETask, 5))
    with pytest.raises(CheckpointError, match=r"data\.train_weights: \[1\.0, 2\.0, 1\.0\] -> \[\]"):
        run(tmp_path / "parts", resume=True, **{**mixed, "data__train_weights": []})
    run(tmp_path / "parts", resume=True, **mixed)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_resume__several_times_and_with_sums_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", run__log_interval=7)
    for step, resume in ((4, False), (9, True), (8, True)):  # calls since the last start
        with pytest.raises(Stop):
            run(
                tmp_path / "parts",
                resume=resume,
                run__log_interval=7,
                run__save_interval=3,
                task_type=killed_before(pretrain.MAETask, step),
            )
    run(tmp_path / "parts", resume=True, run__log_interval=7, run__save_interval=3)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_resume__passes_over_a_save_that_was_cut_off(finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "run")
    newest = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    (tmp_path / "run/checkpoints/.step_00000030.pt.writing").write_bytes(b"cut off")
    run(tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(finished)
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def start_tool(config: PretrainConfig, folder: Path, *options: str, num: int = 1) -> Started:
    """Starts the command with a config; its output goes to a new folder below `folder`."""
    save_config(config, folder / "small.py", "A test.")
    words = ["pretrain", folder / "small.py", "--work-dir", folder / "run", "--device", "cpu", *options]
    return start_command(words, Path(tempfile.mkdtemp(dir=folder)) / "output", num)


def wait_for_step(work_dir: Path, step: int, process: Started) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (work_dir / "metrics.jsonl").exists() and any(n >= step for n in losses(work_dir)):
            return
        time.sleep(0.01)
    raise AssertionError(f"never got to step {step}: {process.output}")


LONGER: dict[str, Any] = {"curriculum__equivalent_epochs": 13.0, "data__num_workers": 1, "run__save_interval": 5}


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of an uninterrupted run that is long enough for a signal in the middle."""
    work_dir = tmp_path_factory.mktemp("longer") / "run"
    run(work_dir, **LONGER)
    return losses(work_dir)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)])
def test_tool__signals(longer: dict[int, float], tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = start_tool(small_config(**LONGER), tmp_path, "--debug")  # a traceback keeps the loader alive: no hang
    wait_for_step(tmp_path / "run", 7, process)
    process.send_signal(number)
    shown = process.wait(timeout=60)
    assert process.returncode == code, shown
    done = losses(tmp_path / "run")
    assert len(done) < len(longer)
    if code == 75:
        assert "--resume" in shown
        newest = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")[-1]
        assert int(newest.stem.removeprefix("step_")) == max(done)
    run(tmp_path / "run", resume=True, **LONGER)
    assert losses(tmp_path / "run") == longer


# -------------------------------------------------------------------- what must not change the losses


@pytest.mark.parametrize(
    "overrides",
    [
        {"data__num_workers": 2},
        {"run__log_interval": 3, "run__save_interval": 4},
        {"run__num_pictures": 3, "run__picture_interval": 2},
        {"run__knn_interval": 2, "data__val": "scenes:10@32,seed=4"},
    ],
)
def test_pretrain__losses_do_not_depend_on(finished: Path, tmp_path: Path, overrides: dict[str, Any]) -> None:
    run(tmp_path / "run", **overrides)
    ours, whole = load_file(tmp_path / "run/backbone.safetensors"), load_file(finished / "backbone.safetensors")
    assert all(torch.equal(ours[key], whole[key]) for key in whole)
    if "run__log_interval" not in overrides:
        assert losses(tmp_path / "run") == losses(finished)


def test_pretrain__accumulation_leaves_losses_unchanged(finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", batch__micro_batch_size=2)
    expected = losses(finished)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)


def test_pretrain__two_processes_equal_one(finished: Path, tmp_path: Path) -> None:
    process = start_tool(small_config(batch__micro_batch_size=4), tmp_path, num=2)
    shown = process.wait()
    assert process.returncode == 0, shown[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-4)
    assert json.loads((tmp_path / "run/summary.json").read_text())["world_size"] == 2


def test_pretrain__two_processes_accumulate_from_the_first_step_of_each_start(tmp_path: Path) -> None:
    # A stage at the full size alone: at smaller sizes a micro batch holds more images, and a step is one micro batch.
    values: dict[str, Any] = {
        "batch__micro_batch_size": 2,
        "curriculum__stages": [{"compute_fraction": 1.0, "bandwidth": 32}],
        "curriculum__equivalent_epochs": 10.0,
        "run__save_interval": 4,
    }
    config = small_config(**values)
    run(tmp_path / "one", **values)
    process = start_tool(config, tmp_path, num=2)
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    process = start_tool(config, tmp_path, "--resume", num=2)
    shown = process.wait()
    assert process.returncode == 0, shown[-3000:]
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert [stage["accum_steps"] for stage in plan["stages"]] == [2]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_pretrain__two_processes_stop_and_resume_with_sums_pending(tmp_path: Path) -> None:
    values = {"run__log_interval": 9, "run__save_interval": 1000, "curriculum__equivalent_epochs": 15.0}
    config = small_config(**values)
    run(tmp_path / "one", **values)
    process = start_tool(config, tmp_path, num=2)
    wait_for_step(tmp_path / "run", 9, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    assert len(checkpoint.list_checkpoints(tmp_path / "run/checkpoints")) == 1
    assert not (tmp_path / "run/summary.json").exists()
    process = start_tool(config, tmp_path, "--resume", num=2)
    shown = process.wait()
    assert process.returncode == 0, shown[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_pretrain__compile_leaves_losses_nearly_unchanged(tmp_path: Path) -> None:
    # One block of each kind and two sizes: each size takes ten seconds or more to compile.
    small: dict[str, Any] = {"model__depth": 1, "model__decoder_depth": 1, "curriculum__equivalent_epochs": 1.5}
    small["curriculum__warmup_equivalent_epochs"] = 0.5
    small["curriculum__stages"] = [
        {"compute_fraction": 0.4, "bandwidth": 16, "strength": 0.0},
        {"compute_fraction": 0.6, "bandwidth": 32, "strength": 1.0},
    ]
    run(tmp_path / "eager", **small)
    run(tmp_path / "compiled", run__compile=True, **small)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)


def test_pretrain__activation_checkpointing_leaves_losses_unchanged(finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", run__activation_checkpointing=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-5)


def test_pretrain__bf16_stays_close(finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", run__precision="bf16")
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=0.03)


def test_pretrain__memory_does_not_grow(tmp_path: Path) -> None:
    # 60 steps of one size.
    run(
        tmp_path / "run",
        curriculum__equivalent_epochs=24.0,
        curriculum__stages=[{"compute_fraction": 1.0, "bandwidth": 32}],
    )
    memory = [line["memory_gib"] for line in read_jsonl(tmp_path / "run/metrics.jsonl") if line.get("bandwidth") == 32]
    assert len(memory) == 60
    half = len(memory) // 2
    assert max(memory[half:]) - max(memory[:half]) < 0.05


# -------------------------------------------------------------------- faults


def test_resume__changed_config_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(CheckpointError) as error:
        run(tmp_path / "run", resume=True, optimizer__base_lr=0.1, model__mask_ratio=0.75, data__num_workers=1)
    assert "optimizer.base_lr: 0.016 -> 0.1" in str(error.value)
    assert "model.mask_ratio: 0.5 -> 0.75" in str(error.value)
    assert "num_workers" not in str(error.value)


def test_resume__other_images_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="other images"):
        run(tmp_path / "run", resume=True, data__train="scenes:20@32,seed=5")


def test_pretrain__existing_run_is_not_overwritten(finished: Path) -> None:
    before = losses(finished)
    with pytest.raises(UserError, match="--resume"):
        run(finished)
    assert losses(finished) == before


def without_gradient(steps: set[int]) -> type:
    """Returns a task whose loss is NaN in some steps."""
    return changing_loss(pretrain.MAETask, lambda step, loss: loss * float("nan") if step in steps else loss)


def test_pretrain__nan_stops_before_the_update(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NonFiniteError, match="step 10"):
        run(tmp_path / "run", task_type=without_gradient({10}))
    dump = json.loads((tmp_path / "run/nonfinite_step_00000010.json").read_text())
    assert "patch_embed.proj.weight" in dump["non_finite_gradient_values"]
    assert dump["places_in_stream_of_main_process"] == list(range(80, 88))
    before = checkpoint.load_checkpoint(tmp_path / "run/checkpoints/step_00000010.pt")["model"]
    dumped = checkpoint.load_checkpoint(tmp_path / "run/nonfinite_step_00000010.pt")["model"]
    assert all(torch.equal(before[key], dumped[key]) for key in before)
    assert losses(tmp_path / "run") == {k: v for k, v in losses(finished).items() if k <= 10}


def test_pretrain__nan_steps_may_be_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = run(tmp_path / "run", task_type=without_gradient({4, 9}), run__max_skipped_steps=2)
    assert summary["skipped_steps"] == 2
    assert np.isfinite(summary["last_loss"])


def test_pretrain__full_disk_keeps_the_save_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.save

    def save(state: Any, path: Path) -> None:
        original(state, path)
        if "step_00000020" in str(path):
            os.truncate(path, 1000)
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(CheckpointError, match="the disk is full"):
            run(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000010.pt"]
    run(tmp_path / "run", resume=True)


def write_images(folder: Path, num_good: int, num_bad: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(num_good):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"good{i}.png")
    for i in range(num_bad):
        (folder / f"bad{i}.jpg").write_bytes(b"\xff\xd8\xff broken")


def test_pretrain__bad_images_are_replaced_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 18, 2)
    summary = run(tmp_path / "run", data__train=str(tmp_path / "images"), data__max_bad_fraction=0.1)
    assert summary["bad_images"] == 2


def test_pretrain__too_many_bad_images_stop_the_run(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 16, 4)
    with pytest.raises(DataError, match="max_bad_fraction"):
        run(tmp_path / "run", data__train=str(tmp_path / "images"), data__max_bad_fraction=0.1)


def test_pretrain__only_bad_images(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 0, 30)
    with pytest.raises(DataError, match="unreadable"):
        run(tmp_path / "run", data__train=str(tmp_path / "images"), data__num_workers=1, data__max_bad_fraction=1.0)


def test_pretrain__knn_without_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 20, 0)
    with pytest.raises(DataError, match="no labels"):
        run(tmp_path / "run", data__train=str(tmp_path / "images"), data__val="scenes:10@32")


def test_pretrain__batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="does not divide among 3 processes"):
        plan_for(small_config(), 20, world_size=3)


def test_pretrain__init_from_own_and_foreign(finished: Path, tmp_path: Path) -> None:
    checkpoint_path = str(checkpoint.list_checkpoints(finished / "checkpoints")[-1])
    summary = run(tmp_path / "own", model__init_from=checkpoint_path, optimizer__base_lr=1e-9)
    assert summary["first_loss"] < json.loads((finished / "summary.json").read_text())["first_loss"]
    backbone = str(finished / "backbone.safetensors")
    run(tmp_path / "encoder", model__init_from=backbone, optimizer__base_lr=1e-12)
    before, after = load_file(backbone), load_file(tmp_path / "encoder/backbone.safetensors")
    torch.testing.assert_close(after["blocks.2.attn.qkv.weight"], before["blocks.2.attn.qkv.weight"])
    with pytest.raises(CheckpointError, match=r"model.embed_dim = 48 .* Use --cfg-options model.embed_dim=48"):
        run(tmp_path / "small", model__init_from=backbone, model__embed_dim=96)


def test_pretrain__hog(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", model__target="hog", curriculum__equivalent_epochs=12.0, **QUIET)
    assert summary["last_loss"] < 0.9 * summary["first_loss"]
    saved = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")[-1]
    model, metadata = load_mae(saved)
    assert (model.target, model.decoder_pred.out_features) == ("hog", 108)
    assert (metadata["target"], metadata["hog_cell_size"]) == ("hog", "4")
    with safe_open(tmp_path / "run/backbone.safetensors", "pt") as file:
        assert file.metadata()["target"] == "hog"
    with pytest.raises(UserError, match="predicts HOG descriptors"):
        load_mae(saved, norm_pix_loss=True)
    with pytest.raises(CheckpointError, match=r"model\.target: 'hog' -> 'pixels'"):
        run(tmp_path / "run", resume=True, curriculum__equivalent_epochs=12.0)


def test_pretrain__init_from_another_target_draws_a_new_head(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(checkpoint.list_checkpoints(finished / "checkpoints")[-1])
    run(tmp_path / "pixels", model__init_from=path, optimizer__base_lr=1e-12)
    assert "starts from its initial weights" not in caplog.text
    run(tmp_path / "hog", model__init_from=path, model__target="hog", optimizer__base_lr=1e-12)
    assert "the model predicts hog: decoder_pred starts from its initial weights" in caplog.text
    before = load_mae(path)[0].state_dict()
    after = load_mae(checkpoint.list_checkpoints(tmp_path / "hog/checkpoints")[-1])[0].state_dict()
    head = {"decoder_pred.weight", "decoder_pred.bias"}
    assert {key for key in after if after[key].shape != before[key].shape} == head
    for key in after.keys() - head:
        torch.testing.assert_close(after[key], before[key])
    with pytest.raises(CheckpointError, match=r"mask_token \(1, 1, 32\), the model has \(1, 1, 64\)"):
        run(tmp_path / "wide", model__init_from=path, model__target="hog", model__decoder_embed_dim=64)


def test_resume__from_a_checkpoint_older_than_a_key(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint without a key of today resumes if the key has its default; otherwise the message names the key."""
    with pytest.raises(Stop):
        run(tmp_path / "run", task_type=killed_before(pretrain.MAETask, 12))
    newest = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")[-1]
    state = torch.load(newest, weights_only=True)
    defaults = dict(flat(to_dict(from_dict(PretrainConfig, {"data": {"train": "x"}}))))
    same = [key for key, value in flat(state["config"]) if defaults[key] == value]
    assert {"model.target", "model.hog_cell_size", "model.norm_pix_loss", "run.seed"} <= set(same)
    for key in same:
        *parents, last = key.split(".")
        node = state["config"]
        for parent in parents:
            node = node[parent]
        del node[last]
    del state["config"]["data"]["augmentation"]  # a whole section
    for stage in state["config"]["curriculum"]["stages"]:
        del stage["global_batch_size"]
    newest.unlink()
    checkpoint.save_checkpoint(state, newest.parent, state["progress"]["step"], 2)
    with pytest.raises(CheckpointError, match=r"(?s)model.target: 'pixels' -> 'hog'.*Undo these changes"):
        run(tmp_path / "run", resume=True, model__target="hog")
    run(tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(finished)


def test_resume__a_config_of_a_later_version_is_told(tmp_path: Path) -> None:
    run(tmp_path / "run")
    newest = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")[-1]
    state = torch.load(newest, weights_only=True)
    state["config"]["model"]["wavelets"] = 3
    checkpoint.save_checkpoint(state, newest.parent, state["progress"]["step"], 2)
    with pytest.raises(CheckpointError, match=r"cannot read: unknown key model\.wavelets"):
        run(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("options", "code", "shown"),
    [
        (["--cfg-options", "model.mask_ration=0.5"], 2, "did you mean model.mask_ratio?"),
        (["--cfg-options", "data.train=/nowhere"], 1, "/nowhere"),
        (["--cfg-options", "model"], 2, "is not KEY=VALUE"),
        (
            ["--cfg-options", "replay.stages=[dict(bandwidth=24,factor=4)]"],
            2,
            "write rows as a Python literal",
        ),
        (["--resume"], 0, "holds no checkpoint: starting at the first step"),
        (["--cfg-options", "run.precision=fp16"], 1, "needs a GPU"),
    ],
)
def test_tool__faults_are_one_message(tmp_path: Path, options: list[str], code: int, shown: str) -> None:
    process = start_tool(small_config(), tmp_path, *options)
    output = process.wait(timeout=120)
    assert process.returncode == code
    assert shown in output
    assert "Traceback" not in output


def test_pretrain__stop_before_the_first_save_loses_nothing(tmp_path: Path) -> None:
    # SIGTERM in the very first step.
    def change(step: int, loss: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with pytest.raises(StoppedEarly):
        run(tmp_path / "run", task_type=changing_loss(pretrain.MAETask, change))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000001.pt"]
