"""Configs: every fault named at once, files and overrides, what a resumed run may change."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from mae_et.config.files import load_config, save_config
from mae_et.config.schema import (
    RESUME_FREE,
    AugmentationConfig,
    ClassifyConfig,
    CurriculumConfig,
    ModelConfig,
    PretrainConfig,
    StageConfig,
    changed_keys,
    from_dict,
    to_dict,
)
from mae_et.config.section import Section
from mae_et.config.supervised import SupervisedConfig
from mae_et.errors import ConfigError
from mae_et.models.sizes import MAE_SIZES
from tests.plans import plan_for

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN_CONFIGS = sorted((ROOT / "configs" / "pretrain").glob("**/*.py"))
FULL = {
    "data": {
        "train": "photos",
        "val": "more",
        "image_size": 64,
        "num_images": 1000,
        "mean": [0.5],
        "std": [0.25],
        "augmentation": {"ramp": "crop_scale", "min_scale": 0.3, "flip": False},
        "num_workers": 0,
        "max_bad_fraction": 0,
    },
    "model": {"size": "tiny", "patch_size": 8, "in_chans": 1, "mask_ratio": 0.6, "norm_pix_loss": False},
    "curriculum": {
        "preset": "custom",
        "stages": [
            {"compute_fraction": 0.25, "bandwidth": 32, "strength": 0, "global_batch_size": 512},
            {"compute_fraction": 0.75, "bandwidth": 64},
        ],
        "equivalent_epochs": 10,
        "warmup_equivalent_epochs": 0,
        "centered": False,
    },
    "batch": {"global_batch_size": 256, "micro_batch_size": 32},
    "optimizer": {"base_lr": 1e-3, "betas": [0.9, 0.99], "clip_grad_norm": 3},
    "run": {"seed": 7, "precision": "bf16", "compile": True},
}


def faults_of(values, cls=PretrainConfig):
    with pytest.raises(ConfigError) as caught:
        from_dict(cls, values)
    return caught.value.faults


def with_value(dotted, value):
    values = json.loads(json.dumps(FULL))
    node = values
    *parents, last = dotted.split(".")
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
    node[last] = value
    return values


# ---- from_dict ----


def test_from_dict__defaults_are_maes():
    config = from_dict(PretrainConfig, {"data": {"train": "photos"}})
    assert config.model == ModelConfig(size="base", mask_ratio=0.75, norm_pix_loss=True)
    assert (config.optimizer.base_lr, config.optimizer.betas, config.optimizer.weight_decay) == (
        1.5e-4,
        (0.9, 0.95),
        0.05,
    )
    assert (config.batch.global_batch_size, config.data.image_size, config.curriculum.preset) == (
        4096,
        (224, 224),
        "etpp",
    )
    assert (config.curriculum.equivalent_epochs, config.curriculum.warmup_equivalent_epochs) == (400, 40)
    assert config.data.augmentation == AugmentationConfig(ramp="none", min_scale=0.2, flip=True)


def test_from_dict__converts_to_the_declared_types():
    config = from_dict(PretrainConfig, FULL)
    assert config.curriculum.stages == (
        StageConfig(compute_fraction=0.25, bandwidth=32, strength=0.0, global_batch_size=512),
        StageConfig(compute_fraction=0.75, bandwidth=64),
    )
    assert config.optimizer.betas == (0.9, 0.99)
    assert isinstance(config.curriculum.equivalent_epochs, float)  # written as an int
    assert isinstance(config.optimizer.clip_grad_norm, float)
    assert config.data.mean == (0.5,)
    with pytest.raises(ValidationError, match="frozen"):
        config.run.seed = 1


def test_from_dict__names_all_faults_at_once():
    faults = faults_of(
        {
            "data": {"train": 3, "image_sise": 64, "std": [0.1, -1, 0.1], "augmentation": {"flip": "yes"}},
            "model": {"size": "bas", "mask_ratio": 1.0, "in_chans": 0},
            "curriculum": {"preset": "etpp", "stages": [{"compute_fraction": 0.5}], "warmup_equivalent_epochs": 900},
            "batch": {"global_batch_size": 0},
            "optimizer": {"betas": [0.9]},
            "run": {"seed": True},
            "optimiser": {},
        }
    )
    expected = [
        "data.train = 3 must be a str",
        "unknown key data.image_sise; did you mean data.image_size?",
        "data.std[1] = -1 must be > 0",
        "data.augmentation.flip = 'yes' must be a bool",
        "model.size = 'bas' must be one of 'tiny', 'small', 'base', 'large', 'huge', 'giant', '2b'; did you mean 'base'?",
        "model.mask_ratio = 1.0 must be > 0 and < 1",
        "model.in_chans = 0 must be >= 1",
        "curriculum.stages[0].bandwidth is missing",
        "curriculum.stages has no effect with preset = 'etpp': remove it, or set preset = \"custom\"",
        "curriculum.stages: the values of compute_fraction must add up to 1, not 0.5",
        "curriculum.warmup_equivalent_epochs = 900 must be below equivalent_epochs = 400",
        "batch.global_batch_size = 0 must be >= 1",
        "optimizer.betas = [0.9] must have 2 values",
        "run.seed = True must be an int",
        "unknown key optimiser; did you mean optimizer?",
    ]
    assert sorted(faults) == sorted(expected)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("data.image_size", 64.0, "data.image_size = 64.0 must be an int"),
        ("data.image_size", "64", "data.image_size = '64' must be an int"),
        ("data.image_size", True, "data.image_size = True must be an int"),
        ("data.image_size", None, "data.image_size = None must be an int"),
        ("data.val", 5, "data.val = 5 must be a str"),
        ("data.mean", 0.5, "data.mean = 0.5 must be a list"),
        ("data.mean", "0.5", "data.mean = '0.5' must be a list"),
        ("batch.micro_batch_sizes", {8, 16}, "batch.micro_batch_sizes = "),  # a set has no order
        ("data.mean", ["a"], "data.mean[0] = 'a' must be a float"),
        ("data.mean", [0.5, 0.5], "data.mean has 2 values, but model.in_chans = 1"),
        ("data", [], "data = [] must be a dict"),
        ("data.augmentation", "none", "data.augmentation = 'none' must be a dict"),
        ("data.augmentation.start_min_scale", 0.1, "data.augmentation.start_min_scale = 0.1 must not be below min_scale = 0.3"),
        ("data.num_workers", -1, "data.num_workers = -1 must be >= 0"),
        ("data.max_bad_fraction", 1.5, "data.max_bad_fraction = 1.5 must be >= 0 and <= 1"),
        ("model.norm_pix_loss", 1, "model.norm_pix_loss = 1 must be a bool"),
        ("model.in_chans", True, "model.in_chans = True must be an int"),
        ("model.mask_ratio", float("nan"), "model.mask_ratio = nan must be > 0 and < 1"),
        ("model.decoder_embed_dim", 130, "model.decoder_embed_dim = 130 must be a multiple of 4 and of decoder_num_heads = 4"),
        ("model.hog_cell_size", 4, "model.hog_cell_size = 4 has no effect with target = 'pixels'"),
        ("model", {"target": "hog", "patch_size": 8, "hog_cell_size": 3, "in_chans": 1}, "model.target = 'hog': patches of"),
        ("optimizer.base_lr", "1e-3", "optimizer.base_lr = '1e-3' must be a float"),
        ("optimizer.base_lr", float("inf"), "optimizer.base_lr = inf must be > 0"),
        ("optimizer.betas", [0.9, 1.0], "optimizer.betas[1] = 1.0 must be >= 0 and < 1"),
        ("optimizer.clip_grad_norm", 0, "optimizer.clip_grad_norm = 0 must be > 0 or None"),
        ("run.precision", "fp8", "run.precision = 'fp8' must be one of 'auto', 'fp32', 'bf16', 'fp16'"),
        ("curriculum.preset", "etp", "curriculum.preset = 'etp' must be one of 'etpp', "),
        ("curriculum.stages", [], "curriculum.stages is empty, but preset"),
        ("curriculum.preset", "etpp", "curriculum.stages has no effect with preset = 'etpp'"),
        ("curriculum.stages.0.strength", 1.01, "curriculum.stages[0].strength = 1.01 must be >= 0 and <= 1"),
        ("curriculum.stages.1.compute_fraction", 0.7, "curriculum.stages: the values of compute_fraction must add"),
        ("curriculum.stages.1.bandwidth", 72, "curriculum.stages[1].bandwidth = 72 exceeds data.image_size = 64"),
        ("curriculum.stages.0.bandwidth", 36, "curriculum.stages[0].bandwidth = 36 is not a multiple of 8"),
        ("curriculum.stages.0.bandwidth", 4, "curriculum.stages[0].bandwidth = 4 is not a multiple of 8, the patch size; use 8"),
        ("curriculum.stages.0.bandwith", 32, "unknown key curriculum.stages[0].bandwith; did you mean curriculum.stages[0].band"),
        ("data.image_size", 100, "data.image_size = 100 is not a multiple of 8, the patch size; the nearest is 96"),
        ("epochs", 5, "unknown key epochs; known: data, model, curriculum, batch, optimizer, replay, run"),
    ],
)  # fmt: skip
def test_from_dict__one_fault(key, value, fault):
    assert any(found.startswith(fault) for found in faults_of(with_value(key, value)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.norm_pix_loss", 1),
        ("model.decoder_embed_dim", 130),
        ("model.mask_rato", 0.5),
        ("curriculum.stages.0.strength", 1.01),
        ("curriculum.stages.0.bandwith", 32),
        ("curriculum.stages.0.bandwidth", "32"),
        ("data.mean", ["a"]),
        ("data.image_size", "64"),
        ("run.seed", -1),
    ],
)
def test_from_dict__one_mistake_is_one_fault(key, value):
    """What is right beside a mistake is still seen: no further faults appear that the user did not make."""
    assert len(faults_of(with_value(key, value))) == 1


def test_from_dict__missing_keys():
    assert faults_of({}) == ["data is missing"]
    assert faults_of({"data": {}}) == ["data.train is missing"]
    assert faults_of([1]) == ["the config = [1] must be a dict"]


def test_from_dict__keys_with_an_underscore_are_the_files_own():
    assert from_dict(PretrainConfig, {"data": {"train": "x", "_note": 1}, "_base_size": 3}).data.train == "x"


def test_config_error__is_one_message():
    error = ConfigError(["a", "b"], "file.py")
    assert str(error) == "file.py: 2 faults\n  - a\n  - b"
    assert (error.faults, error.exit_code) == (["a", "b"], 2)
    assert str(ConfigError(["a"], "file.py")).startswith("file.py: 1 fault\n")


def test_model_config__dims():
    assert ModelConfig(size="huge").dims == MAE_SIZES["huge"]
    assert ModelConfig(size="huge").dims.patch_size == 14
    dims = ModelConfig(size="base", patch_size=8, decoder_depth=2).dims
    assert (dims.embed_dim, dims.patch_size, dims.decoder_depth, dims.decoder_embed_dim) == (768, 8, 2, 512)


@pytest.mark.parametrize(
    ("size", "dims"),
    [("base", (768, 12, 12, 16)), ("large", (1024, 24, 16, 16)), ("huge", (1280, 32, 16, 14))],
)
def test_mae_sizes__are_the_papers(size, dims):
    row = MAE_SIZES[size]
    assert (row.embed_dim, row.depth, row.num_heads, row.patch_size) == dims
    assert (row.decoder_embed_dim, row.decoder_depth, row.decoder_num_heads, row.mlp_ratio) == (512, 8, 16, 4.0)


@pytest.mark.parametrize("preset", ["etpp", "etpp_deit", "etpp_convnext", "et", "blog", "constant"])
def test_curriculum_config__every_preset_name_plans(preset):
    config = from_dict(PretrainConfig, {"data": {"train": "x"}, "curriculum": {"preset": preset}})
    assert plan_for(config, 1_281_167).stages[-1].bandwidth == 224
    assert CurriculumConfig().preset == "etpp"


# ---- to_dict, changed_keys ----


def test_to_dict__round_trip():
    config = from_dict(PretrainConfig, FULL)
    values = to_dict(config)
    assert json.loads(json.dumps(values)) == values  # plain values only
    assert from_dict(PretrainConfig, values) == config
    assert changed_keys(values, values) == []


def test_changed_keys__names_what_matters():
    old = to_dict(from_dict(PretrainConfig, FULL))
    new = to_dict(from_dict(PretrainConfig, with_value("optimizer.base_lr", 2e-3)))
    assert changed_keys(old, new) == ["optimizer.base_lr: 0.001 -> 0.002"]
    new = to_dict(from_dict(PretrainConfig, with_value("curriculum.stages.0.compute_fraction", 0.2500001)))
    assert [line.split(":")[0] for line in changed_keys(old, new)] == ["curriculum.stages"]


def test_changed_keys__keys_that_came_or_went():
    assert changed_keys({"a": {"b": 1}}, {"a": {"c": None}}) == ["a.b: 1 -> 'absent'", "a.c: 'absent' -> None"]


def test_changed_keys__how_the_work_is_done_is_free():
    old = to_dict(from_dict(PretrainConfig, FULL))
    values = FULL | {"run": FULL["run"] | {"save_interval": 3, "compile": False, "activation_checkpointing": True}}
    values |= {"batch": {"global_batch_size": 256, "micro_batch_size": 4}, "data": FULL["data"] | {"train": "moved"}}
    assert changed_keys(old, to_dict(from_dict(PretrainConfig, values))) == []
    values |= {"run": values["run"] | {"seed": 8, "precision": "fp32"}}
    assert len(changed_keys(old, to_dict(from_dict(PretrainConfig, values)))) == 2


def test_resume_free__holds_keys_that_exist():
    assert set(dotted_keys(PretrainConfig)) | set(dotted_keys(ClassifyConfig)) >= RESUME_FREE


def dotted_keys(cls, prefix=""):
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from dotted_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


# ---- files ----


def write(folder, text, name="c.py"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", PRETRAIN_CONFIGS, ids=lambda p: p.stem)
def test_configs__every_file_loads_plans_and_explains_itself(path):
    config = load_config(PretrainConfig, path)
    assert (config.data.num_images is None) == (path.stem == "photos"), "`mae-et plan` plans with it"
    plan = plan_for(config, config.data.num_images or 10_000)
    assert plan.planned_equivalent_epochs == pytest.approx(config.curriculum.equivalent_epochs, rel=1e-2)
    header = path.read_text().split('"""')[1]
    assert all(word in header for word in ("Command:", "Hardware:", "Expected:"))
    assert str(path.relative_to(ROOT)) in header


def test_configs__there_are_some():
    assert PRETRAIN_CONFIGS


def test_load_config__base_files_merge(tmp_path):
    write(tmp_path, 'data = dict(train="x", image_size=96)\nrun = dict(seed=1)\n', "base.py")
    path = write(tmp_path, '_base_ = ["./base.py"]\nrun = dict(seed=2)\n')
    config = load_config(PretrainConfig, path)
    assert (config.data.image_size, config.run.seed) == ((96, 96), 2)


def test_load_config__overrides(tmp_path):
    path = write(tmp_path, "data = dict(train='x')\n")
    overrides = {"data.train": "y", "run.seed": 4, "model.size": "tiny", "optimizer.betas": [0.8, 0.9]}
    config = load_config(PretrainConfig, path, overrides)
    assert (config.data.train, config.run.seed, config.model.size, config.optimizer.betas) == (
        "y",
        4,
        "tiny",
        (0.8, 0.9),
    )


def test_load_config__a_dict_is_merged_and_an_empty_one_replaces(tmp_path):
    path = write(
        tmp_path, "data = dict(train='x', val='y')\nmodel = dict(name='resnet18', options=dict(layers=[1, 1, 1, 1]))\n"
    )
    merged = load_config(SupervisedConfig, path, {"model.options": "{'stem_width': 16}"})
    assert merged.model.options == {"layers": [1, 1, 1, 1], "stem_width": 16}
    assert load_config(SupervisedConfig, path, {"model.options": "{}"}).model.options == {}


def test_load_config__overrides_reach_into_lists(tmp_path):
    path = tmp_path / "c.py"
    save_config(from_dict(PretrainConfig, FULL), path, "x")
    overrides = {"curriculum.stages.0.bandwidth": 40, "data.mean.0": 0.1}
    config = load_config(PretrainConfig, path, overrides)
    assert config.curriculum.stages[0].bandwidth == 40
    assert config.data.mean == (0.1,)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ({"run.sede": 4}, "unknown key run.sede; did you mean run.seed?"),
        ({"optimiser.base_lr": 1e-3}, "unknown key optimiser; did you mean optimizer?"),
        ({"sed": 4}, "unknown key sed"),
        ({"data.train.x": 4}, "--cfg-options data.train.x"),
        ({"data.mean.7": 4}, "--cfg-options data.mean.7"),
        ({"data.train.x.y": 4}, "--cfg-options data.train.x.y"),
        ({"run.seed": "four"}, "run.seed = 'four' must be an int"),
        ({"data": 4}, "data = 4 must be a dict"),
    ],
)
def test_load_config__faulty_overrides(tmp_path, overrides, fault):
    path = write(tmp_path, "data = dict(train='x', mean=[0.5] * 3)\n")
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, path, overrides)
    assert caught.value.faults[0].startswith(fault)
    assert str(path) in str(caught.value)


def test_load_config__environment_variables(tmp_path, monkeypatch):
    text = "data = dict(train='{{$MAE_ET_TEST_ROOT:default/folder}}/x', num_workers={{'$MAE_ET_TEST_WORKERS:3'}})\n"
    path = write(tmp_path, text)
    monkeypatch.delenv("MAE_ET_TEST_ROOT", raising=False)
    monkeypatch.delenv("MAE_ET_TEST_WORKERS", raising=False)
    config = load_config(PretrainConfig, path)
    assert (config.data.train, config.data.num_workers) == ("default/folder/x", 3)
    monkeypatch.setenv("MAE_ET_TEST_ROOT", "/data")
    monkeypatch.setenv("MAE_ET_TEST_WORKERS", "5")
    config = load_config(PretrainConfig, path)
    assert (config.data.train, config.data.num_workers) == ("/data/x", 5)


def test_load_config__missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file") as caught:
        load_config(PretrainConfig, tmp_path / "none.py")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data = dict(train=", "SyntaxError"),
        ("data = dict(train=1 / 0)\n", "ZeroDivisionError"),
        ("_base_ = ['./absent.py']\n", "absent.py"),
    ],
)
def test_load_config__faulty_python(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(PretrainConfig, path)
    assert str(path) in str(caught.value)


def test_load_config__all_faults_of_a_file(tmp_path):
    path = write(tmp_path, "data = dict(trian='x')\nrun = dict(seed=-1)\n")
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, path, {"model.size": "gigantic"})
    assert len(caught.value.faults) == 4  # the unknown key, the missing one, the seed, the size


@pytest.mark.parametrize("values", [FULL, {"data": {"train": 'with "quotes" and \\ and ü {{ x'}}])
def test_save_config__round_trip(tmp_path, values):
    config, path = from_dict(PretrainConfig, values), tmp_path / "config.py"
    save_config(config, path, "What this is.")
    assert path.read_text().startswith('"""What this is."""\n')
    assert load_config(PretrainConfig, path) == config


# ---- checks between fields ----


def test_from_dict__a_fault_hides_no_other():
    """A check is skipped only if a field that it reads is faulty."""
    faults = faults_of(
        {
            "data": {"train": "x", "image_size": 225, "mean": [0.5], "num_images": 0},
            "model": {"size": "bse", "patch_size": 16, "mask_ratio": 2, "target": "pixels", "hog_cell_size": 4},
            "curriculum": {"preset": "etp", "warmup_equivalent_epochs": 500},
            "batch": {"global_batch_size": "many", "early_large_batch": {"rule": "list"}},
        }
    )
    starts = [
        "data.num_images = 0",
        "model.size = 'bse'",
        "model.mask_ratio = 2",
        "curriculum.preset = 'etp'",
        "batch.global_batch_size = 'many'",
        "data.image_size = 225 is not a multiple of 16",
        "data.mean has 1 values, but model.in_chans = 3",
        "model.hog_cell_size = 4 has no effect",
        "curriculum.warmup_equivalent_epochs = 500 must be below",
        "batch.early_large_batch.rule = 'list' needs",
    ]
    assert sorted(starts) == sorted(start for start in starts for fault in faults if fault.startswith(start))
    assert len(faults) == len(starts)


@pytest.mark.parametrize(
    ("values", "hidden"),
    [
        ({"data": {"train": "x", "image_size": "225"}}, "multiple of"),
        ({"data": {"train": "x", "image_size": 225}, "model": {"patch_size": "16"}}, "multiple of"),
        ({"data": {"train": "x", "image_size": 225}, "model": 3}, "multiple of"),
        ({"data": {"train": "x", "mean": [0.5]}, "model": {"in_chans": 0}}, "data.mean has"),
        ({"data": {"train": "x"}, "curriculum": {"equivalent_epochs": -1}}, "must be below"),
    ],
)
def test_from_dict__a_check_of_a_faulty_field_is_skipped(values, hidden):
    assert not [fault for fault in faults_of(values) if hidden in fault]


def test_from_dict__rows_are_checked_beside_a_faulty_row():
    stages = [{"compute_fraction": 0.5, "bandwidth": "x"}, {"compute_fraction": 0.5, "bandwidth": 1000}]
    faults = faults_of({"data": {"train": "x"}, "curriculum": {"preset": "custom", "stages": stages}})
    assert [fault.split(" = ")[0] for fault in faults] == ["curriculum.stages[0].bandwidth"] + [
        "curriculum.stages[1].bandwidth"
    ] * 2


# ---- options without effect ----


@pytest.mark.parametrize(
    ("cls", "key", "value", "also"),
    [
        (PretrainConfig, "model.norm_pix_loss", False, {"model.target": "hog"}),
        (PretrainConfig, "model.hog_cell_size", 4, {}),
        (PretrainConfig, "data.augmentation.start_min_scale", 0.5, {}),
        (PretrainConfig, "data.augmentation.start_min_scale", 0.5, {"data.augmentation.ramp": "randaugment"}),
        (PretrainConfig, "data.augmentation.max_magnitude", 5, {}),
        (PretrainConfig, "data.augmentation.color_jitter", 0, {"data.augmentation.ramp": "crop_scale"}),
        (PretrainConfig, "curriculum.centered", False, {"curriculum.preset": "constant"}),
        (PretrainConfig, "batch.early_large_batch.max_lr", 1.0, {}),
        (ClassifyConfig, "optimizer.momentum", 0.5, {}),
        (ClassifyConfig, "optimizer.trust_coefficient", 0.1, {}),
        (ClassifyConfig, "optimizer.betas", [0.9, 0.99], {"optimizer.name": "lars", "protocol": "linear_probe"}),
        (ClassifyConfig, "optimizer.eps", 1e-6, {"optimizer.name": "lars", "protocol": "linear_probe"}),
        (ClassifyConfig, "optimizer.layer_decay", 0.65, {"optimizer.name": "lars", "protocol": "linear_probe"}),
        (ClassifyConfig, "optimizer.layer_decay", 0.65, {"protocol": "linear_probe"}),
        (ClassifyConfig, "regularization.mixup", 0.0, {"protocol": "linear_probe"}),
        (ClassifyConfig, "regularization.cutmix", 0.5, {"protocol": "knn"}),
        (ClassifyConfig, "regularization.erasing", 0.5, {"protocol": "linear_probe"}),
        (ClassifyConfig, "regularization.label_smoothing", 0.0, {"protocol": "linear_probe"}),
        (ClassifyConfig, "regularization.ema_decay", 0.9, {"protocol": "linear_probe"}),
        (ClassifyConfig, "model.drop_path_rate", 0.1, {"protocol": "linear_probe"}),
        (ClassifyConfig, "model.drop_path_rate", 0.1, {"protocol": "knn"}),
        (ClassifyConfig, "curriculum.preset", "etpp", {"protocol": "knn"}),
        (ClassifyConfig, "curriculum.equivalent_epochs", 7, {"protocol": "knn"}),
        (ClassifyConfig, "optimizer.base_lr", 1.0, {"protocol": "knn"}),
        (ClassifyConfig, "batch.global_batch_size", 8, {"protocol": "knn"}),
        (ClassifyConfig, "eval_interval", 8, {"protocol": "knn"}),
        (ClassifyConfig, "run.save_interval", 8, {"protocol": "knn"}),
        (ClassifyConfig, "knn.ks", [5], {}),
    ],
)
def test_from_dict__an_option_without_effect_is_refused(cls, key, value, also):
    def values_with(options):
        values = {"data": {"train": "x", "val": "y"}}
        for dotted, option in options.items():
            node = values
            *parents, last = dotted.split(".")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = option
        return values

    faults = faults_of(values_with({**also, key: value}), cls)
    assert [fault for fault in faults if fault.startswith(f"{key} = ") and "has no effect with" in fault]
    config = from_dict(cls, values_with(also))  # with the default it passes, also where the default is written out
    assert from_dict(cls, to_dict(config)) == config


@pytest.mark.parametrize(
    ("cls", "key"),
    [
        (PretrainConfig, "run.picture_interval"),
        (PretrainConfig, "run.knn_interval"),
        (ClassifyConfig, "eval_interval"),
    ],
)
def test_from_dict__an_interval_of_0_names_none(cls, key):
    values = {"data": {"train": "x", "val": "y"}}
    section, _, name = key.rpartition(".")
    (values.setdefault(section, {}) if section else values)[name] = 0
    assert faults_of(values, cls) == [f"{key} = 0 must be >= 1 or None"]


@pytest.mark.parametrize("cls", [PretrainConfig, ClassifyConfig])
def test_schema__every_option_is_described(cls):
    """The reference of the docs is generated from the schema."""
    for key in dotted_keys(cls):
        *parents, name = key.split(".")
        section = cls
        for parent in parents:
            section = section.model_fields[parent].annotation
        assert section.model_fields[name].description, key
