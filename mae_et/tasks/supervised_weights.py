"""The weights of a supervised run: the file that it starts from, and the classifier and backbone files that it writes."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import mae_et
from mae_et.config.schema import to_dict
from mae_et.config.supervised import SupervisedConfig
from mae_et.curriculum.plan import Plan
from mae_et.errors import CheckpointError
from mae_et.models.resize import change_input_size
from mae_et.models.sizes import Size, plain_size, recorded_size
from mae_et.models.strict import misfit, some
from mae_et.storage.backbone import write_safetensors
from mae_et.storage.digest import encoder_digest
from mae_et.storage.weights import read_weights
from mae_et.tasks.supervised_model import build_model

log = logging.getLogger(__name__)


def load_initial_weights(model: nn.Module, image_size: Size, config: SupervisedConfig, class_names: list[str]) -> None:
    """Loads the weights of `model.init_from` into a model; `initial_file` says which file a folder denotes.

    Position tables are resampled to the size of the model. The head is loaded if the file has the same classes. A head of
    other classes is matched by class names; see `match_head`. A file without head, or with another number of classes and no
    names, leaves the new head at its initial weights. All of this is logged.

    Args:
        model: the receiver.
        image_size: px, that the model takes now.
        config: of the run.
        class_names: of the run, in the order of the labels.
    Raises:
        CheckpointError: if the file is of another model, with the keys; or if its class names do not fit its head.
    """
    path = str(initial_file(str(config.model.init_from)))
    state, metadata = read_weights(path)
    recorded = metadata.get("architecture", config.model.name)
    if recorded != config.model.name and timm.is_model(recorded):
        raise CheckpointError(
            f"{path} holds a {recorded}, but model.name = {config.model.name!r}: set model.name={recorded}"
        )
    source = build_model(config, len(class_names), recorded_size(metadata, config.data.image_size))
    head = {key: value for key, value in source.state_dict().items() if key in head_keys(model)}
    body = {key: value for key, value in state.items() if key not in head}
    stored = {key: state[key] for key in head if key in state}
    stored_names = json.loads(metadata.get("class_names", "null"))
    if len(stored) < len(head):
        log.warning("%s holds no head: the head starts from its initial weights", path)
        stored = head
    elif stored_names is not None and stored_names != class_names:
        stored = match_head(stored, head, stored_names, class_names, path)
    elif any(stored[key].shape != value.shape for key, value in head.items()):
        log.warning(
            "%s holds a head of another size and no class names: the head of %d classes starts from its initial weights",
            path, len(class_names),
        )  # fmt: skip
        stored = head
    elif stored_names is None:
        log.warning("%s names no classes: its head is taken for that of these %d classes", path, len(class_names))
    if faults := misfit({**body, **stored}, source.state_dict()):
        raise CheckpointError(
            f"{path} does not fit model.name = {config.model.name!r} with options {config.model.options}; {faults}. Set both as "
            "in the training of the file"
        )
    source.load_state_dict({**body, **stored})
    change_input_size(source, None, None, image_size)
    model.load_state_dict(source.state_dict())
    log.info("loaded %d tensors from %s", len(body), path)


def initial_file(path: str) -> Path:
    """Returns the file to start from: in the folder of a run the classifier, because the backbone has no head."""
    classifier = Path(path) / "classifier.safetensors"
    return classifier if classifier.is_file() else Path(path)


def match_head(
    stored: Mapping[str, Tensor], new: Mapping[str, Tensor], stored_names: list[str], names: list[str], where: str
) -> dict[str, Tensor]:
    """Returns a head for other classes, made of the rows of the classes with the same names.

    The row of a class that the file does not have is the mean of the matched rows. Tensors without a row per class, such as
    a hidden layer of the head, are taken as they are.

    Args:
        stored: tensors of the head in the file.
        new: tensors of the new head.
        stored_names, names: of the classes, in the order of the rows.
        where: the file, for messages.
    Raises:
        CheckpointError: if the file has class names, but not one row for each.
    """
    per_class = {key for key, value in new.items() if len(value) == len(names)}
    if not any(len(stored[key]) == len(stored_names) for key in per_class):
        sizes = sorted({len(stored[key]) for key in per_class})
        raise CheckpointError(
            f"{where} names {len(stored_names)} classes, but its head has {', '.join(map(str, sizes))} rows: the file was "
            "changed after it was written, so use the original one"
        )
    places = {name: row for row, name in enumerate(stored_names)}
    rows = [places.get(name) for name in names]
    known = [row for row in rows if row is not None]
    if not known:
        log.warning("%s has none of the %d classes: the head starts from its initial weights", where, len(names))
        return dict(new)
    absent = [name for name, row in zip(names, rows, strict=True) if row is None]
    if absent:
        log.warning(
            "%s has %d of the %d classes; the head rows of the others start from the mean row: %s",
            where, len(known), len(names), some(absent),
        )  # fmt: skip
    else:
        log.info("took the head rows of %d classes from the %d of %s", len(names), len(stored_names), where)
    result = {}
    for key, value in stored.items():
        if key not in per_class or len(value) != len(stored_names):
            result[key] = value
            continue
        mean = value[known].mean(dim=0)
        result[key] = torch.stack([mean if row is None else value[row] for row in rows])
    return result


def head_keys(model: nn.Module) -> set[str]:
    """Returns the names of the tensors that the model has only as a classifier."""
    bare: Any = copy.deepcopy(model)
    bare.reset_classifier(0)
    return set(model.state_dict()) - set(bare.state_dict())


def write_files(model: nn.Module, metadata: Mapping[str, str], work_dir: Path) -> str:
    """Writes classifier.safetensors and backbone.safetensors, which timm loads strictly by the model's name.

    Args:
        model: the classifier, at the size of the images.
        metadata: as from `make_metadata`.
        work_dir: the folder to write to.
    Returns:
        The digest by which results name this backbone.
    """
    state = model.state_dict()
    heads = head_keys(model)
    backbone = {key: value for key, value in state.items() if key not in heads}
    digest = encoder_digest(backbone)
    write_safetensors(state, work_dir / "classifier.safetensors", {**metadata, **digest})
    without_classes = {key: value for key, value in metadata.items() if key != "class_names"}
    write_safetensors(backbone, work_dir / "backbone.safetensors", {**without_classes, **digest})
    return digest["encoder_sha256"]


def make_metadata(config: SupervisedConfig, plan: Plan, class_names: list[str]) -> dict[str, str]:
    """Says which model a file holds, how its images are prepared and how it was trained, for a safetensors header."""
    data = config.data
    values: dict[str, Any] = {
        "mae_et_version": mae_et.__version__,
        "architecture": config.model.name,
        "model_options": config.model.options,
        "objective": "supervised",
        "class_names": class_names,
        "in_chans": config.model.in_chans,
        "image_size": plain_size(data.image_size),
        "eval_crop_ratio": data.eval_crop_ratio,
        "mean": list(data.mean),
        "std": list(data.std),
        "data": data.train,
        "num_images": plan.dataset_size,
        "curriculum": to_dict(config.curriculum),
        "bandwidths": [stage.bandwidth for stage in plan.stages],
        "seed": config.run.seed,
    }
    if data.filter.kind != "none":
        values["filter"] = to_dict(data.filter)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
