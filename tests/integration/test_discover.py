"""`mae-et discover` from the command line to the page, with tiny runs of an MAE and of a classifier."""

import json

import pytest

from mae_et.commands import discover
from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.config.supervised import SupervisedConfig
from mae_et.errors import ConfigError, StoppedEarly, UserError
from mae_et.runs.record_files import read_json
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks import discovery
from mae_et.tasks.discovery import StudyOptions, plan_study
from tests.conftest import small_values

SCENES = {"train": "scenes:24@32,seed=3", "val": "scenes:24@32,seed=4"}


def mae_values(**overrides):
    return small_values(
        **{
            "data__train": SCENES["train"], "data__val": SCENES["val"], "curriculum__equivalent_epochs": 2.0,
            "model__depth": 1, "model__decoder_depth": 1, "run__log_interval": 3, **overrides,
        }
    )  # fmt: skip


def supervised_values(**overrides):
    values = small_values(data__train=SCENES["train"], data__val=SCENES["val"], curriculum__equivalent_epochs=2.0)
    values["model"] = {"name": "resnet18", "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}}
    values["curriculum"] |= {"preset": "etpp", "stages": []}
    values["regularization"] = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}
    del values["run"]["num_pictures"]
    return values | overrides


def mae_config(**overrides):
    return from_dict(PretrainConfig, mae_values(**overrides))


def run(tmp_path, values, *words):
    config = tmp_path / "config.py"
    config.write_text("\n".join(f"{key} = {value!r}" for key, value in values.items()))
    parser = discover.make_parser()
    discover.main(parser.parse_args([str(config), "--work-dir", str(tmp_path / "study"), "--device", "cpu", *words]))


MAE_WORDS = ("--study", "bands", "val_filtered", "low_high", "train_filtered", "--radii", "40", "--high-radii", "20",
             "--evaluations", "2")  # fmt: skip


def test_discover__mae_stops_and_continues_to_the_page(tmp_path, monkeypatch, capsys):
    """A study that is stopped keeps the finished run, and draws from all runs in the end."""
    study, runs = tmp_path / "study", []

    def stopping(task_type, config, folder, resume, device):
        if len(runs) == 1:
            raise StoppedEarly("stopped")
        runs.append(folder.name)
        return original(task_type, config, folder, resume, device)

    original = discovery.run_training
    monkeypatch.setattr(discovery, "run_training", stopping)
    with pytest.raises(StoppedEarly, match=r"run 2 of 2, low_pass_circle_40_seed0.*run the same command"):
        run(tmp_path, mae_values(), *MAE_WORDS)
    finished = (study / "runs" / "baseline_seed0" / "summary.json").stat().st_mtime_ns
    monkeypatch.setattr(discovery, "run_training", original)
    capsys.readouterr()
    run(tmp_path, mae_values(), *MAE_WORDS)
    table = capsys.readouterr().out
    assert table.splitlines()[1].split()[-2:] == ["3", "finished"]
    assert table.splitlines()[2].split()[-2:] == ["2", "new"]
    assert (study / "runs" / "baseline_seed0" / "summary.json").stat().st_mtime_ns == finished

    lines = [line for line in read_jsonl(study / "runs" / "baseline_seed0" / "metrics.jsonl") if "knn/top1" in line]
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert all({"knn/top1/low_pass_circle_40", "knn/top1/high_pass_circle_20"} <= set(line) for line in lines)
    config = (study / "runs" / "low_pass_circle_40_seed0" / "config.py").read_text()
    assert "radius=40.0" in config
    text = (study / "discovery.md").read_text()
    assert "Not finished" not in text
    for name in ("train_filtered", "val_filtered", "low_high", "bands"):
        assert (study / "figures" / f"{name}.png").exists()
        (study / "figures" / f"{name}.png").unlink()
    run(tmp_path, mae_values(), "--study", "bands", "--figures-only")
    assert (study / "figures" / "bands.png").exists()

    with pytest.raises(UserError, match=r"holds a run of another config:\n  - data\.val_filters"):
        run(tmp_path, mae_values(), "--study", "val_filtered", "--radii", "60", "--dry-run")


def test_discover__classifier_to_the_page(tmp_path, capsys):
    words = ("--study", "train_filtered", "low_high", "--radii", "40", "--high-radii", "20", "--evaluations", "2")
    run(tmp_path, supervised_values(), *words)
    assert "note: all runs train at full size: curriculum.preset = 'etpp' becomes 'constant'" in capsys.readouterr().out
    folder = tmp_path / "study" / "runs"
    baseline = [line for line in read_jsonl(folder / "baseline_seed0" / "metrics.jsonl") if "val/top1" in line]
    assert [line["step"] for line in baseline] == [3, 6]
    assert all({"val/top1/low_pass_circle_40", "val/top1/high_pass_circle_20"} <= set(line) for line in baseline)
    other = [line for line in read_jsonl(folder / "low_pass_circle_40_seed0" / "metrics.jsonl") if "val/top1" in line]
    assert other[-1]["val/loss"] != baseline[-1]["val/loss"]
    study = read_json(tmp_path / "study" / "study.json")
    assert (study["kind"], study["metric"], study["num_val"], study["model"]) == (
        "supervised",
        "val/top1",
        24,
        "resnet18",
    )
    assert "top-1 on 24 validation images" in (tmp_path / "study" / "discovery.md").read_text()


def planned(config, *studies, **options):
    return {run.record.group: run for run in plan_study(config, StudyOptions(studies, **options)).runs}


def test_plan_study__prefix_shows_as_many_images_for_less_compute(tmp_path):
    config = mae_config(data__augmentation={"ramp": "crop_scale"}, curriculum__equivalent_epochs=20.0)
    runs = planned(config, "prefix", radii=(40.0,), bandwidths=(16,), parts=(0.5,))
    assert set(runs) == {"baseline", "first50_low_pass_circle_40", "first50_crop_16", "first50_weak_augmentation"}
    full, crop = runs["baseline"].plan, runs["first50_crop_16"].plan
    assert [stage.bandwidth for stage in crop.stages] == [16, 32]
    assert [stage.num_images for stage in crop.stages] == [full.num_images // 2] * 2
    assert crop.planned_equivalent_epochs == pytest.approx(full.planned_equivalent_epochs * 0.625)
    assert crop.warmup_fraction == pytest.approx(full.warmup_fraction)
    weak = runs["first50_weak_augmentation"].plan
    assert [weak.strength(step) for step in (0, weak.num_steps // 2 - 1, weak.num_steps // 2)] == [0.0, 0.0, 1.0]
    assert {full.strength(step) for step in range(full.num_steps)} == {1.0}
    own = runs["first50_low_pass_circle_40"].config.data.filter
    assert (own.kind, own.radius, own.until) == ("low_pass", 40.0, 0.5)


def test_plan_study__default_crops_are_those_of_etpp_and_seeds_repeat_all():
    runs = plan_study(mae_config(), StudyOptions(("prefix",), radii=(), parts=(0.25,), seeds=(3, 5))).runs
    assert [run.record.name for run in runs] == [
        f"{group}_seed{seed}" for seed in (3, 5) for group in ("baseline", "first25_crop_16", "first25_crop_24")
    ]
    assert [run.config.run.seed for run in runs] == [3] * 3 + [5] * 3


def test_plan_study__classifier_keeps_its_drop_path():
    values = supervised_values()
    values["model"] |= {"drop_path_rate": 0.1, "drop_path_epochs": 4.0}
    runs = planned(from_dict(SupervisedConfig, values), "prefix", radii=(), bandwidths=(16,), parts=(0.5,))
    model, curriculum = (runs["first50_crop_16"].config.model, runs["first50_crop_16"].config.curriculum)
    assert curriculum.equivalent_epochs / model.drop_path_epochs == pytest.approx(2.0 / 4.0)


@pytest.mark.parametrize(
    ("config", "studies", "options", "words"),
    [
        ({"data__val": None}, ("val_filtered",), {}, "data.val is missing: val_filtered"),
        ({"data__filter": {"kind": "low_pass"}}, ("bands",), {}, "data.filter.kind = 'low_pass'"),
        ({"model__target": "hog"}, ("bands",), {}, "the study bands needs 'pixels'"),
        ({}, ("prefix",), {"parts": (1.5,)}, "parts = [1.5]"),
        ({}, ("bands",), {"num_evaluations": 0}, "evaluations = 0"),
        ({}, ("val_filtered",), {"radii": (20.0, 20.0)}, "radii = [20.0, 20.0] has a value more than once"),
        ({}, ("train_filtered",), {"radii": (5.0,)}, "0.71 cycles per image"),
        ({}, ("prefix",), {"bandwidths": (40,)}, "exceeds data.image_size = 32"),
    ],
)
def test_plan_study__faults_are_named(config, studies, options, words):
    with pytest.raises(ConfigError) as caught:
        plan_study(mae_config(**config), StudyOptions(studies, **options))
    assert words in str(caught.value)


def test_plan_study__bands_of_a_classifier_are_refused():
    with pytest.raises(ConfigError, match="give a pre-training config"):
        plan_study(from_dict(SupervisedConfig, supervised_values()), StudyOptions(("bands",)))


def test_plan_study__names_what_acts_after_the_filter():
    config = from_dict(
        SupervisedConfig, supervised_values(regularization={"mixup": 0.0, "cutmix": 0.0, "erasing": 0.25})
    )
    notes = plan_study(config, StudyOptions(("train_filtered",), radii=(40.0,))).record.notes
    assert any("regularization.erasing act after the filter" in note for note in notes)
    assert json.dumps(notes).count("regularization.cutmix") == 0


def test_discover__several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        run(tmp_path, mae_values(), *MAE_WORDS)
