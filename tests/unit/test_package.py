"""The Python interface of the package, and its configs by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mae_et
from mae_et.config import shipped
from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict
from mae_et.config.shipped import find_config, shipped_configs
from mae_et.errors import ConfigError, UserError
from mae_et.models.mae import MaskedAutoencoder
from tests.conftest import REPOSITORY, small_values

BOTH = ("detection", "segmentation")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 12 images in two classes."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(12):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), np.uint8)).save(path)
    return root


# ---- configs by name ----


def test_shipped_configs__are_all_files_but_the_base_files():
    files = {path for path in (REPOSITORY / "configs").glob("*/*.py") if path.parent.name != "_base_"}
    assert set(shipped_configs().values()) == files
    assert shipped_configs()["pretrain/demo"] == REPOSITORY / "configs/pretrain/demo.py"


@pytest.mark.parametrize(
    ("name", "kinds", "expected"),
    [
        ("demo", ("pretrain",), "pretrain/demo"),
        ("mae_base_etpp_400e_imagenet", ("pretrain",), "pretrain/mae_base_etpp_400e_imagenet"),
        ("detection/demo", BOTH, "detection/demo"),
        ("coco_mini", BOTH, "detection/coco_mini"),
        ("configs/pretrain/demo.py", ("classification",), "pretrain/demo"),
        ("pretrain/demo.py", ("pretrain",), "pretrain/demo"),
        ("cifar10_knn", ("pretrain",), "classification/cifar10_knn"),  # the schema then says what runs it
    ],
)
def test_find_config__from_any_folder(name, kinds, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of this name is in no one's way
    assert find_config(name, kinds) == REPOSITORY / f"configs/{expected}.py"


def test_find_config__existing_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("")
    assert find_config("demo", ("pretrain",)) == Path("demo")


@pytest.mark.parametrize(
    ("name", "kinds", "messages"),
    [
        ("demo", BOTH, ["2 shipped configs", "detection/demo, segmentation/demo"]),
        (
            "demo",
            ("classification",),
            ["are for other commands; did you mean classification/demo_attentive, cl"],
        ),
        ("dmo", ("pretrain",), ["no config has this name", "did you mean pretrain/demo"]),
        ("detection/dmo", BOTH, ["no config has this name", "detection/demo"]),
        ("zzz", ("classification",), ["classification/cifar10_finetune", "more"]),
        ("_base_/scenes", ("pretrain",), ["no config has this name"]),
        ("mine.py", ("pretrain",), ["no such file", "the current folder is"]),
        (".", ("pretrain",), ["is a folder"]),
    ],
)
def test_find_config__candidates(name, kinds, messages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        find_config(name, kinds)
    for message in messages:
        assert message in str(error.value)


def test_shipped_folder__of_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "mae_et/configs/pretrain").mkdir(parents=True)
    (tmp_path / "mae_et/configs/pretrain/x.py").write_text("")
    monkeypatch.setattr(mae_et, "__file__", str(tmp_path / "mae_et/__init__.py"))
    assert list(shipped.shipped_configs()) == ["pretrain/x"]


# ---- the interface ----


def test_public_names__exist_and_are_listed():
    for name in mae_et.__all__:
        assert getattr(mae_et, name) is not None
        assert name in dir(mae_et)
    assert mae_et.MaskedAutoencoder is MaskedAutoencoder
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        _ = mae_et.pretrian
    assert (Path(mae_et.__file__).parent / "py.typed").is_file()


def test_pretrain__folder_to_encoder_to_accuracy(photos, tmp_path):
    config = from_dict(PretrainConfig, small_values())
    summary = mae_et.pretrain(photos, tmp_path / "run", config, {"curriculum.equivalent_epochs": 8.0})
    assert summary["num_images"] > 12
    encoder = mae_et.load_encoder(tmp_path / "run")
    images = torch.rand(2, 3, 32, 32)
    assert encoder.forward_features(images).shape == (2, 1 + 16, 48)
    larger = mae_et.load_encoder(tmp_path / "run", 64, num_classes=5, global_pool="avg")
    assert larger(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(UserError, match="channels"):
        mae_et.load_encoder(tmp_path / "run", in_chans=1)

    model = {"size": "tiny", "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "pool": "avg"}
    data = {"image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    knn = {"data": data, "model": model, "knn.ks": [3]}
    result = mae_et.classify(tmp_path / "run", photos, photos, tmp_path / "knn", overrides=knn)
    assert 0 <= result["top1"] <= 1
    assert (tmp_path / "knn/summary.json").is_file()


def test_load_encoder__of_one_channel_needs_no_option(photos, tmp_path):
    config = from_dict(PretrainConfig, small_values(model__in_chans=1, data__mean=[0.5], data__std=[0.25]))
    mae_et.pretrain(photos, tmp_path / "run", config)
    assert mae_et.load_encoder(tmp_path / "run").forward_features(torch.rand(1, 1, 32, 32)).shape == (1, 17, 48)


def seen_config(task: str, monkeypatch: pytest.MonkeyPatch, call):
    """Returns the config and the other arguments that a call of the interface hands to the task."""
    seen = []
    monkeypatch.setattr(f"mae_et.tasks.{task}.{task}", lambda *args: seen.append(args) or {})
    call()
    return seen[0]


def test_pretrain__data_of_a_named_config_is_replaced(monkeypatch, tmp_path):
    call = lambda **options: lambda: mae_et.pretrain("d", tmp_path, **options)  # noqa: E731
    config, *rest = seen_config("pretrain", monkeypatch, call(config="demo"))
    assert (config.data.train, config.data.val, config.data.num_images) == ("d", None, None)
    assert rest == [str(tmp_path), False, None]
    config, *_ = seen_config("pretrain", monkeypatch, call(config="demo", overrides={"data": {"val": "v"}}))
    assert (config.data.train, config.data.val) == ("d", "v")
    own = from_dict(PretrainConfig, small_values(data__val="own"))
    config, *_ = seen_config("pretrain", monkeypatch, call(config=own))
    assert (config.data.train, config.data.val) == ("d", "own")


def test_classify__arguments_reach_the_config(monkeypatch, tmp_path):
    call = lambda: mae_et.classify(None, "t", "v", tmp_path, resume=True, device="cpu")  # noqa: E731
    config, *rest = seen_config("classify", monkeypatch, call)
    assert (config.protocol, config.backbone, config.data.train, config.data.val) == ("knn", None, "t", "v")
    assert rest == [str(tmp_path), True, "cpu"]


def test_interface__faults_are_user_errors(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean run\.seed"):
        mae_et.pretrain(photos, tmp_path / "run", "demo", {"run.sed": 1})
    with pytest.raises(ConfigError, match="did you mean pretrain/demo"):
        mae_et.pretrain(photos, tmp_path / "run", "dmo")
    with pytest.raises(ConfigError, match="classification config"):
        mae_et.pretrain(photos, tmp_path / "run", from_dict(ClassifyConfig, {"data": {"train": "a", "val": "b"}}))
    with pytest.raises(UserError, match="does not exist"):
        mae_et.pretrain(tmp_path / "missing", tmp_path / "run", "demo")
    assert not (tmp_path / "run").exists()


def test_make_plan__sizes_and_overrides():
    plan = mae_et.make_plan("demo", overrides={"curriculum.preset": "constant"})
    assert (len(plan.stages), plan.dataset_size) == (1, 4000)
    assert mae_et.make_plan(dataset_size=512, world_size=2).stages[0].micro_batch_size == 128
    with pytest.raises(UserError, match="give dataset_size"):
        mae_et.make_plan()
