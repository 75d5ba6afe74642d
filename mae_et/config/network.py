"""The networks of this project in a config: the ViT, and the masked autoencoder around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from mae_et.config.section import check, unused
from mae_et.config.training import NetworkConfig, Positive, PositiveFloat
from mae_et.models.sizes import MAE_SIZES, MAESize, grid_stride, hog_cell, ratio_of, swiglu_hidden


class BackboneConfig(NetworkConfig):
    """The ViT."""

    size: Literal["tiny", "small", "base", "large", "huge", "giant", "2b"] = Field(
        "base", description="Named row of dimensions."
    )
    patch_size: Positive | None = Field(None, description="Px. None: 14 for huge, giant and 2b, 16 for the others.")
    embed_dim: Positive | None = Field(None, description="Width. None: the size's own.")
    depth: Positive | None = Field(None, description="Number of blocks. None: the size's own.")
    num_heads: Positive | None = Field(None, description="Attention heads. None: the size's own.")
    num_cls_tokens: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Number of cls tokens. The feature of an image is their mean (Pixio, arXiv 2512.15715)."
    )
    num_registers: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="Learnt tokens beside the cls tokens (timm's reg_tokens; arXiv 2309.16588)."
    )
    mlp: Literal["gelu", "swiglu"] = Field(
        "gelu", description='MLPs of the encoder: "swiglu" as in DINOv2 giant and the largest DINOv3.'
    )
    mlp_ratio: PositiveFloat | None = Field(
        None,
        description='Hidden width of the encoder\'s MLPs over its width. None: 4; with mlp = "swiglu" 8/3, the hidden width '
        "rounded up to a multiple of 8.",
    )
    rotary_positions: bool = Field(
        False,
        description="Rotates queries and keys by the places of the patches, as DINOv3 (arXiv 2508.10104), in place of a table.",
    )

    @property
    def dims(self) -> MAESize:
        """The size's table row with this config's overrides."""
        size = MAE_SIZES[self.size]
        own = {name: getattr(self, name) for name in vars(size) if name in type(self).model_fields}
        dims = dataclasses.replace(size, **{name: value for name, value in own.items() if value is not None})
        if self.mlp == "swiglu" and self.mlp_ratio is None:
            return dataclasses.replace(dims, mlp_ratio=ratio_of(swiglu_hidden(dims.embed_dim), dims.embed_dim))
        return dims

    @property
    def encoder_options(self) -> dict[str, Any]:
        """The architecture of the encoder, as arguments of `random_vit` and `MaskedAutoencoder`."""
        dims = vars(self.dims)
        names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp", "mlp_ratio")
        own = ("in_chans", "num_cls_tokens", "num_registers", "rotary_positions")
        return {**{name: dims[name] for name in names}, **{name: getattr(self, name) for name in own}}

    @property
    def size_multiple(self) -> int:
        return self.patch_size or MAE_SIZES[self.size].patch_size

    @check
    def _width(self) -> Iterator[str]:
        yield from self._heads_fault("")
        dims = self.dims
        if self.rotary_positions and dims.embed_dim % (4 * dims.num_heads):
            yield (
                f"rotary_positions = True needs heads of a multiple of 4 channels, but embed_dim = {dims.embed_dim} gives "
                f"num_heads = {dims.num_heads} of them {dims.embed_dim / dims.num_heads:g} each"
            )
        if self.rotary_positions and self.num_cls_tokens > 1:
            yield f"num_cls_tokens = {self.num_cls_tokens} cannot be used with rotary_positions = True: set it to 1"
        if int(dims.embed_dim * dims.mlp_ratio) < 1:
            yield f"mlp_ratio = {self.mlp_ratio} leaves no hidden width with embed_dim = {dims.embed_dim}: raise it"

    def _heads_fault(self, prefix: str) -> Iterator[str]:
        width, heads = (
            getattr(self, prefix + name) or getattr(MAE_SIZES[self.size], prefix + name)
            for name in ("embed_dim", "num_heads")
        )
        if width % heads or width % 4:
            yield f"{prefix}embed_dim = {width} must be a multiple of 4 and of {prefix}num_heads = {heads}"


class ModelConfig(BackboneConfig):
    """The masked autoencoder."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.75, description="Fraction of the patches removed.")
    mask_kind: Literal["random", "block", "grid"] = Field(
        "random",
        description="Removes patches at random, in rectangles, or all but a regular grid; see docs/explanation/objective.md.",
    )
    mask_grid: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description='With mask_kind = "random": side, in patches, of squares that are removed or kept as a whole (Pixio, arXiv '
        "2512.15715).",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Decay of a moving average of the weights, which is judged, drawn and exported. None: no average.",
    )
    target: Literal["pixels", "hog"] = Field("pixels", description="What the decoder predicts.")
    norm_pix_loss: bool = Field(
        True, description='Normalises the pixels of each patch by their mean and deviation, with target = "pixels".'
    )
    hog_cell_size: Positive | None = Field(
        None, description='Side of a histogram\'s cell, px, with target = "hog". None: half a patch.'
    )
    decoder_embed_dim: Positive | None = Field(None, description="Width of the decoder. None: the size's own.")
    decoder_depth: Positive | None = Field(None, description="Blocks of the decoder. None: the size's own.")
    decoder_num_heads: Positive | None = Field(None, description="Heads of the decoder. None: the size's own.")
    init_from: str | None = Field(
        None,
        description="Local checkpoint to start from: an MAE, or a ViT, DINOv2 or DINOv3, which gets a new decoder.",
    )
    learnt_positions: bool = Field(
        False,
        description="Takes the learnt position table of init_from. It stays constant and is resampled for each stage. "
        "False: the fixed sine-cosine table.",
    )
    adapt_channels: Literal["none", "average", "inflate"] = Field(
        "none", description="How the patch projection of init_from is fitted to another number of channels."
    )

    @check
    def _decoder_width(self) -> Iterator[str]:
        yield from self._heads_fault("decoder_")

    @check
    def _grid_masks(self) -> Iterator[str]:
        if self.mask_kind != "random":
            yield from unused(self, ["mask_grid"], f"mask_kind = {self.mask_kind!r}")
        if self.mask_kind == "grid":
            try:
                grid_stride(self.mask_ratio)
            except ValueError as error:
                yield f'mask_kind = "grid": {error}'

    @check
    def _hog_cells(self) -> Iterator[str]:
        if self.target == "hog":
            try:
                hog_cell(self.size_multiple, self.hog_cell_size)
            except ValueError as error:
                yield f"target = 'hog': {error}"

    @check
    def _unused(self) -> Iterator[str]:
        if self.learnt_positions and self.init_from is None:
            yield "learnt_positions = True needs init_from, the file that holds the table: set init_from, or remove it"
        if self.learnt_positions and self.rotary_positions:
            yield "learnt_positions has no effect with rotary_positions = True, which has no table: remove one of them"
        name = "norm_pix_loss" if self.target == "hog" else "hog_cell_size"
        yield from unused(self, [name], f"target = {self.target!r}")
