"""Backbone files: encoders under the names of other libraries, with metadata about their origin."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae_et.errors import CheckpointError, UserError
from mae_et.models.architecture import (
    CLASSIFIER,
    NUM_DECODER_HEADS,
    PATCHES,
    differences,
    encoder_options,
    known_num_heads,
    mlp_of,
    num_blocks,
    published_heads,
    recorded_eps,
)
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.pos_embed import is_sincos_table
from mae_et.models.position_table import fit_position_embedding, recorded_grid
from mae_et.models.sizes import Size, as_size, recorded_size
from mae_et.models.strict import some
from mae_et.models.vit import adapt_patch_channels, check_multiple, random_vit, vit_from_state
from mae_et.storage.atomic import atomic_path
from mae_et.storage.digest import check_digest, encoder_digest, state_digest
from mae_et.storage.layouts import LAYOUTS, to_layout
from mae_et.storage.metadata import architecture_of
from mae_et.storage.plain import scaled_vit, without_layer_scales
from mae_et.storage.weights import describe, find_weights, load_weights, read_weights

log = logging.getLogger(__name__)

HEAD = ("decoder_pred.weight", "decoder_pred.bias")


def export(source: str | Path, path: str | Path, layout: str = "timm", entry: str | None = None) -> dict[str, str]:
    """Writes a backbone file from a checkpoint.

    Args:
        source: as for `read_weights`.
        path: `.safetensors` or `.pth`; mmdetection and mmsegmentation read only `.pth`.
        layout: as for `to_layout`.
        entry: as for `read_weights`.
    Returns:
        The metadata of the file.
    Raises:
        CheckpointError: if the source does not hold what the layout needs.
        ValueError: if the layout is unknown, or its library cannot read the format.
    """
    source = find_weights(source, with_decoder=layout == "mae")
    state, metadata = read_backbone(source, entry)
    return write_backbone(state, path, layout, {"source": source.name, **metadata}, where=str(source))


def write_backbone(
    state: Mapping[str, Tensor],
    path: str | Path,
    layout: str,
    metadata: Mapping[str, str],
    where: str = "the model",
) -> dict[str, str]:
    """Writes a state dict in a layout, atomically.

    Args:
        state: in the form of mae_et/storage/plain.py.
        path, layout: as for `export`.
        metadata: text. The architecture is added from the tensors where it is absent.
        where: the source, for messages.
    Returns:
        The metadata of the file, with the digests of its tensors.
    Raises:
        As `export`.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    suffixes, entries = LAYOUTS[layout]
    if path.suffix not in suffixes:
        raise UserError(
            f"{path}: a file in layout {layout!r} must end in {' or '.join(suffixes)}, to be readable there"
        )
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in to_layout(state, layout, where).items()}
    pooling = {"global_pool": "avg"} if layout == "timm" and "norm.weight" not in tensors else {}
    metadata = {
        **architecture_of(state),
        **encoder_digest(state),
        **metadata,  # overrides the digest, because a source may hold more than the state
        **pooling,
        "layout": layout,
        "tensors_sha256": state_digest(tensors),
    }
    if path.suffix == ".safetensors":
        write_safetensors(tensors, path, metadata)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            torch.save({**dict.fromkeys(entries, tensors), "metadata": metadata}, temporary)
    return metadata


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically. Its metadata gets the digest of the tensors if it has none."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {"tensors_sha256": state_digest(tensors), **metadata, "format": "pt"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        # In memory first: the writer of safetensors replaces the file by one with mode 0600.
        temporary.write_bytes(safetensors.torch.save(tensors, metadata))


def read_backbone(
    path: str | Path, entry: str | None = None, keep_layer_scales: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a ViT or MAE from any file, in the form of mae_et/storage/plain.py.

    Args:
        path, entry: as for `read_weights`.
        keep_layer_scales: return layer scales as tensors of their own; the digest is that of the form without them.
    Returns:
        The state and the metadata of the file, always with `encoder_digest`.
    Raises:
        CheckpointError: as `read_weights`, or if the encoder does not have the recorded digest.
    """
    state, metadata = read_weights(path, entry)
    scaled = scaled_vit(state, str(path), metadata)
    plain = without_layer_scales(scaled, None if keep_layer_scales else str(path))
    digest = encoder_digest(plain)
    if metadata.get("layout") != "mmdet":  # that layout leaves out the cls token, which the digest covers
        check_digest(metadata.get("encoder_sha256"), digest.get("encoder_sha256", ""), "encoder_sha256", str(path))
    return scaled if keep_layer_scales else plain, {**digest, **metadata}


def load_encoder(
    path: str | Path | None,
    image_size: int | Size | None,
    *,
    size: str = "base",
    patch_size: int | None = None,
    in_chans: int | None = 3,
    num_heads: int | None = None,
    adapt_channels: str = "none",
    drop_path_rate: float = 0.0,
    global_pool: str = "token",
    num_classes: int = 0,
) -> VisionTransformer:
    """Loads any backbone file into timm's ViT, its Eva if the file has rotary positions.

    Args:
        path: as for `read_weights`; None: the initial weights of an MAE.
        image_size: px, side or (H, W); may differ from the size of the training. None: that size if the file gives it,
            else 224.
        size: of the model with initial weights; a file determines its own size.
        patch_size, in_chans: of the model with initial weights (None: the value of the size, and 3). An error if a file
            has other values.
        num_heads: None: from the metadata, or known by the width.
        adapt_channels: as for `adapt_patch_channels`.
        drop_path_rate, global_pool, num_classes: as for `random_vit`; the head is always new.
    Raises:
        CheckpointError: as `vit_from_state`.
        ValueError: if image_size is not a multiple of the patch size, or the size is unknown.
    """
    options: dict[str, Any] = {"drop_path_rate": drop_path_rate, "global_pool": global_pool, "num_classes": num_classes}
    if path is None:
        return random_vit(
            image_size or 224, size, patch_size=patch_size, in_chans=in_chans or 3, num_heads=num_heads, **options
        )
    state, metadata = read_backbone(path)
    if image_size is None:
        image_size = recorded_size({**architecture_of(state), **metadata})
    return vit_from_state(
        state, image_size, metadata=metadata, where=str(path), patch_size=patch_size, in_chans=in_chans,
        num_heads=num_heads, adapt_channels=adapt_channels, **options,
    )  # fmt: skip


def load_initial_weights(model: MaskedAutoencoder, path: str | Path, adapt_channels: str = "none") -> bool:
    """Loads the weights that a pre-training starts from.

    A file without decoder leaves the decoder at its initial weights. The prediction head restarts if the file records
    another target, or the head has another width. A classifier is left out. All of this is logged.

    Args:
        model: the receiver.
        path: as for `read_weights`.
        adapt_channels: as for `adapt_patch_channels`.
    Returns:
        Whether the file holds a decoder.
    Raises:
        CheckpointError: if the file does not fit. The message names the keys.
    """
    state, metadata = read_backbone(path)
    where = str(path)
    _log_eps(state, metadata, where)
    kernel = state.get(PATCHES)
    if kernel is not None and kernel.ndim == 4:
        state[PATCHES] = adapt_patch_channels(kernel, model.in_chans, adapt_channels, where)
    if classifier := [key for key in state if key.startswith(CLASSIFIER)]:
        log.warning("%s: left out the classifier: %s", where, some(classifier))
    state = {key: value for key, value in state.items() if key not in classifier}
    if "decoder_embed.weight" not in state:
        state.pop("mask_token", None)  # of an encoder that was trained with masked inputs, e.g. DINOv2
    _check_architecture(model, state, where)
    if model.learnt_positions:
        _take_positions(model, state, metadata, where)
    recorded = metadata.get("target")
    has_head = HEAD[0] in state
    restart = has_head and recorded is not None and recorded != model.target_name
    if restart:
        own = model.state_dict()
        state |= {key: own[key] for key in HEAD}
    new = load_weights(model, state, where, may_miss=("decoder_", "mask_token", "reg_token"), may_be_new=HEAD)
    log.info("loaded weights from %s (%s)", where, describe(state))
    if model.num_registers and "reg_token" not in state:
        log.info("%s holds no registers: the %d registers start from their initial weights", where, model.num_registers)
    if restart or new:
        log.warning(
            "%s predicts %s, the model predicts %s: decoder_pred starts from its initial weights", where,
            recorded or "another target", model.target_name,
        )  # fmt: skip
    elif has_head and recorded is None:
        log.warning("%s does not record its target: decoder_pred is loaded; it may be of another target", where)
    elif not has_head:
        log.info("%s holds no decoder: the decoder starts from its initial weights", where)
    return has_head


def load_mae(
    path: str | Path,
    image_size: int | Size | None = None,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    norm_pix_loss: bool | None = None,
) -> tuple[MaskedAutoencoder, dict[str, str]]:
    """Loads an encoder with its decoder.

    Args:
        path: a run, its checkpoint, a file in layout "mae", an official full MAE or one of Hugging Face or mmpretrain.
        image_size: px, side or (H, W), of the stored position tables; None: as in the file, else 224.
        num_heads, decoder_num_heads: None: from the metadata, or known by the widths.
        norm_pix_loss: whether a model for pixels predicts normalised patches; None: from the metadata.
    Returns:
        The model in eval mode and the metadata of the file.
    Raises:
        CheckpointError: if the file has no decoder, its target is unknown, or it does not fit. The message names the keys.
        ValueError: if image_size is not a multiple of the patch size.
    """
    path = find_weights(path, with_decoder=True)
    state, metadata = read_backbone(path)
    kernels = {"encoder": PATCHES, "decoder": "decoder_embed.weight"}
    lacking = [name for name, key in kernels.items() if key not in state]
    if lacking == ["decoder"]:
        raise CheckpointError(
            f"{path} is a backbone without the decoder ({describe(state)}), so it cannot reconstruct: choose a checkpoint "
            "of a run (WORK_DIR/checkpoints/step_*.pt), a file exported in layout 'mae', or an official full MAE"
        )
    if lacking:
        raise CheckpointError(f"{path} holds no MAE: no {' and no '.join(lacking)} ({describe(state)})")
    if norm_pix_loss is None and "target" not in metadata:
        raise CheckpointError(
            f"{path} does not record whether it predicts pixels or normalised pixels: set norm_pix_loss (--norm-pix yes for "
            "the official pre-trained models, no for the official models for visualisation)"
        )
    predicts_hog = metadata.get("target") == "hog"
    if predicts_hog and norm_pix_loss is not None:
        raise UserError(f"{path} predicts HOG descriptors, not pixels: remove norm_pix_loss (--norm-pix)")
    options = encoder_options(state)
    decoder_width, patch = state["decoder_embed.weight"].shape[0], options["patch_size"]
    size = as_size(image_size or recorded_size(metadata))
    check_multiple(size, patch, f" of {path}")
    model = MaskedAutoencoder(
        size,
        **options,
        num_heads=known_num_heads(
            options["embed_dim"], str(path), num_heads, metadata.get("num_heads"), published_heads(state), "num_heads"
        ),
        decoder_embed_dim=decoder_width,
        decoder_depth=num_blocks(state, "decoder_blocks."),
        decoder_num_heads=known_num_heads(
            decoder_width, f"the decoder of {path}", decoder_num_heads, metadata.get("decoder_num_heads"),
            NUM_DECODER_HEADS, "decoder_num_heads",
        ),
        decoder_mlp_ratio=mlp_of(state, "decoder_blocks.")[1],
        norm_pix_loss=metadata.get("target") == "normalised pixels" if norm_pix_loss is None else norm_pix_loss,
        target="hog" if predicts_hog else "pixels",
        hog_cell_size=int(metadata["hog_cell_size"]) if predicts_hog else None,
        learnt_positions="pos_embed" in state and not is_sincos_table(state["pos_embed"]),
    )  # fmt: skip
    if model.learnt_positions:
        _take_positions(model, state, metadata, str(path))
    _log_eps(state, metadata, str(path))
    load_weights(model, state, str(path))
    return model.eval(), metadata


def _check_architecture(model: MaskedAutoencoder, state: Mapping[str, Tensor], where: str) -> None:
    """Compares what the tensors show beside their shapes with the model. Registers may be new.

    Raises:
        CheckpointError: naming the keys, both values and the options that fit the file.
    """
    kernel = state.get(PATCHES)
    if kernel is None or kernel.ndim != 4 or not num_blocks(state, "blocks."):
        return  # the strict loading says what is missing
    found, own = encoder_options(state), encoder_options(model.state_dict())
    keys = {
        **dict.fromkeys(("embed_dim", "patch_size"), PATCHES),
        "depth": "blocks",
        "rotary_positions": "pos_embed" if "pos_embed" in state else "blocks.0.attn.q_bias",
        "num_registers": "reg_token",
        "num_cls_tokens": "cls_token",
        "mlp": "blocks.0.mlp.fc1.weight",
        "mlp_ratio": "blocks.0.mlp.fc1.weight",
    }
    if not found["num_registers"]:
        del keys["num_registers"]
    different = {name: value for name, value in differences(found, own).items() if name in keys}
    if different:
        shown = ", ".join(
            f"model.{name} = {value!r} ({keys[name]}), not {own[name]!r}" for name, value in different.items()
        )
        options = " ".join(f"model.{name}={value}" for name, value in different.items())
        raise CheckpointError(f"{where} does not fit the model: it has {shown}. Use --cfg-options {options}")


def _take_positions(
    model: MaskedAutoencoder, state: dict[str, Tensor], metadata: Mapping[str, str], where: str
) -> None:
    """Moves the learnt position table out of a state into a model, fitted to the grid of the model."""
    grid, table = recorded_grid(state, metadata), state.pop("pos_embed", None)
    if table is None or is_sincos_table(table):
        found = "no position table" if table is None else "the fixed sine-cosine table"
        raise CheckpointError(f"{where} has {found}, so learnt_positions = True has no effect: set it to False")
    model.pos_embed.copy_(fit_position_embedding(table, model.grid_size, model.embed_dim, where, grid))


def _log_eps(state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> None:
    published = recorded_eps(state, {})
    if (eps := recorded_eps(state, metadata)) != published:
        log.info("%s has LayerNorms with epsilon %g; the MAE computes with %g", where, eps, published)
