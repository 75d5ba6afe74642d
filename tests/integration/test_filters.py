"""Filters of a run's images, accuracies on filtered images and the error by band, in whole small runs."""

import pytest
import torch

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.engine.distributed import World, join_world
from mae_et.errors import ConfigError
from mae_et.evaluation.bands import band_errors
from mae_et.frequency import high_pass, low_pass
from mae_et.lowfreq import crop_and_normalize
from mae_et.storage.backbone import read_backbone
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks import bands
from mae_et.tasks.masks import place_noise
from mae_et.tasks.pretrain import MAETask, pretrain
from tests.conftest import losses, small_values
from tests.plans import plan_for

LOW = {"kind": "low_pass", "radius": 35.0}  # 5 cycles per image of 32 px


@pytest.fixture(autouse=True)
def _all_images(monkeypatch):
    """The error by band is that of up to 128 images, as for a user; see conftest.py."""
    monkeypatch.setattr(bands, "NUM_IMAGES", 128)


def make_task(tmp_path, **overrides):
    config = from_dict(PretrainConfig, small_values(**overrides))
    data = MAETask.open_data(config)
    with join_world("cpu") as world:
        return MAETask(config, data, plan_for(config, len(data.train)), world, tmp_path)


@pytest.mark.parametrize("bandwidth", [16, 32])
@pytest.mark.parametrize(("kind", "function"), [("low_pass", low_pass), ("high_pass", high_pass)])
def test_preprocess__filters_the_normalized_crop(tmp_path, kind, function, bandwidth):
    task = make_task(tmp_path, data__filter={**LOW, "kind": kind, "shape": "square"})
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalized = crop_and_normalize(images, bandwidth, (0.5,) * 3, (0.25,) * 3, centered=True)
    torch.testing.assert_close(task.preprocess(images, bandwidth), function(normalized, 5.0, "square"))


def test_preprocess__filters_until_a_fraction_of_the_compute(tmp_path):
    task = make_task(tmp_path, data__filter={**LOW, "until": 0.5})
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    plain = crop_and_normalize(images, 32, (0.5,) * 3, (0.25,) * 3, centered=True)
    is_filtered = []
    steps = range(task.plan.num_steps)
    for step in steps:
        task.step = step
        is_filtered.append(not torch.allclose(task.preprocess(images, 32), plain, atol=1e-4))
    assert is_filtered == [task.plan.compute_fraction(step) < 0.5 for step in steps]
    assert 0 < sum(is_filtered) < task.plan.num_steps


def test_pretrain__trains_on_filtered_images_up_to_the_fraction(tmp_path):
    """Until the fraction the losses are those of a run that filters to its end; from there on they differ."""
    runs = {"whole": LOW, "first": {**LOW, "until": 0.2}}
    for name, settings in runs.items():
        pretrain(from_dict(PretrainConfig, small_values(data__filter=settings)), tmp_path / name)
    whole, first = (losses(tmp_path / name) for name in runs)
    plan = make_task(tmp_path).plan
    end = next(step for step in range(plan.num_steps) if plan.compute_fraction(step) >= 0.2)
    assert all(first[step] == whole[step] for step in range(1, end + 1))
    assert all(first[step] != whole[step] for step in range(end + 1, plan.num_steps + 1))
    metadata = read_backbone(tmp_path / "first" / "backbone.safetensors")[1]
    assert '"until": 0.2' in metadata["filter"]
    check_bands_are_logged(tmp_path / "whole", plan)


def check_bands_are_logged(work_dir, plan):
    lines = {line["step"]: line for line in read_jsonl(work_dir / "metrics.jsonl") if "val/band_error_0" in line}
    fractions = [0, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 11))]
    steps = {
        next(step for step in range(plan.num_steps + 1) if plan.compute_fraction(step) > f - 1e-9) for f in fractions
    }
    assert set(lines) == steps | {stage.first_step + stage.num_steps for stage in plan.stages}
    for line in lines.values():
        assert sorted(line) == ["step", *(f"val/band_error_{k}" for k in range(8))]


def test_band_hook__is_due_on_all_processes_alike(tmp_path):
    """The hook gathers over all processes and follows the times of the other hooks, so all processes need the same hooks."""
    overrides = {
        "run__num_pictures": 6,
        "run__picture_interval": 1,
        "run__knn_interval": 7,
        "data__val": "scenes:20@32,seed=4",
    }
    config = from_dict(PretrainConfig, small_values(**overrides))
    data, times = MAETask.open_data(config), []
    plan = plan_for(config, len(data.train))
    for rank in (0, 1):
        task = MAETask(config, data, plan, World(rank, 2, 2, torch.device("cpu")), tmp_path)
        (hook,) = [hook for hook in task.hooks if isinstance(hook, bands.BandHook)]
        times.append([step for step in range(plan.num_steps + 1) if hook.due(step)])
    assert times[0] == times[1]
    assert times[0] == list(range(plan.num_steps + 1))


def test_band_hook__is_the_error_of_all_images(tmp_path, monkeypatch):
    """Neither the split into chunks nor an unreadable image changes what is measured on the others."""
    task = make_task(tmp_path)
    task.model.eval()
    (hook,) = [hook for hook in task.hooks if isinstance(hook, bands.BandHook)]
    whole = hook(0, None)
    (images, places), *others = hook.parts
    assert not others
    assert places.tolist() == list(range(20))
    inputs = crop_and_normalize(images, 32, (0.5,) * 3, (0.25,) * 3, centered=True)
    error, power = band_errors(task.model, inputs, 0.5, place_noise(places, 16, 0), (0.25,) * 3, 8).double().sum(dim=0)
    assert whole == pytest.approx({f"val/band_error_{k}": float(error[k] / power[k]) for k in range(8)})
    monkeypatch.setattr(bands, "CHUNK", 7)
    assert bands.BandHook(task, hook.source)(0, None) == pytest.approx(whole)


def test_pretrain__accuracy_on_filtered_images_is_that_of_filtered_images(tmp_path):
    """A filter that changes nothing visible gives the plain accuracy, an extreme one another."""
    filters = [
        {"kind": "low_pass", "radius": 158.0},
        {"kind": "low_pass", "radius": 7.1},
        {"kind": "high_pass", "radius": 20.0},
    ]
    values = small_values(
        data__train="scenes:60@32,seed=3", data__val="scenes:60@32,seed=4", data__val_filters=filters,
        curriculum__equivalent_epochs=1.1, run__knn_interval=3,
    )  # fmt: skip
    pretrain(from_dict(PretrainConfig, values), tmp_path)
    lines = [line for line in read_jsonl(tmp_path / "metrics.jsonl") if "knn/top1" in line]
    assert [line["step"] for line in lines][:3] == [0, 3, 6]
    near, low, high = (
        f"knn/top1/{name}" for name in ("low_pass_circle_158", "low_pass_circle_7.1", "high_pass_circle_20")
    )
    assert all(set(line) == {"step", "knn/top1", near, low, high} for line in lines)
    assert all(abs(line["knn/top1"] - line[near]) < 0.04 for line in lines)
    assert any(line["knn/top1"] != line[low] for line in lines)
    assert any(line[high] != line[low] for line in lines)


def test_pretrain__hog_has_no_error_by_band(tmp_path):
    task = make_task(tmp_path, model__target="hog", model__norm_pix_loss=True)
    assert not [hook for hook in task.hooks if isinstance(hook, bands.BandHook)]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"filter": {"radius": 20.0}}, "filter.radius = 20.0 has no effect with kind = 'none'"),
        ({"filter": {"kind": "low_pass", "radius": 159.0}}, "radius = 159 holds the whole spectrum"),
        ({"filter": {"kind": "low_pass", "radius": 112.0, "shape": "square"}}, "which ends at 112"),
        ({"filter": {"kind": "low_pass", "radius": 6.0}}, "0.86 cycles per image at image_size = 32"),
        ({"val_filters": [LOW]}, "val_filters has no effect without val"),
        ({"val": "x", "val_filters": [LOW, LOW]}, "has low_pass_circle_35 more than once"),
        ({"val": "x", "val_filters": [{"kind": "none", "radius": 5.0}]}, "must be one of 'low_pass', 'high_pass'"),
    ],
)
def test_config__faulty_filters_are_refused(overrides, words):
    values = small_values()
    values["data"] |= overrides
    with pytest.raises(ConfigError) as caught:
        from_dict(PretrainConfig, values)
    assert words in str(caught.value)
