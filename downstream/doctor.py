"""Checks a backbone file: every class that reads it must compute the same features of an image.

Shapes: S px, p patch size, D width, L = (S / p)^2 patches.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from downstream.backbones.loading import Account, load_strictly
from downstream.backbones.vit_det import ViTDet
from downstream.backbones.vit_seg import ViTSeg
from mae_et.errors import CheckpointError
from mae_et.models.architecture import CLASSIFIER, DECODER, encoder_options, recorded_eps
from mae_et.models.blocks import mlp_arguments
from mae_et.models.cls_tokens import split_cls_tokens
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.pos_embed import is_sincos_table
from mae_et.models.position_table import recorded_grid, table_grid, with_register_rows
from mae_et.models.sizes import Size, size_text
from mae_et.storage.backbone import load_encoder, read_backbone
from mae_et.storage.huggingface import export_hugging_face
from mae_et.storage.layouts import beyond_mae
from mae_et.storage.weights import find_weights

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """Compares the features of two models.

    Args:
        what: names of the two models.
        difference: the largest difference, divided by the standard deviation of the features if that is above 1.
    """

    what: str
    difference: float

    @property
    def passed(self) -> bool:
        return self.difference <= TOLERANCE  # false for NaN


@dataclass
class Report:
    """Holds the results for a file."""

    architecture: str
    comparisons: list[Comparison] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    def compare(self, what: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
        """Adds a comparison of features."""
        worst = max(float((a - b).abs().max() / b.std().clamp(min=1)) for a, b in zip(ours, theirs, strict=True))
        self.comparisons.append(Comparison(what, worst if worst == worst else float("inf")))


@dataclass(frozen=True)
class _Encoder:
    """Holds what a file says about its encoder."""

    path: Path
    weights: dict[str, Tensor]  # timm's names, without decoder and classifier
    metadata: Mapping[str, str]
    size: Size
    num_heads: int


@torch.no_grad()
def examine(path: str | Path, num_heads: int | None = None) -> Report:
    """Compares the features of a backbone file in all models, at the image size of its position table.

    The features are those of the patches after the middle and the last block, before the final norm; in transformers those
    of all tokens after the final norm. The detection backbone, here without windows, has no cls token. So it is compared
    with a ViT of timm without cls token.

    Args:
        path: as for `mae_et.storage.weights.read_weights`.
        num_heads: None: from the metadata, or known by the width.
    Raises:
        CheckpointError: if the file does not load into one of the classes. The message names keys and shapes.
    """
    path = find_weights(path)
    state, metadata = read_backbone(path)
    patch = state["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in state else 16
    table = state.get("pos_embed")
    grid = recorded_grid(state, metadata) or (14, 14)
    if table is not None and table.ndim == 3:
        grid = table_grid(table, table.shape[2], str(path), recorded_grid(state, metadata))
    size = grid[0] * patch, grid[1] * patch
    encoder: Any = load_encoder(path, size, num_heads=num_heads, global_pool=_pool(state)).eval()
    depth, dim, heads = len(encoder.blocks), encoder.embed_dim, encoder.blocks[0].attn.num_heads
    beyond = beyond_mae(state)
    report = Report(
        f"ViT of width {dim}, depth {depth}, {heads} heads, patches of {patch} px, for images of {size_text(size)} px"
        + (f", with {', '.join(beyond)}" if beyond else "")
    )
    taps = sorted({(depth - 1) // 2, depth - 1})
    images, first = _image(size, encoder.patch_embed.proj.in_channels), encoder.num_prefix_tokens
    weights = {key: value for key, value in state.items() if not key.startswith((*DECODER, *CLASSIFIER))}
    file = _Encoder(path, weights, metadata, size, heads)

    timms = _timm(file)
    name, expected = f"timm's {type(timms).__name__}", _taps(timms, images, taps, first)
    report.compare(f"mae_et.load_encoder and {name}", _taps(encoder, images, taps, first), expected)
    features = [tokens[:, 1:] for tokens in _pretrained(file).features(images, taps)]
    report.compare(f"the encoder of pre-training and {name}", features, expected)
    if beyond:
        report.notes.append(
            f"detection and segmentation have no place for {', '.join(beyond)}: their backbones were not compared"
        )
    else:
        _compare_dense(report, file, images, taps, expected)
    _compare_transformers(report, file, images, encoder.forward_features(images))
    return report


def _compare_dense(report: Report, file: _Encoder, images: Tensor, taps: list[int], expected: list[Tensor]) -> None:
    """Adds the backbones of segmentation and detection to a report.

    Args:
        expected: of timm's ViT.
    """

    def flatten(maps: Any) -> list[Tensor]:
        return [features.flatten(2).transpose(1, 2) for features in maps]

    found = encoder_options(file.weights)
    options = {
        "img_size": file.size,
        "in_channels": found["in_chans"],
        "num_heads": file.num_heads,
        **{key: found[key] for key in ("patch_size", "embed_dim", "depth", "mlp_ratio")},
    }
    segmentation: Any = ViTSeg(out_indices=taps, rescales=None, **options).eval()
    report.accounts["segmentation (ViTSeg)"] = segmentation.load_backbone(file.path)
    report.compare("segmentation and timm's VisionTransformer", flatten(segmentation(images)), expected)
    without_cls = _taps(_timm(file, cls_token=False), images, taps[-1:], 0)
    detection: Any = ViTDet(window_size=0, **options).eval()
    report.accounts["detection (ViTDet)"] = detection.load_backbone(file.path)
    report.compare(
        "detection and timm's VisionTransformer, both without cls token", flatten(detection(images)), without_cls
    )
    change = float((without_cls[0] - expected[-1]).std() / expected[-1].std())
    report.notes.append(f"for information: without the cls token, as in detection, the features change by {change:.1%}")


def _compare_transformers(report: Report, file: _Encoder, images: Tensor, expected: Tensor) -> None:
    """Adds the layout "huggingface" to a report: it is written to a temporary folder and loaded by transformers.

    Args:
        expected: all tokens of our encoder, after the final norm.
    """
    if importlib.util.find_spec("transformers") is None:
        report.notes.append("transformers is not installed: the layout 'huggingface' was not compared")
        return
    import transformers

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # notes on parts that are not compared, e.g. the decoder
    transformers.utils.logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            name = export_hugging_face(file.path, folder, num_heads=file.num_heads)["hugging_face_class"]
            name = name if name.endswith("Model") else "ViTModel"  # that of the encoder alone
            model = getattr(transformers, name).from_pretrained(folder).eval()
            features = model(images).last_hidden_state
    except CheckpointError as error:
        report.notes.append(f"the layout 'huggingface' was not compared: {error}")
    else:
        report.compare(f"transformers' {name} and mae_et.load_encoder", [features], [expected])
    finally:
        logging.disable(disabled)


def _pool(state: dict[str, Tensor]) -> str:
    return "token" if "norm.weight" in state else "avg"


def _timm(file: _Encoder, cls_token: bool = True) -> Any:
    """Loads timm's ViT, or its DINOv3, by timm's names."""
    found = encoder_options(file.weights)
    swiglu, registers = found["mlp"] == "swiglu", found["num_registers"] + found["num_cls_tokens"] - 1
    options: dict[str, Any] = {
        "img_size": file.size,
        **{key: found[key] for key in ("patch_size", "in_chans", "embed_dim", "depth")},
        "num_heads": file.num_heads,
        "num_classes": 0,
        "norm_layer": partial(nn.LayerNorm, eps=recorded_eps(file.weights, file.metadata)),
        "global_pool": "token" if cls_token else "avg",
    }
    tensors = {key: value for key, value in split_cls_tokens(file.weights).items() if not key.startswith("norm.")}
    if found["rotary_positions"]:
        options |= {"mlp_ratio": found["mlp_ratio"], "swiglu_mlp": swiglu, "num_reg_tokens": registers}
        model = timm.create_model("vit_small_patch16_dinov3_qkvb", init_values=1.0, **options)
    else:
        options |= mlp_arguments(found["mlp"], found["embed_dim"], found["mlp_ratio"])
        model = VisionTransformer(class_token=cls_token, reg_tokens=registers, **options)
        if "pos_embed" in tensors:
            table = with_register_rows(tensors["pos_embed"], registers)
            tensors["pos_embed"] = table if cls_token else table[:, 1:]
    if not cls_token:
        tensors.pop("cls_token", None)
    load_strictly(model, tensors, file.path, may_miss=("norm.", "fc_norm.", "gamma_1", "gamma_2"))  # layer scales are 1
    return model.eval()


def _pretrained(file: _Encoder) -> MaskedAutoencoder:
    """Loads the encoder of pre-training; its decoder is new."""
    table = file.weights.get("pos_embed")
    model = MaskedAutoencoder(
        file.size,
        **encoder_options(file.weights),
        num_heads=file.num_heads,
        decoder_embed_dim=4,
        decoder_depth=1,
        decoder_num_heads=1,
        learnt_positions=table is not None and not is_sincos_table(table),
    )
    load_strictly(model, file.weights, file.path, may_miss=("decoder_", "mask_token", "norm."))
    return model.eval()


def _taps(model: Any, images: Tensor, taps: list[int], patches_from: int) -> list[Tensor]:
    """Returns the outputs of blocks for patches only: [1, L, D] each."""
    outputs: list[Tensor] = []
    handles = [model.blocks[i].register_forward_hook(lambda block, args, out: outputs.append(out)) for i in taps]
    model.forward_features(images)
    for handle in handles:
        handle.remove()
    return [tokens[:, patches_from:] for tokens in outputs]


def _image(size: Size, channels: int) -> Tensor:
    """Returns a generated image with structure at all scales, equal in each call: [1, C, H, W]."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, channels, *size)
    side = 1
    while side <= max(size):
        noise = torch.randn(1, channels, side, side, generator=generator)
        image += torch.nn.functional.interpolate(noise, size=size, mode="bilinear") / 2
        side *= 2
    return image
