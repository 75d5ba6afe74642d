"""Checks a backbone file: every class that reads it must compute the same features of an image.

Shapes: S px, p patch size, D width, L = (S / p)^2 patches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from downstream.backbones.loading import Account, load_strictly
from downstream.backbones.vit_det import ViTDet
from downstream.backbones.vit_seg import ViTSeg
from mae_et.models.architecture import DECODER
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.pos_embed import is_sincos_table
from mae_et.models.position_table import recorded_grid, table_grid
from mae_et.models.sizes import Size, size_text
from mae_et.storage.backbone import load_encoder, read_backbone
from mae_et.storage.layouts import check_plain

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


@torch.no_grad()
def examine(path: str | Path, num_heads: int | None = None) -> Report:
    """Compares the features of a backbone file in all models, at the image size of its position table.

    The features are those of the patches after the middle and the last block, before the final norm. The detection
    backbone, here without windows, has no cls token. So it is compared with a ViT of timm without cls token.

    Args:
        path: as for `mae_et.storage.weights.read_weights`.
        num_heads: None: from the metadata, or known by the width.
    Raises:
        CheckpointError: if the file does not load into one of the classes. The message names keys and shapes.
    """
    state, metadata = read_backbone(path)
    check_plain(state, "a backbone of detection or segmentation", str(path))
    patch = state["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in state else 16
    table = state.get("pos_embed")
    grid = (14, 14)
    if table is not None and table.ndim == 3:
        grid = table_grid(table, table.shape[2], str(path), recorded_grid(state, metadata))
    size = grid[0] * patch, grid[1] * patch
    encoder: Any = load_encoder(path, size, num_heads=num_heads, global_pool=_pool(state)).eval()
    depth, dim, channels = len(encoder.blocks), encoder.embed_dim, encoder.patch_embed.proj.in_channels
    heads, hidden = encoder.blocks[0].attn.num_heads, encoder.blocks[0].mlp.fc1.out_features
    report = Report(
        f"ViT of width {dim}, depth {depth}, {heads} heads, patches of {patch} px, for images of {size_text(size)} px"
    )
    options = {
        "img_size": size, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads,
        "mlp_ratio": (hidden + 0.5) / dim,
    }  # fmt: skip
    taps = sorted({(depth - 1) // 2, depth - 1})
    images = _image(size, channels)

    def compare(what: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
        worst = max(float((a - b).abs().max() / b.std().clamp(min=1)) for a, b in zip(ours, theirs, strict=True))
        report.comparisons.append(Comparison(what, worst if worst == worst else float("inf")))

    weights = {key: value for key, value in state.items() if not key.startswith(DECODER)}
    timms = {True: _timm(weights, options, channels, True, path), False: _timm(weights, options, channels, False, path)}
    expected = {cls: _taps(model, images, taps, patches_from=int(cls)) for cls, model in timms.items()}
    compare("mae_et.load_encoder and timm's VisionTransformer", _taps(encoder, images, taps, 1), expected[True])
    if table is not None and is_sincos_table(table):
        pretrained = MaskedAutoencoder(
            size, patch, channels, dim, depth, heads, decoder_embed_dim=4, decoder_depth=1, decoder_num_heads=1,
            mlp_ratio=(hidden + 0.5) / dim,
        ).eval()  # fmt: skip
        tensors = {key: value for key, value in weights.items() if not key.startswith(("head.", "fc_norm."))}
        load_strictly(pretrained, tensors, path, may_miss=("decoder_", "mask_token", "norm."))
        features = [tokens[:, 1:] for tokens in pretrained.features(images, taps)]
        compare("the encoder of pre-training and timm's VisionTransformer", features, expected[True])
    else:
        report.notes.append(
            "the positions are learnt: the encoder of pre-training, which has fixed ones, was not compared"
        )

    def flatten(maps: Any) -> list[Tensor]:
        return [features.flatten(2).transpose(1, 2) for features in maps]

    segmentation: Any = ViTSeg(out_indices=taps, rescales=None, in_channels=channels, **options).eval()
    report.accounts["segmentation (ViTSeg)"] = segmentation.load_backbone(path)
    compare("segmentation and timm's VisionTransformer", flatten(segmentation(images)), expected[True])
    detection: Any = ViTDet(window_size=0, in_channels=channels, **options).eval()
    report.accounts["detection (ViTDet)"] = detection.load_backbone(path)
    compare(
        "detection and timm's VisionTransformer, both without cls token",
        flatten(detection(images)),
        expected[False][-1:],
    )

    change = float((expected[False][-1] - expected[True][-1]).std() / expected[True][-1].std())
    report.notes.append(f"for information: without the cls token, as in detection, the features change by {change:.1%}")
    return report


def _pool(state: dict[str, Tensor]) -> str:
    return "token" if "norm.weight" in state else "avg"


def _timm(
    weights: dict[str, Tensor], options: dict[str, Any], channels: int, cls_token: bool, path: str | Path
) -> VisionTransformer:
    """Loads timm's ViT by timm's names, without code of this project."""
    model = VisionTransformer(
        in_chans=channels,
        num_classes=0,
        global_pool="token" if cls_token else "avg",
        class_token=cls_token,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **options,
    ).eval()
    tensors = {key: value for key, value in weights.items() if not key.startswith(("head.", "fc_norm.", "norm."))}
    if not cls_token:
        tensors.pop("cls_token", None)
        if "pos_embed" in tensors:
            tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    load_strictly(model, tensors, path, may_miss=("norm.", "fc_norm."))
    return model


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
