"""Trained classifiers: a classifier.safetensors of `classify` or `supervised` built again, with its classes and preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_et.errors import CheckpointError, UserError
from mae_et.models.architecture import encoder_options, recorded_eps
from mae_et.models.cls_tokens import joined_cls_tokens
from mae_et.models.linear_probe import PROBES, make_probe
from mae_et.models.sizes import Size, recorded_size
from mae_et.models.strict import misfit
from mae_et.models.timm_backbone import create_backbone
from mae_et.models.vit import random_vit
from mae_et.storage.metadata import stored_range
from mae_et.storage.weights import describe, find_weights, read_stored

FILE = "classifier.safetensors"
PROBE_ENCODER = "encoder."  # prefix of the backbone in the file of a probe


@dataclass(frozen=True)
class Classifier:
    """A classifier, and how its images are prepared and its outputs named."""

    path: Path
    model: nn.Module  # in eval mode: [n, C, H, W] normalised -> [n, K] logits
    class_names: list[str]  # K
    in_chans: int  # C
    image_size: Size  # (H, W), px
    crop_ratio: float
    mean: list[float]
    std: list[float]
    value_range: tuple[float, float] | None = None  # stored values (black, white) of images that are not 8-bit


def load_classifier(path: str | Path, class_names: Sequence[str] | None = None) -> Classifier:
    """Builds the classifier of a file and loads every tensor.

    Args:
        path: a classifier.safetensors, or the folder of the run that wrote it.
        class_names: in the order of the labels; needed if the file has none, and must equal those of the file otherwise.
    Raises:
        CheckpointError: if the file is a backbone, is incomplete, or has no class names.
        UserError: if the class names differ from those of the file.
    """
    path = Path(path)
    path = path / FILE if (path / FILE).is_file() else find_weights(path)
    state, metadata, _ = read_stored(path)
    is_timm = metadata.get("objective") == "supervised"
    if not is_timm and "protocol" not in metadata:
        raise _no_classifier(path, state, metadata)
    where = str(path)
    required: tuple[str, ...] = ("in_chans", "image_size", "eval_crop_ratio", "mean", "std")
    required += ("architecture",) if is_timm else ("pool", "embed_dim", "depth", "num_heads", "patch_size")
    if lacking := [key for key in required if key not in metadata]:
        raise CheckpointError(f"{where} does not record {', '.join(lacking)}: use the {FILE} that the run wrote")
    # Without a head, a file of supervised training is a backbone, which has no class names either.
    if is_timm and set(state) <= set(_timm_model(metadata, 0, "meta").state_dict()):
        raise _no_classifier(path, state, metadata)
    names = _class_names(metadata, class_names, where)
    model = _timm_model(metadata, len(names)) if is_timm else _vit(state, metadata, len(names), where)
    if faults := misfit(state, model.state_dict()):
        raise CheckpointError(f"{where} does not fit its metadata with {len(names)} classes; {faults}")
    model.load_state_dict(state)
    return Classifier(
        path, model.eval(), names, int(metadata["in_chans"]), recorded_size(metadata),
        float(metadata["eval_crop_ratio"]), json.loads(metadata["mean"]), json.loads(metadata["std"]),
        stored_range(metadata),
    )  # fmt: skip


def _class_names(metadata: Mapping[str, str], given: Sequence[str] | None, where: str) -> list[str]:
    stored = json.loads(metadata.get("class_names", "null"))
    if stored is None and given is None:
        raise CheckpointError(
            f"{where} records no class names, so its outputs cannot be named: give --classes FILE, a text file with the name of "
            "class n in line n (from 0)"
        )
    if stored is not None and given is not None and list(given) != stored:
        raise UserError(
            f"--classes differs from the {len(stored)} class names that {where} records: leave --classes out"
        )
    return list(stored or given or ())


def _vit(state: Mapping[str, Tensor], metadata: Mapping[str, str], num_classes: int, where: str) -> nn.Module:
    """Builds a fine-tuned ViT or a probe."""
    is_probe = metadata["protocol"] in PROBES
    encoder = {key.removeprefix(PROBE_ENCODER): value for key, value in state.items()} if is_probe else state
    encoder = joined_cls_tokens(encoder, int(metadata.get("num_cls_tokens", 1)), where)
    head: dict[str, Any] = {} if is_probe else {"num_classes": num_classes, "global_pool": metadata["pool"]}
    model = random_vit(
        recorded_size(metadata),
        **encoder_options(encoder),
        num_heads=int(metadata["num_heads"]),
        norm_eps=recorded_eps(encoder, metadata),
        **head,
    )
    return make_probe(metadata["protocol"], model, num_classes, metadata["pool"]) if is_probe else model


def _timm_model(metadata: Mapping[str, str], num_classes: int, device: str = "cpu") -> nn.Module:
    options = json.loads(metadata.get("model_options", "{}"))
    with torch.device(device):
        return create_backbone(
            metadata["architecture"], recorded_size(metadata),
            num_classes=num_classes, in_chans=int(metadata["in_chans"]), **options,
        )  # fmt: skip


def _no_classifier(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> CheckpointError:
    beside = path.parent / FILE
    if beside.is_file():
        fix = f"Give {beside}"
    elif metadata.get("objective") == "supervised":
        fix = f"Give the {FILE} that its training wrote"
    else:
        fix = f"Train one with `mae-et classify CONFIG --backbone {path}` and give the {FILE} that it writes"
    return CheckpointError(f"{path} is no classifier but a backbone or another model ({describe(state)}). {fix}")
