"""Backbone files: the encoder's weights under the names that other libraries use, with metadata that says where from.

Written by `export`; read, whoever wrote them, by `load_encoder` and `load_mae`.
"""

from __future__ import annotations

import argparse
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae_et.errors import CheckpointError, UserError
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.sizes import MAE_SIZES
from mae_et.models.vit import NUM_DECODER_HEADS, NUM_HEADS, known_num_heads, num_blocks, random_vit, vit_from_state
from mae_et.storage.checkpoint import atomic_path, describe, load_weights, read_weights

LAYOUTS = ("timm", "mae", "mmdet", "mmseg")
_DECODER = ("mask_token", "decoder_")


def export(source: str | Path, path: str | Path, layout: str = "timm") -> dict[str, str]:
    """Writes a backbone file from a checkpoint.

    Args:
        source: a run's checkpoint, or any file that `read_weights` reads.
        path: `.safetensors`; or `.pth`, a torch file with the state under `model` (the official MAE's form).
        layout: "timm": VisionTransformer's names; "mae": the official MAE's, with the decoder; "mmdet": the ViTDet
            backbone's, without cls token and final norm; "mmseg": mmsegmentation's MAE backbone's.
    Returns:
        The metadata written.
    Raises:
        CheckpointError: if the file does not hold what the layout needs.
        ValueError: if there is no such layout.
    """
    state, metadata = read_backbone(source)
    write_backbone(state, path, layout, {"source": Path(source).name, **metadata})
    return metadata


def write_backbone(state: Mapping[str, Tensor], path: str | Path, layout: str, metadata: Mapping[str, str]) -> None:
    """Writes a state dict in a layout, atomically. Arguments and errors as for `export`."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(f"{path}: a backbone file ends in .safetensors, .pth or .pt")
    metadata = {**encoder_digest(state), **metadata}  # what is given goes first: it may be of a fuller file
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in to_layout(state, layout).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, {**metadata, "format": "pt", "layout": layout})
        else:
            torch.save({"model": tensors, "metadata": {**metadata, "layout": layout}}, temporary)


def to_layout(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Renames an MAE's or ViT's state; see `export` for the layouts and errors."""
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if "patch_embed.proj.weight" not in state or "blocks.0.attn.qkv.weight" not in state:
        raise CheckpointError(f"the file holds no encoder to export ({describe(state)})")
    if layout == "mae":
        if not any(key.startswith(_DECODER) for key in state):
            raise CheckpointError(
                "layout 'mae' needs the decoder, which this file lacks: export from a run's checkpoint"
            )
        return dict(state)
    encoder = {key: value for key, value in state.items() if not key.startswith(_DECODER)}
    if layout == "mmdet":
        return {key: value for key, value in encoder.items() if key != "cls_token" and not key.startswith("norm.")}
    if layout == "mmseg":
        return {_mmseg_name(key): value for key, value in encoder.items() if not key.startswith("norm.")}
    return encoder


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of tensors: names, shapes and values in float32. The same weights have it in whatever file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encoder_digest(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns {"encoder_sha256": digest} of what a state holds of an encoder under timm's names; {} if nothing.

    By this digest a result names the pre-training that it comes from, whatever the file is called and wherever it lies.
    Position tables are left out, for they may be computed; so are heads and the decoder.
    """
    encoder = {key: value for key, value in state.items() if key.startswith(("blocks.", "patch_embed.", "cls_token"))}
    return {"encoder_sha256": state_digest(encoder)} if encoder else {}


def read_backbone(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Like `read_weights`, and with the metadata that torch files hold: a run's checkpoint, our `.pth`, the official MAE's.

    Returns:
        The state and the metadata that the file holds (of an official file, what its arguments say), always with
        `encoder_digest`.
    Raises:
        CheckpointError: as `read_weights`.
    """
    state, metadata = read_weights(path)
    return state, {**encoder_digest(state), **(metadata or _torch_metadata(path))}


def _torch_metadata(path: str | Path) -> dict[str, str]:
    if Path(path).suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return {}
    with torch.serialization.safe_globals([argparse.Namespace]):  # the official MAE's arguments
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=True
        )  # checked above; maps, reads nothing
    metadata: dict[str, str] = {}
    if not isinstance(content, dict):
        return metadata
    if isinstance(content.get("metadata"), dict):
        metadata = {str(key): str(value) for key, value in content["metadata"].items()}
        if {"progress", "num_steps"} <= content.keys():  # a checkpoint of a run
            metadata |= {"step": str(content["progress"]["step"]), "num_steps": str(content["num_steps"])}
    elif isinstance(content.get("args"), argparse.Namespace) and hasattr(content["args"], "norm_pix_loss"):
        metadata = {"target": "normalised pixels" if content["args"].norm_pix_loss else "pixels"}
    return metadata


def load_encoder(
    path: str | Path | None,
    image_size: int,
    *,
    size: str = "base",
    patch_size: int | None = None,
    in_chans: int | None = 3,
    num_heads: int | None = None,
    drop_path_rate: float = 0.0,
    global_pool: str = "token",
    num_classes: int = 0,
) -> VisionTransformer:
    """Reads any backbone file into timm's ViT.

    Args:
        path: ours in layout "timm" or "mae", a run's `step_*.pt`, timm's state dicts, the official MAE's (encoder or full);
            None: no file, but the initial weights of an MAE, the baseline of everything that was learnt.
        image_size: S in px, whatever the weights were trained at.
        size: of the random model; a file says its own.
        patch_size, in_chans: of the random model (None: the size's own, and 3); an error if a file has others.
        num_heads: None: from the file's metadata, or known by the width.
        drop_path_rate, global_pool, num_classes: as in `mae_et.models.vit.random_vit`; the head is always new.
    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape, or what the file holds instead of a ViT.
        ValueError: if image_size is no multiple of the patch size, or there is no such size.
    """
    if path is None:
        return random_encoder(
            image_size, size=size, patch_size=patch_size, in_chans=3 if in_chans is None else in_chans,
            num_heads=num_heads, drop_path_rate=drop_path_rate, global_pool=global_pool, num_classes=num_classes,
        )  # fmt: skip
    state, metadata = read_backbone(path)
    return vit_from_state(
        state, image_size, metadata=metadata, where=str(path), patch_size=patch_size, in_chans=in_chans,
        num_heads=num_heads, drop_path_rate=drop_path_rate, global_pool=global_pool, num_classes=num_classes,
    )  # fmt: skip


def random_encoder(
    image_size: int,
    *,
    size: str = "base",
    patch_size: int | None = None,
    in_chans: int = 3,
    num_heads: int | None = None,
    drop_path_rate: float = 0.0,
    global_pool: str = "token",
    num_classes: int = 0,
) -> VisionTransformer:
    """Builds a ViT of a size of `MAE_SIZES` with random weights; arguments and errors as for `load_encoder`."""
    if size not in MAE_SIZES:
        raise UserError(f"no size {size!r}; known: {', '.join(MAE_SIZES)}")
    dims = MAE_SIZES[size]
    return random_vit(
        image_size,
        patch_size=patch_size or dims.patch_size,
        in_chans=in_chans,
        embed_dim=dims.embed_dim,
        depth=dims.depth,
        num_heads=num_heads or dims.num_heads,
        mlp_ratio=dims.mlp_ratio,
        drop_path_rate=drop_path_rate,
        global_pool=global_pool,
        num_classes=num_classes,
    )


def load_mae(
    path: str | Path,
    image_size: int | None = None,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    norm_pix_loss: bool | None = None,
) -> tuple[MaskedAutoencoder, dict[str, str]]:
    """Reads an encoder with its decoder.

    Args:
        path: a run's checkpoint, a file in layout "mae", or an official full MAE.
        image_size: S in px of the stored position tables; None: the file's, else 224.
        num_heads, decoder_num_heads: None: from the metadata, or known by the widths.
        norm_pix_loss: whether it predicts normalised patches, if it predicts pixels; None: from the metadata.
    Returns:
        The model in eval mode and the file's metadata.
    Raises:
        CheckpointError: if the file has no decoder, does not say which target it predicts and the caller does not either,
            or does not fit, naming the keys.
        ValueError: if image_size is no multiple of the patch size.
    """
    state, metadata = read_backbone(path)
    kernels = {"encoder": "patch_embed.proj.weight", "decoder": "decoder_embed.weight"}
    lacking = [name for name, key in kernels.items() if key not in state]
    if lacking == ["decoder"]:
        raise CheckpointError(
            f"{path} is a backbone without the decoder ({describe(state)}), so it cannot reconstruct: give a run's "
            "checkpoint (WORK_DIR/checkpoints/step_*.pt), a file exported in layout 'mae', or an official full MAE"
        )
    if lacking:
        raise CheckpointError(f"{path} holds no MAE: no {' and no '.join(lacking)} ({describe(state)})")
    if norm_pix_loss is None and "target" not in metadata:
        raise CheckpointError(
            f"{path} does not say whether it predicts pixels or normalised pixels; give norm_pix_loss (--norm-pix yes for "
            "the official pre-trained models, no for the official ones made for visualisation)"
        )
    predicts_hog = metadata.get("target") == "hog"
    if predicts_hog and norm_pix_loss is not None:
        raise UserError(f"{path} predicts HOG descriptors, no pixels: leave norm_pix_loss (--norm-pix) out")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    decoder_width = state["decoder_embed.weight"].shape[0]
    size = image_size or int(metadata.get("image_size", 224))
    if size % patch:
        raise UserError(f"image_size = {size} is no multiple of the patch size {patch} of {path}")
    hidden = state.get("blocks.0.mlp.fc1.weight")
    model = MaskedAutoencoder(
        size,
        patch_size=patch,
        in_chans=channels,
        embed_dim=width,
        depth=num_blocks(state, "blocks."),
        num_heads=known_num_heads(width, str(path), num_heads, metadata.get("num_heads"), NUM_HEADS, "num_heads"),
        decoder_embed_dim=decoder_width,
        decoder_depth=num_blocks(state, "decoder_blocks."),
        decoder_num_heads=known_num_heads(
            decoder_width, f"{path}'s decoder", decoder_num_heads, metadata.get("decoder_num_heads"),
            NUM_DECODER_HEADS, "decoder_num_heads",
        ),
        mlp_ratio=4.0 if hidden is None else (hidden.shape[0] + 0.5) / width,
        norm_pix_loss=metadata.get("target") == "normalised pixels" if norm_pix_loss is None else norm_pix_loss,
        target="hog" if predicts_hog else "pixels",
        hog_cell_size=int(metadata["hog_cell_size"]) if predicts_hog else None,
    )  # fmt: skip
    load_weights(model, path)
    return model.eval(), metadata


def _mmseg_name(key: str) -> str:
    for ours, theirs in (
        ("patch_embed.proj.", "patch_embed.projection."),
        ("blocks.", "layers."),
        (".norm1.", ".ln1."),
        (".norm2.", ".ln2."),
        (".mlp.fc1.", ".ffn.layers.0.0."),
        (".mlp.fc2.", ".ffn.layers.1."),
    ):
        key = key.replace(ours, theirs)
    return key
