"""The report on inputs that once broke it or were shown wrongly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mae_et.config.schema import resume_free
from mae_et.report.join import make_benchmark
from mae_et.report.page import write_report
from mae_et.report.tables import make_tables
from mae_et.report.verdict import make_tiles, make_verdicts
from tests.report.folders import ETPP, age, classify, edit, pretrain


def verdicts(folder: Path) -> list[str]:
    return [str(verdict) for verdict in make_verdicts(make_tables(make_benchmark([folder])))]


# -------------------------------------------------------------------- costs above the baseline's


def test_case__M5_a_curriculum_that_cost_more(tmp_path):
    """4% more FLOPs and 1.5 times the time, at the same budget."""
    pretrain(tmp_path / "constant", epochs=4.0, seconds=80.0)
    folder = pretrain(tmp_path / "etpp", epochs=4.0, bands=ETPP, seconds=120.0)
    edit(folder, train_petaflops=0.00416)
    classify(tmp_path / "knn0", "constant", 0.5)
    classify(tmp_path / "knn1", "etpp", 0.5)
    benchmark = make_benchmark([tmp_path])
    tables = make_tables(benchmark)
    for said in (make_tiles(benchmark, tables)[1].note, str(make_verdicts(tables)[0])):
        assert "1.04x the FLOPs, 1.5x the time" in said
        assert "fewer" not in said
        assert "less" not in said


# -------------------------------------------------------------------- one run on a side


def test_case__M6_one_run_a_side_has_an_interval_and_a_verdict(tmp_path):
    for name, bands, top1 in (("constant", [32], 0.50), ("etpp", ETPP, 0.51)):
        pretrain(tmp_path / name, bands=bands, seconds=len(bands))
        classify(tmp_path / f"{name}_knn", name, top1, num_val=1000)
    (said,) = verdicts(tmp_path)
    assert "No difference can be seen with n = 1 between etpp" in said
    assert "+1.00 points. Only one above 4.37 points would show" in said  # Wilson's half-widths in quadrature
    write_report(make_benchmark([tmp_path]), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("No difference can be seen") < page.index('class="tiles"')
    assert "+1.00 (−3.37 to +5.37)" in page
    assert "no uncertainty" not in page


def test_case__M6_one_run_a_side_and_a_large_difference(tmp_path):
    for name, bands, top1 in (("constant", [32], 0.50), ("etpp", ETPP, 0.70)):
        pretrain(tmp_path / name, bands=bands, seconds=len(bands))
        classify(tmp_path / f"{name}_knn", name, top1, num_val=1000)
    (said,) = verdicts(tmp_path)
    assert said.startswith("One run on a side (n = 1) does not show the spread over seeds")
    assert "20.00 points above" in said


# -------------------------------------------------------------------- jobs that run


@pytest.mark.parametrize(("scope", "kind"), [("mmdet", "detection"), ("mmseg", "segmentation")])
def test_case__M7_running_detection_and_segmentation_show_their_progress(tmp_path, scope, kind):
    """A run that logs, before its first checkpoint and after."""
    folder = tmp_path / "run" / "20260101_120000" / "vis_data"
    folder.mkdir(parents=True)
    (folder / "config.py").write_text(
        f"default_scope = {scope!r}\ntrain_cfg = dict(max_iters=80, type='IterBasedTrainLoop')\n"
    )
    lines = [{"lr": 0.1, "loss": 2.0, "iter": step, "step": step} for step in (10, 20)]
    (folder / "scalars.json").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"lr": 0.')
    (run,) = make_benchmark([tmp_path]).running
    assert (run.kind, run.status, run.progress, run.reason) == (kind, "running", 0.25, "at step 20 of 80 (25%)")
    (tmp_path / "run" / "iter_40.pth").touch()
    assert make_benchmark([tmp_path]).running[0].progress == 0.5
    age(tmp_path)
    (run,) = make_benchmark([tmp_path]).problems
    assert (run.status, "at step 40 of 80 (50%)" in run.reason) == ("unfinished", True)


def test_case__M7_running_pretraining_is_no_problem(tmp_path):
    pretrain(tmp_path / "run", finished=False)
    os.utime(tmp_path / "run" / "metrics.jsonl")
    benchmark = make_benchmark([tmp_path])
    assert benchmark.problems == []
    assert (benchmark.running[0].progress, benchmark.running[0].reason) == (0.4, "at 40% of its compute")


# -------------------------------------------------------------------- hostile files


def test_case__F10_huge_numbers_break_one_run_only(tmp_path):
    pretrain(tmp_path / "good")
    folder = pretrain(tmp_path / "log", seed=1, seconds=50.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 1e308, "equivalent_epochs": 4.0, "seconds": 51.0}\n')
    for i, key in enumerate(("seconds", "last_loss", "train_petaflops", "num_images", "equivalent_epochs")):
        huge = 10**400 if key == "num_images" else 1e308
        edit(pretrain(tmp_path / key, seed=2 + i, seconds=60.0 + i), **{key: huge})
    benchmark = make_benchmark([tmp_path])
    write_report(benchmark, tmp_path / "out")
    assert [run.name for run in benchmark.shown] == ["good"]
    reasons = {run.name: run.reason for run in benchmark.problems}
    num_lines = len((folder / "metrics.jsonl").read_text().splitlines())
    assert f"loss in line {num_lines} is beyond 1e+30" in reasons.pop("log")
    assert all(key in reason for key, reason in reasons.items())


@pytest.mark.parametrize(
    "name", ["summary.json", "metrics.jsonl", "config.py", "environment.json", "plan.json", "test_summary.json"]
)
def test_case__F10_a_pipe_breaks_one_run_only(tmp_path, name):
    pretrain(tmp_path / "good")
    folder = pretrain(tmp_path / "pipe", seed=1, seconds=50.0)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    os.mkfifo(folder / "reconstructions.png")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "summary.json").symlink_to("/dev/zero")
    benchmark = make_benchmark([tmp_path])
    write_report(benchmark, tmp_path / "out")
    assert [run.name for run in benchmark.shown] == ["good"]
    reasons = {run.name: run.reason for run in benchmark.problems}
    assert f"{name} cannot be read: not a regular file" in reasons["pipe"]
    assert "not a regular file" in reasons["link"]


def test_case__F10_a_picture_that_is_a_pipe(tmp_path):
    folder = pretrain(tmp_path / "runs" / "a")
    (folder / "reconstructions").mkdir()
    os.mkfifo(folder / "reconstructions" / "step_00000010.png")
    write_report(make_benchmark([tmp_path / "runs"]), tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()


# -------------------------------------------------------------------- the micro batch


@pytest.mark.parametrize(("kind", "num_groups"), [("linear_probe", 2), ("finetune", 2)])
def test_case__micro_batch_of_classification_makes_another_recipe(tmp_path, kind, num_groups):
    """BatchNorm, mixup and drop path see it, so resuming refuses a change and the report does not average over it."""
    pretrain(tmp_path / "a")
    for i, size in enumerate((4, 8)):
        classify(tmp_path / f"run{i}", "a", 0.5, kind=kind, seed=i, batch={"micro_batch_size": size})
    (table,) = [one for one in make_tables(make_benchmark([tmp_path])) if one.section == "transfer"]
    columns = [column.key for column in table.columns if column.key.startswith(f"{kind}.top1")]
    assert len([key for key in columns if not key.endswith("delta")]) == num_groups
    assert "batch.micro_batch_size" in resume_free("pretrain") - resume_free(kind)


def test_micro_batch__of_pretraining_is_free(tmp_path):
    for i, size in enumerate((4, 8)):
        pretrain(tmp_path / f"run{i}", seed=i, seconds=50.0 + i, batch__micro_batch_size=size)
    assert len(make_benchmark([tmp_path]).origins) == 1
