"""Weights, options and starts of runs of detection and segmentation that once gave a wrong result or a traceback."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from mae_et.data.scenes.painter import SCENE_CLASSES
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.models.vit import random_vit
from mae_et.storage.backbone import write_backbone
from tests.cases.test_detection import ONE, TRAIN, VAL, change
from tests.conftest import REPOSITORY
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import SHORT, environment, main, read, tool, train, words, write_data

pytestmark = [pytest.mark.mm, needs_mm]
NAMES = tuple(SCENE_CLASSES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mm"))


@pytest.fixture
def own(data, tmp_path):
    """A copy to change."""
    shutil.copytree(data, tmp_path / "own")
    return tmp_path / "own"


def test_case__D18_grey_images(data, tmp_path, capfd):
    """The options that the message prints make the run work."""
    metadata = {"num_heads": "4", "mean": "[0.5]", "std": "[0.25]"}
    state = random_vit(64, patch_size=8, embed_dim=128, depth=4, num_heads=4, in_chans=1).state_dict()
    write_backbone(state, tmp_path / "grey.safetensors", "timm", metadata)
    arguments = [
        "train", "configs/detection/coco_mini.py", "--work-dir", tmp_path / "run", "--backbone",
        tmp_path / "grey.safetensors", "--cfg-options", *words({**SHORT, "train_cfg.max_iters": 1}),
    ]  # fmt: skip
    classes = ["train_dataloader", "val_dataloader"]
    arguments += [f"{loader}.dataset.metainfo.classes=[{','.join(NAMES)}]" for loader in classes]
    arguments += ["model.roi_head.bbox_head.num_classes=10", "model.roi_head.mask_head.num_classes=10"]
    with patch.dict(os.environ, {"MAE_ET_COCO_MINI": str(data / "coco")}):
        refused = tool(data, *arguments)
        assert refused.returncode == 2, refused.stderr[-2000:]
        fix = shlex.split(refused.stderr.split("--cfg-options ")[1].splitlines()[0])
        assert "model.data_preprocessor.mean=[127.5]" in fix
        done = tool(data, *arguments, *fix)
    assert done.returncode == 0, done.stderr[-3000:]


def test_case__D19_learning_rates_of_a_resumed_run_are_not_claimed_to_change(caplog):
    from mmengine.config import ConfigDict

    from downstream.hooks.batch import BatchHook
    from downstream.run import scale_for_accumulation

    def runner(world_size, resume):
        config = ConfigDict(
            optim_wrapper={}, train_dataloader={"batch_size": 2}, train_cfg={}, resume=resume,
        )  # fmt: skip
        return SimpleNamespace(
            auto_scale_lr=ConfigDict(enable=True, base_batch_size=2), cfg=config, world_size=world_size
        )

    checkpoint = {}
    BatchHook().before_save_checkpoint(runner(1, False), checkpoint)
    scale_for_accumulation(runner(2, True))
    assert "multiplied" not in caplog.text
    BatchHook().after_load_checkpoint(runner(1, True), checkpoint)
    assert caplog.text == ""
    BatchHook().after_load_checkpoint(runner(2, True), checkpoint)
    assert "trained with 2 images an update, this run has 4. The learning rates stay those for 2" in caplog.text


SIZES = [(224, 224), (256, 320), (200, 333), (33, 70)]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_case__X2_swin_equals_mmdets(size):
    from mmdet.models.backbones.swin import SwinTransformer, swin_converter

    from downstream import TimmFeatures

    torch.manual_seed(0)
    ours = TimmFeatures("swin_tiny_patch4_window7_224", out_norm=True).eval()
    for name, parameter in ours.named_parameters():
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.05)
    published = {}
    for key, value in ours.net.state_dict().items():
        parts = key.split(".")
        if parts[0] == "layers":  # timm puts the downsampling before a stage, others after it
            stage = int(parts[1]) - (parts[2] == "downsample")
            key = ".".join(["layers", str(stage), *parts[2:]])
        published[key] = value
    theirs = SwinTransformer()
    theirs.eval()
    state = {key.removeprefix("backbone."): value for key, value in swin_converter(published).items()}
    state |= {f"norm{i}.{name}": getattr(ours.norms[i], name) for i in range(4) for name in ("weight", "bias")}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("relative_position_index") for key in missing)
    images = torch.randn(2, 3, *size)
    for a, b in zip(ours(images), theirs(images), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_case__X3_a_bare_assertion_is_not_hidden(data, tmp_path, monkeypatch):
    from mmdet.models.detectors import MaskRCNN

    def fail(*args, **kwargs):
        assert False  # noqa: B011, PT015

    monkeypatch.setattr(MaskRCNN, "loss", fail)
    with pytest.raises(AssertionError) as caught:
        train(data, "detection", tmp_path, **ONE)
    assert caught.traceback[-1].name == "fail"


@pytest.fixture(scope="module")
def detector(data):
    """The checkpoint of a short run."""
    train(data, "detection", data / "detector", **ONE)
    return data / "detector" / "iter_1.pth"


def test_case__X4_load_from_another_number_of_classes(own, tmp_path, detector, caplog):
    changes = {f"model__roi_head__{head}_head__num_classes": 9 for head in ("bbox", "mask")}
    changes |= {f"{loader}_dataloader__dataset__metainfo__classes": NAMES[:9] for loader in ("train", "val")}
    summary = train(own, "detection", tmp_path / "run", **ONE, **changes, load_from=str(detector))
    layers = ("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits")
    expected = sorted(f"{layer}.{name}" for layer in layers for name in ("weight", "bias"))
    assert summary["new_heads"] == expected
    assert "roi_head.bbox_head.fc_cls" in caplog.text
    assert "start from new weights" in caplog.text


def test_case__X4_load_from_what_fits_nowhere(data, tmp_path, detector):
    with pytest.raises(CheckpointError, match=r"unexpected: .*backbone\.blocks\.3"):
        train(data, "detection", tmp_path, **ONE, load_from=str(detector), model__backbone__depth=3,
              model__backbone__global_blocks=(1,))  # fmt: skip
    with pytest.raises(CheckpointError, match="no such checkpoint: load_from"):
        train(data, "detection", tmp_path / "2", **ONE, load_from=str(tmp_path / "x.pth"))


def test_case__X4_weights_outside_of_new_heads_are_loaded(data, tmp_path, detector):
    from downstream.backbones.loading import load_new_heads

    config = read(data, "detection", tmp_path)
    config.model.roi_head.bbox_head.num_classes = 3
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    model = MODELS.build(config.model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    content, new = load_new_heads(model, detector)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in new else content["state_dict"][key]), key
    assert len(new) == 4


def test_case__X5_summary_names_the_weights_that_trained(data, tmp_path, detector, caplog):
    from downstream import run

    config = read(data, "detection", tmp_path, **ONE, load_from=str(detector))
    run.set_backbone(config, data / "backbone.safetensors")
    run.prepare(config)
    run.train(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert pathlib.Path(summary["initial_weights"]["file"]).name == detector.name
    assert summary["initial_weights"]["role"] == "model"
    assert "overwrites the backbone file" in caplog.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train_cfg.max_epochs=1", r"IterBasedTrainLoop has no key 'max_epochs', did you mean 'max_iters'"),
        ("model.pretrained=x.pth", r"MaskRCNN has no key 'pretrained'; a backbone file goes to --backbone"),
        ("model.backbone.drop_pathrate=0.1", r"ViTDet has no key 'drop_pathrate', did you mean 'drop_path_rate'"),
        ("train_dataloader.batchsize=2", r"train_dataloader has no key 'batchsize', did you mean 'batch_size'"),
        ("optim_wrapper.optimizer.weigth_decay=0", r"AdamW has no key 'weigth_decay', did you mean 'weight_decay'"),
        ("model.test_cfg.rcnn.score_thrr=0.1", r"has no key 'score_thrr', did you mean 'score_thr'"),
        ("train_dataloader.dataset.pipeline.9.x=1", r"is a list of 5 entries"),
        ("train_cfg.max_iters.x=1", r"is a value, it has no key 'x'"),
        ("just words", r"not of the form KEY=VALUE"),
    ],
)
def test_case__X6_unknown_keys(data, tmp_path, option, message):
    from downstream import run

    with pytest.raises(ConfigError, match=message):
        run.read_config(REPOSITORY / "configs/detection/demo.py", [option])


def test_case__X6_unknown_keys_of_a_config_file(data, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        f"_base_ = [{str(REPOSITORY / 'configs/detection/demo.py')!r}]\nmodel = dict(backbone=dict(drop_pathrate=0.1))\n"
    )
    with pytest.raises(ConfigError, match=r"model\.backbone\.drop_pathrate: ViTDet has no key.*'drop_path_rate'"):
        main(data, "train", path, "--work-dir", tmp_path / "run")


def test_case__X6_keys_that_are_read_pass(data, tmp_path):
    from downstream import run

    options = ["model.test_cfg.rcnn.score_thr=0.2", "default_hooks.checkpoint.max_keep_ckpts=1", "load_from=x.pth",
               "optim_wrapper.clip_grad.max_norm=1.0", "train_dataloader.dataset.filter_cfg.min_size=1",
               "optim_wrapper.dtype=bfloat16"]  # fmt: skip
    config = run.read_config(REPOSITORY / "configs/detection/demo.py", options)
    assert (config.model.test_cfg.rcnn.score_thr, config.load_from) == (0.2, "x.pth")


@pytest.mark.parametrize("name", ["my photos", "a,b", "2024", "None", "{x}", "true"])
def test_case__C1_values_arrive_as_typed(data, name):
    from downstream import run

    option = f"train_dataloader.dataset.data_root=/d/{name}/"
    config = run.read_config(REPOSITORY / "configs/detection/demo.py", [option])
    assert config.train_dataloader.dataset.data_root == f"/d/{name}/"
    config = run.read_config(REPOSITORY / "configs/detection/demo.py", [f"train_dataloader.dataset.ann_file={name}"])
    assert config.train_dataloader.dataset.ann_file == name


@pytest.mark.parametrize(
    ("text", "current", "expected"),
    [("1e-4", 0.1, 1e-4), ("127.5,127.5", [0, 0], [127.5, 127.5]), ("[127.5]", [0], [127.5]), ("a,b", ["x"], ["a", "b"]),
     ("true", None, True), ("None", {}, None), ("(1, 2)", None, (1, 2)), ("x y", None, "x y"), ("[a,b]", None, ["a", "b"])],
)  # fmt: skip
def test_case__C1_types_of_values(text, current, expected):
    from downstream.checks.overrides import parse_value

    assert parse_value(text, current) == expected


def test_case__X7_the_log_file_and_the_summary_have_the_messages(data, tmp_path):
    summary = train(data, "detection", tmp_path, **{**ONE, "train_dataloader__batch_size": 2})
    (path,) = tmp_path.glob("2*/*.log")
    for message in ("starts from random weights", "its learning rates are multiplied by 0.5", "4 images, "):
        assert message in path.read_text()
        assert message in str(summary["messages"])
    assert summary["initial_weights"] is None
    assert "4 images" in [finding["text"] for finding in summary["data_findings"]["count"]]


def test_case__M9_non_square_photos_on_a_cpu(own, tmp_path):
    """A detector that predicts the whole padded image: boxes end at the image, and pasting works."""
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmengine.registry import init_default_scope

    from downstream import run

    for folder in ("train2017", "val2017"):
        for path in (own / "coco" / folder).iterdir():
            Image.open(path).resize((64, 32)).save(path)

    def halve(content):
        for image in content["images"]:
            image["height"] = 32
        for item in content["annotations"]:
            x, y, width, height = item["bbox"]
            item["bbox"] = [x, y / 2, width, max(height / 2, 1)]
            item["segmentation"] = [[x, y / 2, x + width, y / 2, x + width, (y + height) / 2, x, (y + height) / 2]]

    for split in (TRAIN, VAL):
        change(own, split, halve)
    pad = {"type": "Pad", "size": (128, 128), "pad_val": {"img": 114}}
    config = read(own, "detection", tmp_path / "run", **ONE, model__test_cfg__rcnn__score_thr=0.0)
    for loader in (config.val_dataloader, config.test_dataloader):
        loader.dataset.pipeline.insert(2, pad)
    run.prepare(config)
    init_default_scope("mmdet")
    from mmdet.registry import DATASETS

    sample = DATASETS.build(config.val_dataloader.dataset)[0]["data_samples"]
    assert sample.img_shape == (64, 128)
    seen = []
    predict = FCNMaskHead.predict_by_feat

    def record(self, mask_preds, results_list, batch_img_metas, *args, **kwargs):
        seen.extend(result.bboxes.clone() for result in results_list)
        return predict(self, mask_preds, results_list, batch_img_metas, *args, **kwargs)

    with patch.object(FCNMaskHead, "predict_by_feat", record):
        run.train(config)
    boxes = torch.cat(seen)
    assert len(boxes)
    assert boxes[:, 3].max() <= 64


def test_case__M11_the_start_says_only_what_concerns_the_user(data, tmp_path):
    for task in ("detection", "segmentation"):
        command = [sys.executable, "tools/train.py", f"configs/{task}/demo.py", "--work-dir", str(tmp_path / task)]
        command += ["--cfg-options", *words(SHORT)]
        variables = {**os.environ, **environment(data)}  # a new process, because packages warn while they are imported
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr[-2000:]
        shown = done.stdout + done.stderr
        for noise in (
            "OneDL",
            "deprecat",
            "Deprecat",
            "will not be computed",
            "System environment",
            "Hooks will be",
            "creating index",
        ):
            assert noise not in shown, noise
        start = shown.split("Iter(train)")[0]
        assert len(start.splitlines()) < 20
        (path,) = (tmp_path / task).glob("2*/*.log")
        assert "System environment" in path.read_text()


def test_case__F13b_another_process_ends(monkeypatch):
    from mmengine.config import Config

    from downstream.compat.explain import explained

    monkeypatch.setenv("RANK", "1")
    lost = "[/pytorch/third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2301"
    with (
        pytest.raises(UserError, match=r"process of rank 1 lost the connection.*look for its error.*--resume"),
        explained(Config()),
    ):
        raise RuntimeError(lost)
    killed = "DataLoader worker (pid 12) is killed by signal: Killed."
    with pytest.raises(UserError, match=r"a loader process died.*num_workers"), explained(Config()):
        raise RuntimeError(killed)
    with pytest.raises(RuntimeError, match="shapes differ"), explained(Config()):
        raise RuntimeError("shapes differ")


def test_case__C12_a_backbone_may_be_named_by_its_run_folder(own, tmp_path):
    """As all tools take a run folder, a checkpoint or a file of weights alike."""
    from downstream import run

    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(own / "backbone.safetensors", folder)
    config = read(own, "detection", tmp_path / "work")
    run.set_backbone(config, folder)
    assert run.backbone_file(config) == str((folder / "backbone.safetensors").resolve())
    with pytest.raises(CheckpointError):
        run.set_backbone(config, tmp_path / "absent")
