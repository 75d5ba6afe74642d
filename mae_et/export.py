"""Backbone files: the encoder's weights under the names that other libraries use, with metadata that says where from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import mae_et
from mae_et.checkpoint import atomic_path, describe, load_checkpoint, read_weights
from mae_et.config import PretrainConfig, from_dict, to_dict
from mae_et.errors import CheckpointError

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
    state, metadata = read_weights(source)
    if Path(source).suffix != ".safetensors":
        content = load_checkpoint(source) if _is_ours(source) else {}
        if content:
            config = from_dict(PretrainConfig, content["config"], str(source))
            metadata = run_metadata(config, content["progress"]["step"], content["num_steps"], content["dataset_size"])
    write_backbone(state, path, layout, {"source": Path(source).name, **metadata})
    return metadata


def write_backbone(state: Mapping[str, Tensor], path: str | Path, layout: str, metadata: Mapping[str, str]) -> None:
    """Writes a state dict in a layout, atomically. Arguments and errors as for `export`."""
    path = Path(path)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in to_layout(state, layout).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, {"format": "pt", "layout": layout, **metadata})
        elif path.suffix in (".pth", ".pt"):
            torch.save({"model": tensors, "metadata": {"layout": layout, **metadata}}, temporary)
        else:
            raise ValueError(f"{path}: write to .safetensors or .pth")


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


def run_metadata(config: PretrainConfig, step: int, num_steps: int, dataset_size: int) -> dict[str, str]:
    """Says where a backbone comes from, as strings for a safetensors header; structures are JSON."""
    dims, model, data = config.model.dims, config.model, config.data
    values: dict[str, Any] = {
        "mae_et_version": mae_et.__version__,
        "architecture": f"vit_{model.size}_patch{dims.patch_size}_{data.image_size}",
        "embed_dim": dims.embed_dim,
        "depth": dims.depth,
        "num_heads": dims.num_heads,
        "patch_size": dims.patch_size,
        "image_size": data.image_size,
        "in_chans": model.in_chans,
        "objective": "mae",
        "target": "normalised pixels" if model.norm_pix_loss else "pixels",
        "mask_ratio": model.mask_ratio,
        "mean": list(data.mean),
        "std": list(data.std),
        "data": data.train,
        "num_images": dataset_size,
        "curriculum": to_dict(config.curriculum),
        "seed": config.run.seed,
        "step": step,
        "num_steps": num_steps,
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _is_ours(path: str | Path) -> bool:
    try:
        content = load_checkpoint(path)
    except CheckpointError:
        return False
    return {"config", "progress", "num_steps", "dataset_size"} <= content.keys()


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
