"""The discovery page from recorded curves whose truth is known."""

import csv

import numpy as np
import pytest

from mae_et.errors import UserError
from mae_et.report.discovery import Curve, filter_words, nearest_pair, reaches, read_study, separation
from mae_et.report.discovery_page import write_page
from mae_et.report.discovery_sections import SECTIONS
from mae_et.runs.record_files import write_record
from mae_et.runs.study import StudyRecord, StudyRun
from mae_et.storage.metrics_file import MetricsFile

STEPS = range(0, 101, 10)
LOW, HIGH = ("low_pass_circle_20", "low_pass_circle_60"), ("high_pass_circle_8", "high_pass_circle_32")


def line(mean, error=0.01, label="x"):
    mean = np.array(mean, dtype=float)
    return Curve(label, np.linspace(0, 1, len(mean)), mean, np.full(len(mean), error))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], None),  # the same
        ([0.1, 0.2, 0.28, 0.35, 0.4], 0.75),  # .02 is not above 2 x sqrt(2) x .01
        ([0.1, 0.1, 0.3, 0.3, 0.4], 0.75),  # below early, but not from there on
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0.0),
        ([0.1, 0.2, 0.3, 0.2, 0.5], None),  # together again at the end
        ([0.2, 0.4, 0.6, 0.8, 0.9], None),  # above
    ],
)
def test_separation__is_where_the_curve_falls_below_for_good(other, expected):
    assert separation(line([0.1, 0.2, 0.3, 0.4, 0.5]), line(other)) == expected


def test_separation__a_larger_standard_error_separates_later():
    baseline, other = line([0.1, 0.3, 0.5]), line([0.1, 0.25, 0.35])
    assert separation(baseline, other) == 0.5
    assert separation(line(baseline.mean, 0.04), line(other.mean, 0.04)) == 1.0


def test_reaches__is_linear_between_points():
    assert reaches(line([0.2, 0.6, 1.0]), 0.5) == 0.5
    assert reaches(line([0.2, 0.4, 1.0]), 0.5) == pytest.approx(0.5 + 0.5 / 3)
    assert reaches(line([1.3, 0.9, 0.5]), 0.5, start=1.0) == pytest.approx(0.5 + 0.5 * 0.15 / 0.4)
    assert reaches(line([0.5, 0.7, 0.5]), 0.5) is None


def test_nearest_pair__has_the_nearest_final_values():
    low, high = [line([0, a]) for a in (0.2, 0.5)], [line([0, a]) for a in (0.1, 0.45, 0.9)]
    assert nearest_pair(low, high) == (low[1], high[1])
    assert nearest_pair(low, []) is None


def test_filter_words__names_kind_radius_and_square():
    assert filter_words("low_pass_circle_20") == "low-pass, r = 20"
    assert filter_words("high_pass_square_7.5") == "high-pass, r = 7.5 (square)"


def accuracy(step, ceiling=1.0, speed=1.0):
    return min(0.1 + 0.8 * step * speed / 100, ceiling)


def write_study(folder, *, late="low_pass_circle_60", band_order=1, seeds=(0,)):
    """A study of an MAE: runs on r = 20 stop rising at 30% accuracy, on r = 60 at 60%, if `late` is r = 60."""
    ceilings = {LOW[0]: 0.3, LOW[1]: 0.6} if late == LOW[1] else {LOW[0]: 0.6, LOW[1]: 0.3}
    common = {"num_steps": 100, "equivalent_epochs": 4.0, "real_epochs": 4.0, "petaflops": 1.0, "bandwidth": None,
              "filter": None, "radius": None, "until": 1.0}  # fmt: skip
    studies = ["train_filtered", "val_filtered", "low_high", "prefix", "bands"]
    runs = []
    for seed in seeds:
        groups = [("baseline", {"variant": "baseline", "studies": studies})]
        for name in LOW:
            own = {"variant": "filter", "filter": name, "radius": float(name.rsplit("_", 1)[1])}
            groups.append((name, {**own, "studies": ["train_filtered"]}))
            groups.append((f"first50_{name}", {**own, "studies": ["prefix"], "until": 0.5}))
        groups.append(("first50_crop_48", {"variant": "crop", "bandwidth": 48, "until": 0.5, "equivalent_epochs": 2.4,
                                           "studies": ["prefix"]}))  # fmt: skip
        groups.append(
            ("first50_weak_augmentation", {"variant": "weak_augmentation", "until": 0.5, "studies": ["prefix"]})
        )
        runs += [StudyRun(name=f"{g}_seed{seed}", group=g, seed=seed, **{**common, **own}) for g, own in groups]
    record = StudyRecord(
        kind="pretrain", studies=studies, metric="knn/top1", num_val=1000, model="ViT", data="photos", image_size=112,
        norm_pix_loss=True, low_filters=list(LOW), high_filters=list(HIGH), notes=["a note"], runs=runs,
    )  # fmt: skip
    folder.mkdir(parents=True)
    write_record(folder / "study.json", record)
    for run in runs:
        path = folder / "runs" / run.name / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        file = MetricsFile(path)
        for step in STEPS:
            values = {"knn/top1": accuracy(step) + 0.002 * run.seed}
            if run.variant == "filter" and run.until == 1:
                values = {
                    "knn/top1": accuracy(step, 0.2),
                    f"knn/top1/{run.filter}": accuracy(step, ceilings[run.filter]),
                }
            if run.variant == "baseline":
                values |= {f"knn/top1/{name}": accuracy(step, ceilings[name]) for name in LOW}
                values |= {f"knn/top1/{HIGH[0]}": min(0.1 + 0.2 * (step / 100) ** 3, 0.9), f"knn/top1/{HIGH[1]}": 0.1}
                # Band k falls from 1 at a speed that depends on its place; the last two do not fall.
                place = [k if band_order == 1 else 7 - k for k in range(8)]
                values |= {
                    f"val/band_error_{k}": 1.0 if k > 5 else 0.2 + 0.8 * 0.5 ** (step / (4 + 4 * place[k]))
                    for k in range(8)
                }
            file.write({"step": step, **values})
        file.close()
    return folder


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_page__says_what_the_curves_show(tmp_path):
    text = write_page(write_study(tmp_path / "study")).read_text()
    assert "**A larger radius separates later, in these runs:** r = 20 at 40%, r = 60 at 70%" in text
    assert "**The low-pass curve rises faster, in this run.**" in text
    assert "low-pass, r = 20 and high-pass, r = 8" in text
    assert "**Lower bands come first, in this run**" in text
    assert "| 84 to 98 px | 1.00 | 1.000 | not learned |" in text
    assert "| crop to 48 px | 50% | 2.4 |" in text
    assert "Note: a note." in text
    assert "Not finished" not in text
    for name in ("train_filtered", "val_filtered", "low_high", "prefix", "bands"):
        assert (tmp_path / "study" / "figures" / f"{name}.png").stat().st_size > 10_000
        assert f"(figures/{name}.png)" in text
    facts = {
        row["line"]: row["value"]
        for row in rows_of(tmp_path / "study" / "figures" / "val_filtered.csv")
        if not row["x"]
    }
    assert facts == {"low-pass, r = 20": "40.0", "low-pass, r = 60": "70.0"}
    lines = [
        row
        for row in rows_of(tmp_path / "study" / "figures" / "train_filtered.csv")
        if row["line"] == "trained on r = 60"
    ]
    assert [float(row["value"]) for row in lines[:11]] == pytest.approx([100 * accuracy(step, 0.6) for step in STEPS])


def test_sections__say_when_the_curves_show_the_opposite(tmp_path):
    study = read_study(write_study(tmp_path / "study", late=LOW[0], band_order=-1))
    text, _ = SECTIONS["val_filtered"](study)
    assert "**The separation points are not in the order of the radii, in these runs:**" in text
    text, _ = SECTIONS["bands"](study)
    assert "**The order of the bands is mixed, in this run**: in 0 of 15 pairs" in text


def test_sections__flat_curves_give_no_statement(tmp_path):
    study = read_study(write_study(tmp_path / "study"))
    study.record = study.record.model_copy(update={"high_filters": [HIGH[1]]})
    assert (
        "**No statement: a curve of the pair rises by less than 2 standard errors.**" in SECTIONS["low_high"](study)[0]
    )


def test_sections__leave_out_runs_that_are_not_finished(tmp_path):
    folder = write_study(tmp_path / "study")
    metrics = folder / "runs" / "low_pass_circle_60_seed0" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:-1]))
    study = read_study(folder)
    assert study.unfinished == ["low_pass_circle_60_seed0"]
    _, (drawing,) = SECTIONS["train_filtered"](study)
    labels = [[one.curve.label for one in panel.lines] for panel in drawing.panels]
    assert labels == [["full images (baseline)", "trained on r = 20"]] * 2


def test_page__without_a_finished_baseline_says_so(tmp_path):
    folder = write_study(tmp_path / "study")
    (folder / "runs" / "baseline_seed0" / "metrics.jsonl").unlink()
    text = write_page(folder).read_text()
    assert text.count("Not drawn: the baseline is not finished") == 5
    assert r"**Not finished, and in no figure: baseline\_seed0.**" in text


def test_curve__is_the_mean_over_seeds_with_both_errors(tmp_path):
    study = read_study(write_study(tmp_path / "study", seeds=(0, 1, 2)))
    curve = study.curve("baseline", "knn/top1", "x")
    mean = accuracy(50) + 0.002
    assert curve.num_seeds == 3
    assert curve.mean[5] == pytest.approx(mean)
    assert curve.error[5] == pytest.approx(np.sqrt(mean * (1 - mean) / 1000 + 0.002**2 / 3))


def test_read_study__of_another_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="--figures-only"):
        read_study(tmp_path)
    (tmp_path / "study.json").write_text('{"kind": "pretrain"}')
    with pytest.raises(UserError, match="not a readable study"):
        read_study(tmp_path)
