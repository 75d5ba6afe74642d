"""The report over known runs: joined, averaged, compared, and nothing lost on the way."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mae_et.errors import UserError
from mae_et.report.compare import Statistic, summarize
from mae_et.report.figures import MAX_POINTS, curve, make_figures, thin
from mae_et.report.join import Benchmark, make_benchmark
from mae_et.report.page import to_json
from mae_et.report.scan import Run
from mae_et.report.tables import REFERENCE, Column, Table, _beside, make_tables, standard_set
from tests.report.folders import (
    CPU,
    ETPP,
    age,
    box_metrics,
    classify,
    dense,
    edit,
    example,
    pretrain,
    supervised,
    weights,
    write,
)

GOLDEN = Path(__file__).with_name("golden.json")


def table(benchmark: Benchmark, start: str) -> Table:
    """The table whose title begins so."""
    (found,) = [one for one in make_tables(benchmark) if one.title.startswith(start) and one.section != "published"]
    return found


def rows(one: Table) -> dict[str, dict]:
    """The rows by their label, without that of random weights that nobody ran."""
    return {str(row.values["label"]): row.values for row in one.rows if "(not run)" not in str(row.values["label"])}


def by_name(benchmark: Benchmark) -> dict[str, Run]:
    return {run.name: run for run in benchmark.runs}


# -------------------------------------------------------------------- golden


def test_report__golden(tmp_path, monkeypatch):
    """The whole of report.json over the example. Written again with: MAE_ET_WRITE_GOLDEN=1 pytest tests/report."""
    example(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    benchmark = make_benchmark([Path("runs")])
    tables = make_tables(benchmark)
    found = to_json(benchmark, tables, make_figures(benchmark, tables), "Transfer benchmark")
    found["tables"] = [one for one in found["tables"] if one["section"] != "published"]
    found.pop("mae_et")
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("MAE_ET_WRITE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert json.loads(text) == json.loads(GOLDEN.read_text(encoding="utf-8"))


# -------------------------------------------------------------------- joined and averaged


def test_transfer__mean_deviation_and_difference(tmp_path):
    benchmark = make_benchmark([example(tmp_path)])
    knn = rows(table(benchmark, "Classification: flowers"))
    ours = [50.0, 51.0, 52.0]
    etpp, constant = knn["etpp 16-24-32, 2 eq. epochs"], knn["constant 32, 4 eq. epochs"]
    assert etpp["knn.top1"].mean == pytest.approx(statistics.fmean(ours))
    assert etpp["knn.top1"].sd == pytest.approx(statistics.stdev(ours))
    assert (etpp["knn.top1"].n, constant["knn.top1"].n) == (3, 2)
    change = etpp["knn.top1.delta"]
    assert change.value == pytest.approx(51 - 48)
    assert (change.ns, change.is_paired) == ((3, 2), False)
    assert "knn.top1.delta" not in constant
    assert (etpp["linear_probe.top1"].n, etpp["linear_probe.top1"].sd) == (1, None)
    assert etpp["linear_probe.top1.delta"].seed_half is None  # one run on a side
    assert knn["random weights"]["knn.top1"].mean == pytest.approx(20)
    assert "finetune.top1" not in etpp  # nobody ran it: the column is empty
    assert "finetune.top1" in [column.key for column in table(benchmark, "Classification: flowers").columns]


def test_pretraining__cost_and_speedup(tmp_path):
    benchmark = make_benchmark([example(tmp_path)])
    found = rows(table(benchmark, "Runs and cost"))
    etpp = found["etpp 16-24-32, 2 eq. epochs"]
    assert etpp["seconds"].mean == pytest.approx(51)
    assert etpp["core_hours"].mean == pytest.approx(51 / 3600)
    assert etpp["against"] == "constant 32, 4 eq. epochs"
    assert etpp["nominal"] == pytest.approx(2.0)
    assert etpp["measured"].value == pytest.approx(102 / 51)
    relative = math.sqrt(statistics.variance([100, 104]) / 2 / 102**2 + statistics.variance([50, 51, 52]) / 3 / 51**2)
    assert etpp["measured"].error == pytest.approx(2 * relative)
    assert etpp["counted"] == pytest.approx(2.0)
    assert "against" not in found["constant 32, 4 eq. epochs"]


def test_speedup__is_not_measured_across_hardware(tmp_path):
    pretrain(tmp_path / "constant")
    folder = pretrain(tmp_path / "etpp", bands=ETPP, epochs=2.0)
    write(folder, environment={**CPU, "device": "NVIDIA H200", "world_size": 8})
    etpp = rows(table(make_benchmark([tmp_path]), "Runs and cost"))["etpp 16-24-32, 2 eq. epochs"]
    assert etpp["measured"] is None
    assert etpp["nominal"] == 2.0
    assert etpp["gpu_hours"].mean == pytest.approx(100 * 8 / 3600)


def test_speedup__falls_back_on_an_equal_budget(tmp_path):
    pretrain(tmp_path / "constant", epochs=2.0)
    pretrain(tmp_path / "etpp", bands=ETPP, epochs=2.0, baseline=8.0, seconds=80.0)
    etpp = rows(table(make_benchmark([tmp_path]), "Runs and cost"))["etpp 16-24-32, 2 eq. epochs"]
    assert (etpp["nominal"], etpp["measured"].value, etpp["measured"].error) == (1.0, pytest.approx(100 / 80), None)


def test_pretraining__hog_replay_and_utilisation(tmp_path):
    folder = pretrain(tmp_path / "hog", model__target="hog")
    edit(folder, num_fresh_images=100, load_reduction=4.0, mfu=0.41)
    pretrain(tmp_path / "pixels", seconds=50.0, model__target="pixels")
    found = rows(table(make_benchmark([tmp_path]), "Runs and cost"))
    hog, pixels = (found[f"constant 32, 4 eq. epochs, {name}"] for name in ("hog", "normalised pixels"))
    assert (hog["target"], hog["fresh_images"].mean, hog["mfu"].mean) == ("hog", 100, pytest.approx(41))
    assert (pixels["fresh_images"], pixels["mfu"]) == (None, None)


def test_detection__percent_and_no_objects_of_a_size(tmp_path):
    found = rows(table(make_benchmark([example(tmp_path)]), "Detection: photos_coco"))["etpp 16-24-32, 2 eq. epochs"]
    assert found["box_ap"].mean == pytest.approx(31)
    assert found["mask_ap50"].mean == pytest.approx(32)
    assert "box_apl" not in found


def test_segmentation__evaluation_joins_its_training(tmp_path):
    benchmark = make_benchmark([example(tmp_path)])
    one = table(benchmark, "Segmentation: ade_small")
    assert [row.values["label"] for row in one.rows[1:]] == ["random weights (not run)"]
    assert one.rows[0].values["miou"].mean == pytest.approx(33.5)
    assert one.rows[0].values["miou_ms"].mean == pytest.approx(34.5)
    assert by_name(benchmark)["etpp_0_segmentation_tta"].source is by_name(benchmark)["etpp_0_segmentation"]


def test_evaluation__of_an_unknown_training_stands_alone(tmp_path):
    dense(tmp_path / "test", "detection", box_metrics(0.2), None, tta=False, trained="elsewhere")
    benchmark = make_benchmark([tmp_path])
    assert rows(table(benchmark, "Detection"))["random weights"]["box_ap"].mean == pytest.approx(20)


def test_lineage__joins_by_digest_not_by_path(tmp_path):
    """The backbone's path names another run's folder, as after a copy; the digest tells the truth."""
    pretrain(tmp_path / "a", seed=0)
    pretrain(tmp_path / "b", seed=1)
    folder = classify(tmp_path / "knn", "b", 0.5)
    shown = weights("b", path="work_dirs/a/backbone.safetensors").model_dump()
    edit(folder, initial_weights=shown)
    assert by_name(make_benchmark([tmp_path]))["knn"].source.name == "b"


def test_lineage__foreign_backbone_is_named_by_its_metadata(tmp_path):
    metadata = {
        "curriculum": json.dumps({"preset": "etpp", "equivalent_epochs": 400.0}),
        "bandwidths": "[96, 160, 224]",
        "seed": "0",
        "architecture": "vit_base_patch16_224",
        "data": "/data/imagenet/train",
        "step": "10",
        "num_steps": "20",
    }
    classify(tmp_path / "knn", "gone", 0.5, metadata=metadata)
    (label,) = rows(table(make_benchmark([tmp_path]), "Classification"))
    assert label == "etpp 96-160-224, 400 eq. epochs, vit_base_patch16_224, imagenet, step 10 of 20"


def test_groups__other_configs_are_not_averaged(tmp_path):
    for seed in (0, 1):
        pretrain(tmp_path / f"a{seed}", seed=seed)
        pretrain(tmp_path / f"b{seed}", seed=seed, optimizer__base_lr=0.002, seconds=50.0)
    found = rows(table(make_benchmark([tmp_path]), "Runs and cost"))
    assert set(found) == {"constant 32, 4 eq. epochs, base_lr 0.001", "constant 32, 4 eq. epochs, base_lr 0.002"}
    found = rows(table(make_benchmark([tmp_path], group_by=["curriculum"]), "Runs and cost"))
    assert found["constant 32"]["seconds"].n == 4
    with pytest.raises(UserError, match="did you mean curriculum"):
        make_benchmark([tmp_path], group_by=["curiculum"])


def test_groups__intervals_and_paths_do_not_split(tmp_path):
    pretrain(tmp_path / "a", seed=0, run__log_interval=1, data="/here/photos/train")
    pretrain(tmp_path / "b", seed=1, run__log_interval=5, data="/there/photos/train", seconds=50.0)
    (found,) = rows(table(make_benchmark([tmp_path]), "Runs and cost")).values()
    assert found["seconds"].n == 2


def test_headings__data_sets_and_sizes_are_kept_apart(tmp_path):
    pretrain(tmp_path / "a")
    classify(tmp_path / "one", "a", 0.5)
    classify(tmp_path / "two", "a", 0.6, data="data/cars")
    classify(tmp_path / "three", "a", 0.7, num_val=100)
    dense(tmp_path / "four", "detection", box_metrics(0.2), "a")
    dense(tmp_path / "five", "detection", box_metrics(0.3), "a", data="other")
    titles = [one.title for one in make_tables(make_benchmark([tmp_path])) if one.section == "transfer"]
    assert sorted(titles) == [
        "Classification: cars (200 images, 10 classes)",
        "Classification: flowers (100 images, 10 classes)",
        "Classification: flowers (200 images, 10 classes)",
        "Detection: other (50 images)",
        "Detection: photos_coco (50 images)",
    ]


def test_glance__random_weights_bring_no_columns_of_their_own(tmp_path):
    """What only random weights reached says nothing about a pre-training."""
    pretrain(tmp_path / "constant_s0")
    classify(tmp_path / "knn", "constant_s0", 0.5)
    classify(tmp_path / "knn_random", None, 0.2)
    dense(tmp_path / "boxes", "detection", box_metrics(0.3), None)
    glance = table(make_benchmark([tmp_path]), "Pre-trained on")
    assert [column.label for column in glance.columns if "AP" in column.label] == []
    assert rows(glance)["random weights"].keys() >= {"label"}
    assert any("kNN" in column.label for column in glance.columns)


def test_baseline__by_run_group_or_not_at_all(tmp_path):
    example(tmp_path)
    for name in ("etpp_1", "etpp 16-24-32, 2 eq. epochs"):
        knn = rows(table(make_benchmark([tmp_path], name), "Classification"))
        assert knn["constant 32, 4 eq. epochs"]["knn.top1.delta"].value == pytest.approx(-3)
    knn = rows(table(make_benchmark([tmp_path], "random_knn"), "Classification"))
    assert knn["constant 32, 4 eq. epochs"]["knn.top1.delta"].value == pytest.approx(28)
    with pytest.raises(UserError, match=r"--baseline 'nobody' is neither a finished run nor a group.*constant 32"):
        make_benchmark([tmp_path], "nobody")


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("kind == 'pretrain' and status == 'finished'", {"etpp_0", "etpp_1", "etpp_2", "constant_0", "constant_1"}),
        ("curriculum in ['etpp 16-24-32'] and kind == 'knn'", {"etpp_0_knn", "etpp_1_knn", "etpp_2_knn"}),
        ("equivalent_epochs >= 4 and status == 'finished' and kind == 'pretrain' and not seed == 0", {"constant_1"}),
        ("0 <= seed < 1 and kind == 'pretrain' and petaflops > -1", {"etpp_0", "constant_0"}),
        ("top1 > 50.5 or name == 'random_knn'", {"etpp_1_knn", "etpp_2_knn", "random_knn"}),
        ("pretraining == 'etpp_1'", {"etpp_1_knn"}),
    ],
)
def test_query__keeps_what_fulfils_it(tmp_path, query, kept):
    benchmark = make_benchmark([example(tmp_path)], query=query)
    assert {run.name for run in benchmark.shown} == kept
    parts = (benchmark.shown, benchmark.running, benchmark.problems, benchmark.left_out)
    assert sum(map(len, parts)) == len(benchmark.runs)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("curiculum == 'etpp'", "did you mean curriculum"),
        ("kind", "not a comparison of a column"),
        ("-seed", "not a comparison of a column"),
        ("1 == 1", "not a comparison of a column"),
        ("kind == ", "not an expression"),
        ("kind > 3", "TypeError"),
        ("seed == None", "None is not a text or a number"),
        ("seed == 1 & seed == 2", "BitAnd is not allowed|BinOp is not allowed"),
        ("", "not an expression"),
        ("(" * 400 + "seed" + ")" * 400 + " == 1", "not an expression|RecursionError"),
        ("seed == 1 " + "or seed == 1 " * 200, "longer than 1000"),
        ("kind == 'nothing'", "no run fulfils"),
    ],
)
def test_query__faults(tmp_path, query, said):
    pretrain(tmp_path / "run")
    with pytest.raises(UserError, match=said):
        make_benchmark([tmp_path], query=query)


@pytest.mark.parametrize(
    "query",
    [
        "@__import__('os').system('touch ran')",
        "@pd.compat.os.system('touch ran') == 0",
        "__import__('os').system('touch ran') == 0",
        "name.str.contains('x')",
        "kind.__class__ == 1",
        "kind.map(print) == 1",
        "`kind` == 'pretrain'",
        "name[0] == 1",
        "(lambda: 1)() == 1",
        "[x for x in (1,)] == [1]",
        "{'a': 1} == 1",
        "f'{seed}' == 'x'",
        "seed == 9 ** 9 ** 9",
        "(seed := 3) == 3",
        "index == 0",
        "sin(seed) > 0",
        "seed = 3",
        "seed == 1; import os",
    ],
)
def test_query__runs_no_code(tmp_path, monkeypatch, query):
    pretrain(tmp_path / "runs" / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"[Cc]olumns: name"):
        make_benchmark([Path("runs")], query=query)
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------- trouble


def test_discover__no_run(tmp_path):
    (tmp_path / "photo.txt").write_text("x")
    with pytest.raises(UserError, match="no run in"):
        make_benchmark([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        make_benchmark([tmp_path / "absent"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty"),
        ("[1]", "holds a list"),
        ('{"status": "fin', "not valid JSON"),
        ('{"status": "finished"}', "record_version is none"),
        ('{"record_version": 1}', "record_version is 1"),
        ('{"record_version": true}', "record_version is True"),
        ('{"record_version": 2}', "Unable to extract tag"),
        ('{"record_version": 2, "kind": "pretrain"}', "Field required"),
        ('{"record_version": 2, "seconds": NaN}', "NaN"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_discover__broken_summary(tmp_path, content, reason):
    folder = pretrain(tmp_path / "run")
    (folder / "summary.json").write_text(content)
    (run,) = make_benchmark([tmp_path]).problems
    assert run.status == "broken"
    assert reason in run.reason


def test_discover__cut_log_is_said_and_used(tmp_path):
    folder = pretrain(tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(whole[:3]) + whole[3][:20])
    (run,) = make_benchmark([tmp_path]).shown
    assert len(curve(run, "loss")) == 3
    assert run.notes == ["metrics.jsonl: line 4 cut off or damaged; the other 3 are used"]


def test_discover__unfinished(tmp_path):
    pretrain(tmp_path / "run", finished=False)
    (run,) = make_benchmark([tmp_path]).problems
    assert (run.status, run.kind) == ("unfinished", "pretrain")
    assert "40%" in run.reason


def test_discover__unfinished_detection(tmp_path):
    folder = tmp_path / "det" / "20260101_120000" / "vis_data"
    folder.mkdir(parents=True)
    (folder / "config.py").write_text("default_scope = 'mmdet'\nmodel = dict(type='MaskRCNN')\n")
    (tmp_path / "det" / "iter_20.pth").touch()
    age(tmp_path)
    (run,) = make_benchmark([tmp_path]).problems
    assert (run.status, run.kind) == ("unfinished", "detection")
    assert "step 20" in run.reason


@pytest.mark.parametrize("value", ["0.5", None, True, [1], 1e308, -0.1, 1.5])
def test_discover__metrics_that_are_not_fractions(tmp_path, value):
    edit(classify(tmp_path / "knn", "a", 0.5), top1=value)
    (run,) = make_benchmark([tmp_path]).problems
    assert run.status == "broken"
    assert "top1" in run.reason


def test_discover__dense_metrics(tmp_path):
    """COCO's -1 and percent in place of fractions are refused; without any value the run is broken."""
    for name, values in (
        ("minus", {"coco/bbox_mAP": -1.0}),
        ("percent", {"coco/bbox_mAP": 31.0}),
        ("huge", {"mIoU": 1e308}),
    ):
        edit(dense(tmp_path / name, "detection", box_metrics(0.1), None), metrics=values)
    dense(tmp_path / "none", "detection", dict.fromkeys(box_metrics(0.1)), None)
    reasons = {run.name: run.reason for run in make_benchmark([tmp_path]).problems}
    assert all("is outside [0, 1]" in reasons[name] for name in ("minus", "percent"))
    assert "metrics.mIoU" in reasons["huge"]
    assert "without a value of its metrics" in reasons["none"]


def test_duplicates__copies_are_named_and_not_averaged(tmp_path):
    pretrain(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "sub" / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "earlier")
    (tmp_path / "earlier" / "summary.json").unlink()
    benchmark = make_benchmark([tmp_path])
    assert len(benchmark.shown) == 1
    assert {run.path.relative_to(tmp_path).as_posix(): run.status for run in benchmark.problems} == {
        "sub/run": "duplicate",
        "earlier": "duplicate",
    }
    assert rows(table(benchmark, "Runs and cost"))["constant 32, 4 eq. epochs"]["seconds"].n == 1


def test_duplicates__the_same_seed_twice_is_no_second_sample(tmp_path):
    pretrain(tmp_path / "a", seconds=100.0)
    pretrain(tmp_path / "b", seconds=90.0)  # other weights by its name, but the same config and seed
    (problem,) = make_benchmark([tmp_path]).problems
    assert "same config, backbone and seed as 'a'" in problem.reason


def test_duplicates__knn_of_one_backbone_with_any_seed_is_one_sample(tmp_path):
    pretrain(tmp_path / "a")
    classify(tmp_path / "knn0", "a", 0.5, seed=0)
    classify(tmp_path / "knn1", "a", 0.5, seed=1)
    classify(tmp_path / "ft0", "a", 0.5, seed=0, kind="finetune")
    classify(tmp_path / "ft1", "a", 0.6, seed=1, kind="finetune")
    (row,) = rows(table(make_benchmark([tmp_path]), "Classification")).values()
    assert (row["knn.top1"].n, row["finetune.top1"].n) == (1, 2)


def test_names__two_runs_of_one_name_are_told_apart(tmp_path):
    pretrain(tmp_path / "x" / "run", seed=0)
    folder = pretrain(tmp_path / "y" / "run", seed=1, seconds=50.0)
    edit(folder, encoder_sha256="1" * 64)
    assert sorted(run.name for run in make_benchmark([tmp_path]).shown) == ["x/run", "y/run"]


def test_config__is_never_run(tmp_path):
    folder = pretrain(tmp_path / "run")
    (folder / "config.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nrun = dict(seed=5)\ndata = __import__('os')\n"
    )
    (run,) = make_benchmark([tmp_path]).shown
    assert run.facts["seed"] == 5
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------- nothing is lost

PARTS = st.sampled_from(
    [
        "finished",
        "unfinished",
        "broken",
        "copy",
        "classify",
        "random",
        "detection",
        "test",
        "cut",
        "odd",
        "empty",
        "nothing",
    ]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=st.lists(st.tuples(PARTS, st.integers(0, 3), st.sampled_from(["", "deep/er", "a"])), max_size=10),
    filtered=st.booleans(),
)
def test_discover__every_run_is_in_one_place(tmp_path_factory, tree, filtered):
    """However folders are mixed: runs found = in the tables + listed as problems + left out; and each just once."""
    root, num_runs = tmp_path_factory.mktemp("tree"), 0
    pretrain(root / "first")
    for i, (what, seed, below) in enumerate(tree):
        folder = root / below / f"{what}_{i}"
        num_runs += what != "nothing"
        if what in ("finished", "unfinished", "cut"):
            pretrain(folder, seed=seed, finished=what != "unfinished", seconds=10.0 + i)
        if what == "cut":
            text = (folder / "metrics.jsonl").read_text()
            (folder / "metrics.jsonl").write_text(text[: 40 * seed])
        if what == "broken":
            write(folder, environment={}).joinpath("summary.json").write_text("{")
        if what == "copy":
            shutil.copytree(root / "first", folder)
        if what in ("classify", "random"):
            classify(folder, "first" if what == "classify" else None, 0.1 * seed, seed=seed)
        if what == "detection":
            dense(folder, "detection", box_metrics(0.1) if seed else {}, "first", seed=seed)
        if what == "test":
            dense(folder, "segmentation", {"mIoU": 3.0}, "first", tta=bool(seed % 2), trained=f"detection_{seed}")
        if what == "odd":
            write(folder, summary={"status": "finished"})
        if what == "empty":
            folder.mkdir(parents=True)
            (folder / "plan.json").write_text("")
        if what == "nothing":
            write(folder, other={"a": 1})
    benchmark = make_benchmark([root], query="not seed == 1" if filtered else None)
    parts = [benchmark.shown, benchmark.running, benchmark.problems, benchmark.left_out]
    assert sum(map(len, parts)) == num_runs + 1 == len({run.path for part in parts for run in part})
    assert all(run.reason for run in benchmark.problems)
    tables = [one for one in make_tables(benchmark) if one.section in ("pretraining", "transfer", "other")]
    named = [name for one in tables for row in one.rows for name in row.runs]
    assert sorted(named) == sorted(run.name for run in benchmark.shown)


# -------------------------------------------------------------------- numbers


def test_summarize__empty_and_gaps():
    assert summarize([]) is None
    assert summarize([None, None]) is None
    assert summarize([None, 2.0]) == Statistic(2.0, None, 1)


def test_curve__places_between_log_lines_are_interpolated(tmp_path):
    pretrain(tmp_path / "run")
    (run,) = make_benchmark([tmp_path]).shown
    assert curve(run, "knn/top1").tolist() == [pytest.approx([2.0, 50.0, 30.0])]  # step 5 of 10, of 4 epochs and 100 s


def test_curve__a_resumed_log_repeats_steps(tmp_path):
    folder = pretrain(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4] + lines[2:]))
    (run,) = make_benchmark([tmp_path]).shown
    assert np.all(np.diff(curve(run, "loss")[:, 0]) >= 0)


@given(st.integers(1, 5000))
def test_thin__means_of_consecutive_points(num):
    points = np.stack([np.arange(num), np.arange(num), np.random.default_rng(num).normal(size=num)], axis=1).astype(
        float
    )
    kept = thin(points)
    assert len(kept) == min(num, MAX_POINTS)
    assert np.array_equal(kept[[0, -1]], points[[0, -1]])
    assert np.all(np.diff(kept[:, 0]) > 0)
    assert points[:, 2].min() <= kept[:, 2].min() <= kept[:, 2].max() <= points[:, 2].max()


def test_curve__a_long_log_takes_linear_time(tmp_path):
    folder = pretrain(tmp_path / "run")
    line = '{{"step": {0}, "equivalent_epochs": {0}e-4, "seconds": {0}.0, "compute_fraction": 0.5, "loss": 0.5, "lr": 0.1}}\n'
    (folder / "metrics.jsonl").write_text("".join(line.format(step) for step in range(1, 50_001)))
    (run,) = make_benchmark([tmp_path]).shown
    start = time.process_time()
    assert len(curve(run, "loss")) == 50_000
    assert time.process_time() - start < 1  # a quadratic search takes minutes
    figures = make_figures(make_benchmark([tmp_path]), [])
    (loss,) = [one for one in figures if one.id == "loss_1"]
    assert len(loss.rows) == MAX_POINTS
    assert "Up to 50,000 logged points" in loss.note


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imagenet (50,000 images, 1000 classes)", "ImageNet-1K"),
        ("ImageNet-1k (50,000 images, 1000 classes)", "ImageNet-1K"),
        ("imagenet_mini (100 images, 10 classes)", None),
        ("imagenet (100 images, 10 classes)", None),
        ("coco (5,000 images)", "COCO"),
        ("coco (6 images)", None),
        ("ADEChallengeData2016 (2,000 images)", "ADE20K"),
        ("ade", None),
    ],
)
def test_standard_set__by_name_and_number_of_images(name, expected):
    assert standard_set(name) == expected


def test_published__beside_ours_on_the_same_data_only(tmp_path):
    pretrain(tmp_path / "a")
    dense(tmp_path / "real", "detection", box_metrics(0.5), "a", data="coco", num_val=5000)
    dense(tmp_path / "small", "detection", box_metrics(0.5), "a", data="coco", num_val=50)
    real, small = (table(make_benchmark([tmp_path]), f"Detection: coco ({number}") for number in ("5,000", "50 "))
    published = {row.values["label"]: row for row in real.rows if row.published}
    vitdet = published["ViTDet-B, 100 epochs (ViTDet Mask R-CNN, MAE pre-trained)"]
    assert vitdet.values["box_ap"] == 51.6
    assert "official repository" in vitdet.published
    assert all(row.published == "" for row in small.rows)


def test_published__supervised_backbones_beside_ours(tmp_path):
    """Each value with its recipe; a claim that no author table has is marked."""
    metadata = {"objective": "supervised", "architecture": "swin_tiny_patch4_window7_224"}
    dense(tmp_path / "a", "detection", box_metrics(0.5), "swin", data="coco", num_val=5000, metadata=metadata)
    config = {"model": {"backbone": {"model_name": "swin_tiny_patch4_window7_224"}}}
    write(tmp_path / "a" / "20260101_000000" / "vis_data", config=config)
    benchmark = make_benchmark([tmp_path])
    found = table(benchmark, "Detection: coco")
    ours, *others = found.rows
    assert ours.values["label"].startswith("supervised swin_tiny_patch4_window7_224 (")
    (run,) = benchmark.shown
    assert run.facts["architecture"] == "swin_tiny_patch4_window7_224"
    published = {row.values["label"]: row for row in others if row.published}
    for label, box, mask, status in (
        ("Swin-T, EfficientTrain++ (Cascade Mask R-CNN 1x)", 48.4, 41.9, "author table"),
        ("Swin-T, EfficientTrain (RetinaNet 1x)", 41.8, None, "author table"),
        ("Swin-T, EfficientTrain++ (Mask R-CNN)", 46.9, 42.3, "blog claim"),
    ):
        row = published[label]
        assert (row.values["box_ap"], row.values.get("mask_ap")) == (box, mask)
        assert status in row.published


def test_published__baseline_and_curriculum_in_one_column_of_ours():
    (entry,) = [one for one in json.loads(REFERENCE.read_text())["tables"] if one["id"] == "supervised"]
    name = "imagenet (50,000 images, 1,000 classes)"
    found = _beside(name, "classify", [Column("supervised.top1", "top-1")], [entry])
    assert len(found) == 2 * len(entry["rows"])
    top1 = {row.values["label"]: row.values["supervised.top1"] for row in found}
    assert top1["CSWin-T, baseline (supervised training, top-1)"] == 82.7
    assert top1["CSWin-T, EfficientTrain++ (supervised training, top-1)"] == 82.9
    assert _beside(name, "classify", [Column("finetune.top1", "top-1")], [entry]) == []


def test_supervised__is_a_pretraining_and_a_result(tmp_path):
    """Its top-1 stands beside the published ones, and a detector from its backbone belongs to it."""
    supervised(tmp_path / "constant", 0.5, num_val=50_000)
    supervised(tmp_path / "etpp", 0.6, bands=ETPP, epochs=2.0, num_val=50_000)
    dense(tmp_path / "d", "detection", box_metrics(0.5), "etpp")
    benchmark = make_benchmark([tmp_path])
    assert rows(table(benchmark, "Runs and cost")).keys() == {
        "constant 32, 4 eq. epochs",
        "etpp 16-24-32, 2 eq. epochs",
    }
    assert "etpp 16-24-32, 2 eq. epochs" in rows(table(benchmark, "Detection"))
    found = table(benchmark, "Classification: imagenet (50,000 images")
    top1 = {label: values["supervised.top1"] for label, values in rows(found).items() if "supervised.top1" in values}
    assert top1["etpp 16-24-32, 2 eq. epochs"].mean == pytest.approx(60)
    assert top1["Swin-T, EfficientTrain++ (supervised training, top-1)"] == 81.6
    assert [column.key for column in found.columns if column.key.startswith("supervised.top1")] == [
        "supervised.top1", "supervised.top1.delta",
    ]  # fmt: skip
    (run,) = [run for run in benchmark.shown if run.name == "etpp"]
    assert (run.facts["model"], run.facts["target"]) == ("swin_tiny_patch4_window7_224, 32 px", "class labels")
