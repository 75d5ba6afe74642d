"""The examples of docs/guides/extending.md run, and touch what the guide says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mae_et.config.files import load_config, save_config
from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict
from mae_et.curriculum.cost import mae_cost
from mae_et.curriculum.plan import make_plan
from mae_et.data.inspection import inspect_images
from mae_et.errors import ConfigError, DataError
from mae_et.models.targets import patchify
from mae_et.runs.record_files import read_summary
from mae_et.runs.records import PretrainSummary
from mae_et.storage.backbone import load_encoder, read_backbone
from mae_et.tasks.classify import classify
from mae_et.tasks.run import run_training
from tests.conftest import REPOSITORY, Stop, killed_before, losses, small_values

EXAMPLES = REPOSITORY / "docs" / "examples"


def load_example(name: str) -> ModuleType:
    """Imports docs/examples/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run(task_type: Any, work_dir: Path, resume: bool = False, **overrides: Any) -> dict[str, Any]:
    config = from_dict(PretrainConfig, small_values(**overrides))
    return run_training(task_type, config, work_dir, resume=resume, device="cpu")


# -------------------------------------------------------------------- a task


def test_task__learns_and_writes_a_backbone(tmp_path):
    task = load_example("add_task").DenoisingTask
    summary = run(task, tmp_path / "run")
    assert summary["last_loss"] < 0.8 * summary["first_loss"]
    assert isinstance(read_summary(tmp_path / "run" / "summary.json"), PretrainSummary)
    _, metadata = read_backbone(tmp_path / "run" / "backbone.safetensors")
    assert (metadata["objective"], metadata["encoder_sha256"]) == ("denoising", summary["encoder_sha256"])


def test_task__backbone_has_the_features_of_the_model(tmp_path):
    """The encoder in timm's ViT gives what the head of the example sees."""
    module = load_example("add_task")
    torch.manual_seed(0)
    model = module.Denoiser(32, 8, 3, embed_dim=48, depth=2, num_heads=3)
    seen: list[torch.Tensor] = []
    model.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    images = torch.randn(2, 3, 32, 32)
    model(images, torch.zeros_like(images))
    encoder = {key: value for key, value in model.state_dict().items() if not key.startswith("pixels.")}
    module.write_backbone(encoder, tmp_path / "backbone.safetensors", "timm", {"num_heads": "3"})
    features = load_encoder(tmp_path / "backbone.safetensors", 32).forward_features(images)
    torch.testing.assert_close(features, seen[0], atol=1e-5, rtol=1e-5)


def test_task__is_judged_as_any_other(tmp_path):
    trained = run(load_example("add_task").DenoisingTask, tmp_path / "run")
    model = {"size": "tiny", "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    values = {
        "data": {**small_values()["data"], "val": "scenes:12@32,seed=4"},
        "model": model, "protocol": "knn", "knn": {"ks": [3]}, "backbone": str(tmp_path / "run"),
    }  # fmt: skip
    summary = classify(from_dict(ClassifyConfig, values), tmp_path / "knn", device="cpu")
    assert summary["initial_weights"]["encoder_sha256"] == trained["encoder_sha256"]


def test_task__resumes_to_the_same_losses(tmp_path):
    task = load_example("add_task").DenoisingTask
    run(task, tmp_path / "whole")
    with pytest.raises(Stop):
        run(killed_before(task, 14), tmp_path / "killed")
    run(task, tmp_path / "killed", resume=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_task__accumulation_leaves_losses_unchanged(tmp_path):
    task = load_example("add_task").DenoisingTask
    run(task, tmp_path / "one")
    run(task, tmp_path / "four", batch__micro_batch_size=2)
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert four == pytest.approx(one, rel=1e-4)


def test_task__touches_tasks_and_models_alone():
    """What the example defines belongs to models/ (the network) and tasks/ (the task); it changes nothing else."""
    module = load_example("add_task")
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == "add_task"}
    assert own == {"Denoiser", "DenoisingTask", "make_parser", "main"}


# -------------------------------------------------------------------- a target


def test_target__cell_means():
    module = load_example("add_target")
    image = torch.rand(1, 3, 16, 16)
    got = module.cell_means(patchify(image, 8), 8)
    means = torch.nn.functional.avg_pool2d(image, 4)
    expected = patchify(means.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3), 8)
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="not a multiple"):
        module.cell_means(patchify(image, 2), 2)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_target__trains(tmp_path, norm_pix_loss):
    summary = run(load_example("add_target").CoarseTask, tmp_path / "run", model__norm_pix_loss=norm_pix_loss)
    assert summary["last_loss"] < summary["first_loss"]
    _, metadata = read_backbone(tmp_path / "run")
    assert metadata["objective"] == "mae, cell means"
    assert "target" not in metadata


def test_target__another_target_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'hog' is not used here"):
        run(load_example("add_target").CoarseTask, tmp_path / "run", model__target="hog")


# -------------------------------------------------------------------- a data source


@pytest.fixture
def array_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (20, 40, 48, 3), dtype=np.uint8))
    return tmp_path / "images.npy"


def test_source__is_a_source(array_file):
    source = load_example("add_source").ArraySource(array_file)
    assert len(source) == 20
    assert np.array_equal(np.asarray(source.load(3)), np.load(array_file)[3])
    assert source.name(3).endswith("images.npy[3]")
    assert inspect_images(source, None, 32).to_dict() is not None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_source__trains(tmp_path, array_file, num_workers):
    """With loader processes too: the source goes to them and opens the file there."""
    task = load_example("add_source").ArrayTask
    overrides = {"data__train": str(array_file), "data__num_workers": num_workers}
    summary = run(task, tmp_path / "run", **overrides)
    assert summary["dataset_size"] == 20


@pytest.mark.parametrize(
    "array", [np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 3), np.float32), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_source__wrong_arrays_are_refused(tmp_path, array):
    np.save(tmp_path / "wrong.npy", array)
    with pytest.raises(DataError, match="save an array"):
        load_example("add_source").ArraySource(tmp_path / "wrong.npy")


def test_source__no_array_is_refused(tmp_path):
    (tmp_path / "text.npy").write_text("no array")
    for path in (tmp_path / "text.npy", tmp_path / "absent.npy"):
        with pytest.raises(DataError, match="cannot be read"):
            load_example("add_source").ArraySource(path)


# -------------------------------------------------------------------- a preset


def test_preset__plans_two_stages():
    config = load_config(PretrainConfig, EXAMPLES / "add_preset.py")
    plan = make_plan(config, mae_cost(config.model), 500)
    assert [stage.bandwidth for stage in plan.stages] == [32, 64]
    assert [stage.compute_fraction for stage in plan.stages] == pytest.approx([0.5, 0.5], abs=0.01)


# -------------------------------------------------------------------- as commands


@pytest.mark.parametrize("name", ["add_task", "add_target", "add_source"])
def test_command__runs(tmp_path, array_file, name):
    save_config(from_dict(PretrainConfig, small_values()), tmp_path / "config.py", "A small run.")
    words = [str(tmp_path / "config.py"), str(tmp_path / "run")]
    module = load_example(name)
    module.main(module.make_parser().parse_args([str(array_file), *words] if name == "add_source" else words))
    assert (tmp_path / "run" / "backbone.safetensors").is_file()
