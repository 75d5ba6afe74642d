"""What a network costs at an image size: the numbers that a plan needs to know about a task.

FLOPs are counted from matrix products only; a multiplication and an addition are 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mae_et.config.schema import BackboneConfig, ModelConfig
from mae_et.models.sizes import Size, count_patches, grid_stride, num_visible_patches, size_text, target_width


@dataclass(frozen=True)
class ModelCost:
    """Size, tokens and FLOPs of one training image, by its size in px.

    Attributes:
        size_multiple: px; bandwidths are multiples of it.
        num_tokens: (H, W) -> (tokens that the encoder sees, all tokens), without cls tokens; None: not a ViT.
        forward_flops: (H, W) -> FLOPs of the forward pass of one training image.
        backward_factor: FLOPs of a training step over those of its forward pass.
        notes: (H, W) of the stages -> what options of the network cost or cannot keep there.
    """

    size_multiple: int
    num_tokens: Callable[[Size], tuple[int, int]] | None
    forward_flops: Callable[[Size], int]
    backward_factor: int = 3
    notes: Callable[[Sequence[Size]], list[str]] = lambda sizes: []


def mae_cost(model: ModelConfig, decoder_warmup_fraction: float = 0.0) -> ModelCost:
    """Returns the cost of pre-training a masked autoencoder.

    Args:
        model: of the config.
        decoder_warmup_fraction: of the compute, during which the encoder is not trained; gets a note.
    """
    patch_size = model.dims.patch_size

    def num_tokens(size: Size) -> tuple[int, int]:
        num_patches = count_patches(size, patch_size)
        return num_visible_patches(num_patches, model.mask_ratio), num_patches

    return ModelCost(
        patch_size,
        num_tokens,
        lambda size: mae_flops(model, size),
        notes=lambda sizes: mae_notes(model, sizes) + _warmup_notes(decoder_warmup_fraction),
    )


def _warmup_notes(fraction: float) -> list[str]:
    if not fraction:
        return []
    return [
        f"curriculum.decoder_warmup_equivalent_epochs: the decoder alone is trained in the first {fraction:.1%} of the compute; "
        "these steps run no backward pass of the encoder, but are counted in full"
    ]


def mae_notes(model: ModelConfig, sizes: Sequence[Size]) -> list[str]:
    """Returns the cost of further tokens, of a moving average and of masks that are not random, a line each."""
    notes = []
    for name, usual in (("num_cls_tokens", 1), ("num_registers", 0)):
        if more_tokens := getattr(model, name) - usual:
            plain = model.model_copy(update={name: usual})
            more = {size: mae_flops(model, size) / mae_flops(plain, size) - 1 for size in sizes}
            shown = ", ".join(f"{share:+.1%} at {size_text(size)} px" for size, share in more.items())
            number = more_tokens * model.dims.embed_dim
            notes.append(f"model.{name} = {getattr(model, name)}: {number:,} parameters; FLOPs {shown}")
    if model.ema_decay is not None:
        number = mae_parameters(model)
        notes.append(
            f"model.ema_decay = {model.ema_decay:g}: the average keeps {number:,} parameters more "
            f"({4 * number / 2**20:,.0f} MiB); its update is not among the counted FLOPs"
        )
    if model.mask_kind != "random":
        notes.append(f'model.mask_kind = "{model.mask_kind}": as many visible patches and FLOPs as random masks')
    if model.mask_kind == "grid" and (odd := _sizes_beside(model, sizes, stride := grid_stride(model.mask_ratio))):
        notes.append(
            f"grid masks: at {odd} px the number of patches along a side is not a multiple of {stride}, so some "
            "patches are visible or removed at random there"
        )
    if model.mask_grid > 1:
        notes.append(f"model.mask_grid = {model.mask_grid}: as many visible patches and FLOPs as random masks")
        if odd := _sizes_beside(model, sizes, model.mask_grid):
            notes.append(
                f"mask_grid: at {odd} px the number of patches along a side is not a multiple of {model.mask_grid}, so the "
                "squares are shifted at random there, and those at the borders are smaller"
            )
    return notes


def _sizes_beside(model: ModelConfig, sizes: Sequence[Size], multiple: int) -> str:
    """Returns the sizes whose number of patches along a side is not a multiple, as text; "" if there are none."""
    patch = model.dims.patch_size
    return ", ".join(size_text(size) for size in dict.fromkeys(sizes) if any(side // patch % multiple for side in size))


def mae_parameters(model: ModelConfig) -> int:
    """Counts the parameters of a masked autoencoder, without its fixed position tables."""
    dims = model.dims
    width, decoder = dims.embed_dim, dims.decoder_embed_dim

    def blocks(dim: int, depth: int, mlp_ratio: float, mlp: str = "gelu") -> int:
        hidden = int(dim * mlp_ratio)
        inner = hidden if mlp == "gelu" else 2 * hidden
        return depth * (4 * dim * dim + 4 * dim + inner * (dim + 1) + (hidden + 1) * dim + 4 * dim)

    values = target_width(model.target, dims.patch_size, model.in_chans, model.hog_cell_size)
    embed = (dims.patch_size**2 * model.in_chans + 1) * width + _num_prefix(model) * width
    head = (width + 1) * decoder + decoder + 2 * decoder + (decoder + 1) * values
    encoder = blocks(width, dims.depth, dims.mlp_ratio, dims.mlp)
    if model.rotary_positions:  # no bias of the keys
        encoder -= dims.depth * width
    return embed + encoder + 2 * width + blocks(decoder, dims.decoder_depth, dims.decoder_mlp_ratio) + head


def vit_cost(model: BackboneConfig, backward_factor: int = 3) -> ModelCost:
    """Returns the cost of training a ViT on whole images.

    Args:
        model: the ViT.
        backward_factor: 3, or 1 where only a linear head is trained.
    """
    patch_size = model.dims.patch_size

    def num_tokens(size: Size) -> tuple[int, int]:
        num_patches = count_patches(size, patch_size)
        return num_patches, num_patches

    return ModelCost(patch_size, num_tokens, lambda size: vit_flops(model, size), backward_factor)


def attentive_probe_cost(model: BackboneConfig) -> ModelCost:
    """Returns the cost of training an attentive probe. The pooling, which alone has a backward pass, counts three times."""
    cost, dims = vit_cost(model, backward_factor=1), model.dims

    def forward_flops(size: Size) -> int:
        num_patches = count_patches(size, dims.patch_size)
        keys_values = 4 * num_patches * dims.embed_dim**2
        query_and_output = 4 * dims.embed_dim**2
        attention = 4 * num_patches * dims.embed_dim
        return cost.forward_flops(size) + 3 * (keys_values + query_and_output + attention)

    return dataclasses.replace(cost, forward_flops=forward_flops)


def transformer_flops(
    num_tokens: int, dim: int, depth: int, mlp_ratio: float, num_queries: int | None = None, mlp: str = "gelu"
) -> int:
    """Counts the FLOPs of transformer blocks, forward, one image.

    Args:
        num_tokens: N.
        dim: D.
        depth: blocks.
        mlp_ratio: hidden over D.
        num_queries: tokens that the blocks' outputs are computed for, if fewer than N.
        mlp: "gelu" with two matrices, or "swiglu" with three.
    """
    n, q, hidden = num_tokens, num_tokens if num_queries is None else num_queries, int(dim * mlp_ratio)
    keys_values = 2 * n * dim * dim
    queries_and_output = 2 * q * dim * dim
    attention = 2 * q * n * dim
    hidden_layers = (2 if mlp == "gelu" else 3) * q * dim * hidden
    return 2 * depth * (keys_values + queries_and_output + attention + hidden_layers)


def mae_flops(model: ModelConfig, size: int | Size) -> int:
    """Counts the forward FLOPs of one training image as `MaskedAutoencoder.forward` computes it.

    Only visible patches are embedded, and the last decoder block and the head run on removed patches alone, so this is
    below the count of a plain MAE step.
    """
    dims = model.dims
    num_patches = count_patches(size, dims.patch_size)
    visible = num_visible_patches(num_patches, model.mask_ratio)
    removed = num_patches - visible
    values = target_width(model.target, dims.patch_size, model.in_chans, model.hog_cell_size)
    pixels = dims.patch_size**2 * model.in_chans
    width, decoder = dims.embed_dim, dims.decoder_embed_dim
    embed = 2 * visible * pixels * width
    encoder = transformer_flops(visible + _num_prefix(model), width, dims.depth, dims.mlp_ratio, mlp=dims.mlp)
    to_decoder = 2 * (visible + model.num_cls_tokens) * width * decoder
    num_tokens = num_patches + model.num_cls_tokens
    blocks = transformer_flops(num_tokens, decoder, dims.decoder_depth - 1, dims.decoder_mlp_ratio)
    last_block = transformer_flops(num_tokens, decoder, 1, dims.decoder_mlp_ratio, num_queries=removed)
    head = 2 * removed * decoder * values
    return embed + encoder + to_decoder + blocks + last_block + head


def vit_flops(model: BackboneConfig, size: int | Size) -> int:
    """Counts the forward FLOPs of one image through the encoder alone, nothing masked."""
    dims = model.dims
    num_patches = count_patches(size, dims.patch_size)
    embed = 2 * num_patches * dims.patch_size**2 * model.in_chans * dims.embed_dim
    num_tokens = num_patches + _num_prefix(model)
    return embed + transformer_flops(num_tokens, dims.embed_dim, dims.depth, dims.mlp_ratio, mlp=dims.mlp)


def _num_prefix(model: BackboneConfig) -> int:
    """Returns the number of tokens that the encoder sees beside the patches."""
    return model.num_cls_tokens + model.num_registers
