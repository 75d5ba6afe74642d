"""The functions of the public Python interface: pretrain, train_classifier, classify, load_encoder and make_plan."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mae_et.config.files import load_config
from mae_et.config.overrides import apply_overrides
from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict, to_dict
from mae_et.config.supervised import SupervisedConfig
from mae_et.config.training import TrainConfig
from mae_et.curriculum import plan as plans
from mae_et.curriculum.cost import mae_cost
from mae_et.errors import UserError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

StrPath = str | os.PathLike[str]
Source = StrPath | Sequence[StrPath]
Overrides = Mapping[str, Any]
C = TypeVar("C", bound=TrainConfig)


def pretrain(
    data: Source,
    work_dir: StrPath,
    config: StrPath | PretrainConfig = "photos",
    overrides: Overrides | None = None,
    resume: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Pre-trains a masked autoencoder on images, under the EfficientTrain++ curriculum.

    Progress goes to the logger "mae_et"; `logging.basicConfig(level=logging.INFO)` shows it.

    Args:
        data: a folder of images, tar shards or another source, or a list of sources; replaces `data.train` of the config.
        work_dir: where the run is written: backbone.safetensors, summary.json, checkpoints/, reconstructions/ and more.
        config: the name of a shipped config, a config file, or a config. Of a named config or a file, `data.val` and
            `data.num_images` are set to None, because they describe the data set of the config. "photos" is a ViT-Small
            for thousands to hundreds of thousands of photos.
        overrides: config keys and values that come last, e.g. {"curriculum.equivalent_epochs": 100}.
        resume: continue from the newest checkpoint in `work_dir`; start the run if there is none.
        device: "cpu" or "cuda"; None: CUDA where available.
    Returns:
        The summary, as in summary.json, e.g. "last_loss"; empty on other processes than the main one.
    Raises:
        UserError: a mistake that the message says how to fix; a subclass of ValueError.
    """
    checked = _config(PretrainConfig, config, {"data.train": _spec(data)}, overrides)
    from mae_et.tasks.pretrain import pretrain as run  # after the config is checked: this import takes seconds

    return run(checked, os.fspath(work_dir), resume, device)


def train_classifier(
    train: Source,
    val: Source | None,
    work_dir: StrPath,
    config: StrPath | SupervisedConfig = "resnet50",
    overrides: Overrides | None = None,
    resume: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Trains a classifier, any model of timm, on labelled images, under the EfficientTrain++ curriculum.

    Args:
        train: training images, one folder per class or another labelled source; replaces `data.train` of the config.
        val: validation images with the same classes; None: no accuracies.
        work_dir: where the run is written: classifier.safetensors, backbone.safetensors, summary.json and more.
        config: the name of a shipped config of supervised training, a config file, or a config. Of a named config or a
            file, `data.num_images` is set to None, because it describes the data set of the config.
        overrides: config keys and values that come last, e.g. {"model.name": "regnety_008"}.
        resume, device: as for `pretrain`.
    Returns:
        The summary, as in summary.json, e.g. "top1"; empty on other processes than the main one.
    Raises:
        UserError: a mistake that the message says how to fix; a subclass of ValueError.
    """
    values = {"data.train": _spec(train), "data.val": None if val is None else _spec(val)}
    checked = _config(SupervisedConfig, config, values, overrides)
    from mae_et.tasks.supervised import train_supervised as run

    return run(checked, os.fspath(work_dir), resume, device)


def classify(
    backbone: StrPath | None,
    train: Source,
    val: Source,
    work_dir: StrPath,
    config: StrPath | ClassifyConfig = "photos_knn",
    overrides: Overrides | None = None,
    resume: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Evaluates a backbone on labelled images by fine-tuning, linear probe or kNN, as the config says.

    Args:
        backbone: the folder of a run, or any MAE or ViT file; None: random weights.
        train: training images, one folder per class or another labelled source.
        val: validation images with the same classes.
        work_dir: where the results are written: summary.json, per_class.csv, confusion.png and more.
        config: as for `pretrain`. "photos_knn" is kNN on the backbone of `pretrain` with config "photos"; another
            backbone needs a config of its size, or the override "model.size".
        overrides, resume, device: as for `pretrain`.
    Returns:
        The summary, as in summary.json, e.g. "top1"; empty on other processes than the main one.
    Raises:
        UserError: a mistake that the message says how to fix; a subclass of ValueError.
    """
    values = {
        "backbone": None if backbone is None else os.fspath(backbone),
        "data.train": _spec(train),
        "data.val": _spec(val),
    }
    checked = _config(ClassifyConfig, config, values, overrides)
    from mae_et.tasks.classify import classify as run

    return run(checked, os.fspath(work_dir), resume, device)


def make_plan(
    config: StrPath | PretrainConfig = "photos",
    dataset_size: int | None = None,
    world_size: int = 1,
    overrides: Overrides | None = None,
) -> plans.Plan:
    """Returns what a pre-training would do: steps, batches, learning rates and cost of each stage. Needs no torch.

    Args:
        config, overrides: as for `pretrain`; the data set of the config stays.
        dataset_size: number of images; None: `data.num_images` of the config.
        world_size: training processes (GPUs).
    Raises:
        UserError: if the config is faulty, does not fit the sizes, or the number of images is unknown.
    """
    checked = _config(PretrainConfig, config, None, overrides)
    size = checked.data.num_images if dataset_size is None else dataset_size
    if size is None:
        raise UserError("the config does not set data.num_images: give dataset_size")
    return plans.make_plan(
        checked, mae_cost(checked.model, checked.curriculum.decoder_warmup_fraction), size, world_size
    )


def load_encoder(
    path: StrPath,
    image_size: int | tuple[int, int] | None = None,
    *,
    in_chans: int | None = None,
    num_heads: int | None = None,
    global_pool: str = "token",
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
) -> VisionTransformer:
    """Loads a backbone as a ViT of timm, every weight accounted for.

    Args:
        path: the folder of a run, or any file with an MAE or ViT of this project, timm, Hugging Face, the official MAE,
            mmdetection or mmsegmentation.
        image_size: px, the side of a square or (H, W); None: the size of the training. Positions are adapted to another size.
        in_chans: refused if the file has another number of channels; None: as in the file.
        num_heads: None: from the file, or known by the width.
        global_pool, num_classes, drop_path_rate: as in timm. The default is an encoder without head:
            `model.forward_features(images)` returns the class token and the patch tokens, [N, 1 + L, D].
    Raises:
        UserError: if the file is damaged or is not a ViT; the message names the keys.
    """
    from mae_et.storage import backbone  # imports torch, which takes seconds

    return backbone.load_encoder(
        os.fspath(path),
        image_size,
        in_chans=in_chans,
        num_heads=num_heads,
        global_pool=global_pool,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
    )


def _spec(data: Source) -> str | list[str]:
    return os.fspath(data) if isinstance(data, str | os.PathLike) else [os.fspath(one) for one in data]


def _config(cls: type[C], config: StrPath | C, data: dict[str, Any] | None, overrides: Overrides | None) -> C:
    """Returns a checked config.

    Args:
        cls: the config class.
        config: a name, a file or a config.
        data: keys for the data set of the call; None: the data set of the config stays.
        overrides: keys that come last.
    """
    if isinstance(config, TrainConfig):
        values = to_dict(config)
        apply_overrides(cls, values, {**(data or {}), **(overrides or {})}, "overrides")
        return from_dict(cls, values)
    others = {} if data is None else {"data.val": None, "data.num_images": None}
    return load_config(cls, os.fspath(config), {**others, **(data or {}), **(overrides or {})})
