"""Exports encoders and classifiers to ONNX and compares the file with the model in onnxruntime.

Shapes: N images, C channels, S px, p patch size, gh x gw patches, L = gh gw, D width.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_et.errors import CheckpointError, UserError
from mae_et.models.architecture import CLASSIFIER, DECODER, is_rotary
from mae_et.models.linear_probe import PROBES, make_probe
from mae_et.models.pos_embed import TEMPERATURE, is_sincos_table
from mae_et.models.resize import change_input_size, has_fixed_size
from mae_et.models.sizes import Size, as_size, plain_size, recorded_size
from mae_et.models.strict import misfit
from mae_et.models.timm_backbone import create_backbone
from mae_et.models.vit import vit_from_state
from mae_et.storage.atomic import atomic_path, first_line
from mae_et.storage.plain import plain_vit
from mae_et.storage.weights import find_weights, read_weights

log = logging.getLogger(__name__)

DYNAMIC = ("none", "batch", "size")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_FILE = 2**31 - 2**27  # bytes; protobuf holds 2 GiB
TOLERANCE = 1e-4  # of the largest output; float32 sums in another order differ by 1e-6 to 1e-5


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Args:
        metadata: of the file, as in its `metadata_props`.
        input_shape, output_shape: numbers, and names of free dimensions.
        output: name of the output: "tokens", "features" or "logits".
        difference: largest absolute difference between onnxruntime and torch, over all compared inputs.
    """

    metadata: dict[str, str]
    input_shape: list[int | str]
    output_shape: list[int | str]
    output: str
    difference: float


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
    [N, D] of a supervised backbone, `tokens` [N, 1 + L, D] after the final norm of an encoder, with the cls token first.

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
    if path.suffix != ".onnx":
        raise UserError(f"{path}: a file in layout 'onnx' must end in .onnx")
    if dynamic not in DYNAMIC:
        raise UserError(f"dynamic = {dynamic!r} must be one of {', '.join(DYNAMIC)}")
    if absent := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"layout 'onnx' needs {', '.join(absent)}: pip install 'mae_et[onnx]'")
    model, output, metadata, size = _open_model(find_weights(source), entry, image_size, num_heads, dynamic == "size")
    channels = int(metadata["in_chans"])
    step = model.patch if isinstance(model, _AnySize) else 32  # px between valid sizes
    batch = 1 if dynamic == "none" else 2
    images = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))
    metadata = {
        **metadata,
        "layout": "onnx",
        "source": find_weights(source).name,
        "image_size": json.dumps(plain_size(size)),
    }
    program = _traced(model, images, output, dynamic, str(source))
    for key, value in metadata.items():
        program.model.metadata_props[key] = value
    inputs = [images]
    if dynamic != "none":
        inputs.append(torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(1)))
    if dynamic == "size":
        inputs.append(
            torch.randn(1, channels, size[0] + step, size[1] + 2 * step, generator=torch.Generator().manual_seed(2))
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if num_bytes > LARGEST_FILE:
        raise UserError(
            f"{source} has {num_bytes / 2**30:.1f} GiB of weights, and one ONNX file holds 2 GiB: export a smaller model"
        )
    with atomic_path(path) as temporary:
        program.save(temporary, external_data=False)
        difference = _difference(model, temporary, inputs, str(source))
    graph = program.model.graph
    return OnnxFile(metadata, _shape(graph.inputs[0]), _shape(graph.outputs[0]), output, difference)


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
    if any_size and "reg_token" in state:
        raise UserError(f"{path} has registers, which are exported at one size: use --dynamic batch and --image-size")
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


def _traced(model: nn.Module, images: Tensor, output: str, dynamic: str, where: str) -> Any:
    """Returns torch's ONNX program of a model."""
    free: dict[int, Any] = {}
    if dynamic != "none":
        free[0] = torch.export.Dim("batch")
    if dynamic == "size" and isinstance(model, _AnySize):
        free |= {2: model.patch * torch.export.Dim("rows"), 3: model.patch * torch.export.Dim("columns")}
    elif dynamic == "size":
        free |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    try:
        # The exporter prints its progress and warns about its own internals.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                model, (images,), dynamo=True, input_names=["images"], output_names=[output],
                dynamic_shapes=(free,) if free else None, verbose=False,
            )  # fmt: skip
    except Exception as error:
        # The exporter wraps errors of many kinds; the last cause names the operator or the dimension.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        hint = "use --dynamic none" if dynamic != "none" else "this model cannot be exported"
        raise UserError(f"{where} cannot be exported to ONNX ({first_line(cause)}): {hint}") from error


def _difference(model: nn.Module, path: Path, inputs: list[Tensor], where: str) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    largest = 0.0
    for images in inputs:
        with torch.no_grad():
            expected = model(images)
        (computed,) = session.run(None, {"images": images.numpy()})
        difference = float((torch.from_numpy(computed) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise UserError(
                f"{where}: onnxruntime differs from torch by {difference:.2g} on images of {tuple(images.shape)}, so the file "
                "is not written. Report this model together with the versions of torch and onnxruntime"
            )
        largest = max(largest, difference)
    return largest


def _shape(value: Any) -> list[int | str]:
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
