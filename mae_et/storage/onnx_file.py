"""Exports encoders and classifiers to ONNX; `onnx_program` writes the file and compares it.

Shapes: N images, C channels, S px, p patch size, gh x gw patches, L = gh gw, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_et.errors import CheckpointError, UserError
from mae_et.models.architecture import CLASSIFIER, DECODER, count_cls_tokens, is_rotary
from mae_et.models.linear_probe import PROBES, make_probe
from mae_et.models.pos_embed import TEMPERATURE, is_sincos_table
from mae_et.models.resize import change_input_size, has_fixed_size
from mae_et.models.sizes import Size, as_size, plain_size, recorded_size
from mae_et.models.strict import misfit
from mae_et.models.timm_backbone import create_backbone
from mae_et.models.vit import vit_from_state
from mae_et.storage.onnx_program import OnnxFile, Sizes, check_request, write_onnx
from mae_et.storage.plain import plain_vit
from mae_et.storage.weights import find_weights, read_weights


def export_onnx(
    source: str | Path,
    path: str | Path,
    *,
    entry: str | None = None,
    image_size: int | Size | None = None,
    dynamic: str = "batch",
    num_heads: int | None = None,
) -> OnnxFile:
    """Writes an ONNX file and compares it with the model on random images in onnxruntime.

    The input `images` is normalised. The output depends on the source: `logits` [N, classes] of a classifier, `features`
    [N, D] of a supervised backbone, `tokens` [N, M + R + L, D] after the final norm of an encoder: M cls tokens, R registers
    and the patches.

    Args:
        source, entry: as for `read_weights`.
        path: of the file, `.onnx`.
        image_size: px, side or (H, W); None: as recorded, else 224.
        dynamic: "none": one image of H x W; "batch": any number of images; "size": also any height and width. A ViT takes
            multiples of its patch size then.
        num_heads: of a ViT; None: from the metadata, or known by the width.
    Raises:
        UserError: if a package is missing, an argument does not fit the model, the model cannot be exported, or
            onnxruntime computes something else.
        CheckpointError: if the source is no ViT and no supervised backbone, or does not fit its model.
    """
    path = Path(path)
    check_request(path, dynamic)
    weights = find_weights(source)
    model, output, metadata, size = _open_model(weights, entry, image_size, num_heads, dynamic == "size")
    step = model.patch if isinstance(model, _AnySize) else 1
    # A timm model with maps has a stride of up to 32.
    sizes = Sizes(size, step, step if isinstance(model, _AnySize) else 32)
    image_sizes = {"layout": "onnx", "source": weights.name, "image_size": json.dumps(plain_size(size))}
    return write_onnx(
        model, path, channels=int(metadata["in_chans"]), sizes=sizes, dynamic=dynamic, outputs=[output],
        metadata=metadata | image_sizes, where=str(source),
    )  # fmt: skip


class _AnySize(nn.Module):
    """A plain ViT that computes its sine-cosine position table from the size of the images.

    Args:
        vit: without learnt positions.
        tokens: return all tokens [N, 1 + L, D]; else the output of the head.
    """

    frequencies: Tensor

    def __init__(self, vit: VisionTransformer, tokens: bool) -> None:
        super().__init__()
        self.vit, self.tokens, self.patch = vit, tokens, vit.patch_embed.patch_size[0]
        width = vit.embed_dim
        exponents = torch.arange(width // 4, dtype=torch.float64) / (width / 4)
        self.register_buffer("frequencies", (TEMPERATURE**-exponents).float())

    def forward(self, images: Tensor) -> Tensor:
        vit = self.vit
        maps = vit.patch_embed.proj(images)  # [N, D, gh, gw]
        rows, columns = maps.shape[-2:]
        by_column = self._encoded(columns)[None].expand(rows, -1, -1)
        by_row = self._encoded(rows)[:, None].expand(-1, columns, -1)
        positions = torch.cat([by_column, by_row], dim=2).flatten(0, 1)
        patches = maps.flatten(2).transpose(1, 2) + positions
        cls: Any = vit.cls_token
        tokens = torch.cat([cls.expand(images.shape[0], -1, -1), patches], dim=1)
        tokens = vit.norm(vit.blocks(tokens))
        return tokens if self.tokens else vit.forward_head(tokens)

    def _encoded(self, positions: int) -> Tensor:
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class _Tokens(nn.Module):
    """Returns the tokens of a ViT after its final norm."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features(images)


def _open_model(
    path: Path, entry: str | None, image_size: int | Size | None, num_heads: int | None, any_size: bool
) -> tuple[nn.Module, str, dict[str, str], Size]:
    """Returns the model in eval mode, the name of its output, the metadata and the size of the images in px."""
    state, metadata = read_weights(path, entry)
    size = as_size(image_size or recorded_size(metadata))
    if metadata.get("objective") == "supervised":
        model: Any = _timm_model(state, metadata, size, str(path), any_size)
        return model.eval(), "logits" if "class_names" in metadata else "features", metadata, size
    state = plain_vit(state, str(path), metadata)
    classes, pool = _head_of(path, state, metadata)
    is_probe = metadata.get("protocol") in PROBES
    vit = vit_from_state(
        state, size, metadata=metadata, where=str(path), num_heads=num_heads,
        global_pool="token" if is_probe else pool, num_classes=0 if is_probe else classes,
    )  # fmt: skip
    head = {key: value for key, value in state.items() if key.startswith(CLASSIFIER) and not is_probe}
    if head:
        own = {key: value for key, value in vit.state_dict().items() if key.startswith(CLASSIFIER)}
        if faults := misfit(head, own):
            raise CheckpointError(f"{path}: the head does not fit a ViT with pooling {pool!r}: {faults}")
        vit.load_state_dict(head, strict=False)
    metadata = {**metadata, "in_chans": str(vit.patch_embed.proj.in_channels)}
    output = "logits" if classes else "features" if pool == "avg" else "tokens"
    if any_size and is_probe:
        raise UserError(f"{path} is a probe, which is exported at one size: use --dynamic batch or none")
    if any_size and ("reg_token" in state or count_cls_tokens(state) > 1):
        what = "registers" if "reg_token" in state else "several cls tokens"
        raise UserError(f"{path} has {what}, which are exported at one size: use --dynamic batch and --image-size")
    if any_size and is_rotary(state):
        raise UserError(
            f"{path} has rotary positions, which are exported at one size: use --dynamic batch and --image-size"
        )
    if any_size:
        table = state.get("pos_embed")
        if table is not None and not is_sincos_table(table):
            raise UserError(
                f"{path} has learnt positions, which are resampled for each size and not part of the graph: use --dynamic "
                "batch and --image-size"
            )
        return _AnySize(vit, output == "tokens").eval(), output, metadata, size
    if is_probe:
        return _probe(path, metadata["protocol"], vit, classes, pool).eval(), output, metadata, size
    return (_Tokens(vit) if output == "tokens" else vit).eval(), output, metadata, size


def _head_of(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Returns the number of classes (0: an encoder) and the pooling of a ViT."""
    if any(key.startswith(DECODER) for key in state):
        return 0, "token"
    if metadata.get("protocol") in PROBES:
        return len(json.loads(metadata["class_names"])), metadata["pool"]
    pool = "avg" if "fc_norm.weight" in state else "token"
    return (len(state["head.weight"]) if "head.weight" in state else 0), pool


def _probe(path: Path, protocol: str, vit: VisionTransformer, num_classes: int, pool: str) -> nn.Module:
    """Builds the classifier of a probe; `read_weights` has checked the file and leaves out all but the encoder."""
    probe = make_probe(protocol, vit, num_classes, pool)
    state = safetensors.torch.load_file(path)
    own = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    wanted = {key: value for key, value in probe.state_dict().items() if not key.startswith("encoder.")}
    if faults := misfit(own, wanted):
        raise CheckpointError(f"{path} is not a file of the protocol {protocol}: {faults}")
    probe.load_state_dict(own, strict=False)
    return probe


def _timm_model(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], size: Size, where: str, any_size: bool
) -> nn.Module:
    name, options = metadata["architecture"], json.loads(metadata.get("model_options", "{}"))
    classes = len(json.loads(metadata.get("class_names", "[]")))
    recorded = recorded_size(metadata)
    model = create_backbone(name, recorded, num_classes=classes, in_chans=int(metadata["in_chans"]), **options)
    if faults := misfit(state, model.state_dict()):
        raise CheckpointError(f"{where} does not fit timm's {name}: {faults}")
    model.load_state_dict(state)
    if any_size and has_fixed_size(model):
        raise UserError(f"{where}: {name} takes images of one size: use --dynamic batch and --image-size")
    if size != recorded and has_fixed_size(model):
        change_input_size(model, None, None, size)
    return model
