"""The masked autoencoder. State names equal those of the official release; the encoder's also equal timm's ViT.

The training path computes exactly the published loss with less work. Only visible patches are embedded. Tokens stay in
shuffled order, because attention does not depend on the order and each token carries its own position. The last decoder
block and the head run on removed patches only, because no other output enters the loss. benchmarks/ has the timings.

Shapes: N images, C channels, H x W px, p patch size, L = (H/p)(W/p) patches, K = int(L (1 - mask_ratio)) visible patches,
R = L - K removed patches, P values in the target of a patch (p p C pixels; for HOG see hog.py), D and E widths of encoder
and decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_et.models.architecture import NORM_EPS
from mae_et.models.blocks import DecoderBlock, layer_norm, plain_blocks, rotary_blocks
from mae_et.models.hog import hog_patches
from mae_et.models.pos_embed import rotations_on, sincos_pos_embed, sincos_pos_embed_on
from mae_et.models.sizes import MAE_SIZES, num_visible_patches, target_width
from mae_et.models.targets import normalize_patches, patchify


class MaskedAutoencoder(nn.Module):
    """Encodes the visible patches with a ViT and predicts the removed patches with a light decoder.

    Args:
        img_size: px, side or (H, W), of the stored position tables. Tables for other image sizes are computed on the fly.
        patch_size: p in px.
        in_chans: C.
        embed_dim, depth, num_heads: of the encoder; D is a multiple of 4.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder; E is a multiple of 4.
        mlp_ratio: hidden width of the encoder's MLPs divided by D.
        decoder_mlp_ratio: of the decoder's, divided by E; None: `mlp_ratio`.
        mlp: "gelu" or "swiglu", of the encoder.
        norm_pix_loss: predict patches normalised by their own mean and variance; used with target "pixels".
        target: "pixels" or "hog" (histograms of oriented gradients).
        hog_cell_size: px, used with "hog"; None: half a patch.
        learnt_positions: `pos_embed` is filled with the table of another model. It stays constant, and is resampled (bicubic)
            for images of other sizes.
        num_registers: learnt tokens beside the cls tokens, without position. The decoder and `features` leave them out.
        num_cls_tokens: M. The decoder gets all of them; the feature of an image is their mean.
        rotary_positions: the encoder has no position table. Each of its layers rotates queries and keys of the patches by
            their places in the grid, as in DINOv3. The decoder keeps its table.
    Raises:
        ValueError: if the target is unknown, or the patch size is not a multiple of the cell size.
    Source: MAE (arXiv 2111.06377); registers: arXiv 2309.16588; several cls tokens: Pixio
        (arXiv 2512.15715); rotary positions: DINOv3 (arXiv 2508.10104).
    """

    pos_embed: Tensor  # None with rotary positions
    decoder_pos_embed: Tensor

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        decoder_mlp_ratio: float | None = None,
        mlp: str = "gelu",
        norm_pix_loss: bool = False,
        target: str = "pixels",
        hog_cell_size: int | None = None,
        learnt_positions: bool = False,
        num_registers: int = 0,
        num_cls_tokens: int = 1,
        rotary_positions: bool = False,
    ) -> None:
        super().__init__()
        if target not in ("pixels", "hog"):
            raise ValueError(f"target = {target!r} must be 'pixels' or 'hog'")
        self.target, self.hog_cell_size = target, hog_cell_size
        if learnt_positions and rotary_positions:
            raise ValueError("learnt_positions and rotary_positions exclude each other: rotary positions have no table")
        self.learnt_positions, self.rotary_positions = learnt_positions, rotary_positions
        self.patch_size, self.in_chans, self.norm_pix_loss = patch_size, in_chans, norm_pix_loss
        self.grad_checkpointing = False
        self.embed_dim, self.decoder_embed_dim = embed_dim, decoder_embed_dim

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=False)
        self.grid_size: tuple[int, int] = self.patch_embed.grid_size  # of the stored tables
        self.cls_token = nn.Parameter(torch.zeros(1, num_cls_tokens, embed_dim))
        self.num_cls_tokens, self.num_registers = num_cls_tokens, num_registers
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        self.head_dim = embed_dim // num_heads
        norm = layer_norm(NORM_EPS[rotary_positions])
        if rotary_positions:
            num_prefix = num_cls_tokens + num_registers
            self.blocks = rotary_blocks(depth, embed_dim, num_heads, mlp, mlp_ratio, norm, num_prefix)
        else:
            self.blocks = plain_blocks(Block, depth, embed_dim, num_heads, mlp, mlp_ratio, norm)
        self.norm = norm(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        norm, ratio = layer_norm(NORM_EPS[False]), decoder_mlp_ratio or mlp_ratio
        self.decoder_blocks = plain_blocks(
            DecoderBlock, decoder_depth, decoder_embed_dim, decoder_num_heads, "gelu", ratio, norm
        )
        self.decoder_norm = norm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, target_width(target, patch_size, in_chans, hog_cell_size))

        # The tables are fixed. They are part of the state because official checkpoints and timm's ViT store them.
        self.register_buffer("pos_embed", None if rotary_positions else sincos_pos_embed(embed_dim, self.grid_size))
        self.register_buffer("decoder_pos_embed", sincos_pos_embed(decoder_embed_dim, self.grid_size))
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))  # as a matrix
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        if self.reg_token is not None:  # last, so that all other weights are those of a model without registers
            nn.init.normal_(self.reg_token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the activations of the blocks in the backward pass, to save memory. The name is timm's."""
        self.grad_checkpointing = enable

    @property
    def target_name(self) -> str:
        """Returns the target as backbone files record it: "hog", "normalised pixels" or "pixels"."""
        return "hog" if self.target == "hog" else "normalised pixels" if self.norm_pix_loss else "pixels"

    def forward(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computes the training loss.

        Args:
            images: [N, C, H, W], normalised; H and W are multiples of p.
            mask_ratio: fraction of the patches removed.
            noise: [N, L]; the patches with the K smallest values stay visible. None: drawn here.
        Returns:
            loss: scalar, float32 or wider, mean squared error over the removed patches.
            mask: [N, L] float, 1 = removed.
        Raises:
            ValueError: if the image size does not fit the patch size, or no patch would be visible or removed.
        """
        patches, grid_size = self._patchify(images)
        ids_shuffle, num_visible = self._shuffle(patches, mask_ratio, noise)
        if not 0 < num_visible < patches.shape[1]:
            raise ValueError(
                f"mask_ratio = {mask_ratio} keeps {num_visible} of {patches.shape[1]} patches; "
                "training needs at least one visible and one removed patch"
            )
        ids_removed = ids_shuffle[:, num_visible:]
        # HOG targets come before the encoder, so that their temporaries do not add to the memory of its activations.
        target = _take(self.targets(images), ids_removed) if self.target == "hog" else None
        latent = self._encode(patches, grid_size, ids_shuffle[:, :num_visible])
        tokens = self._decoder_tokens(latent, grid_size, ids_shuffle, num_visible)
        for block in self.decoder_blocks[:-1]:
            tokens = self._run(block, tokens)
        removed = self._run(self.decoder_blocks[-1], tokens, ids_removed.shape[1])
        prediction = self.decoder_pred(self.decoder_norm(removed))

        if target is None:
            target = self._pixel_targets(_take(patches, ids_removed))
        loss = F.mse_loss(prediction.to(target.dtype), target)
        mask = torch.ones(patches.shape[:2], device=images.device).scatter_(1, ids_shuffle[:, :num_visible], 0.0)
        return loss, mask

    def predict(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predicts every patch, including the visible ones, which the loss does not train.

        Args:
            images, mask_ratio, noise: as in `forward`; mask_ratio 0 is allowed.
        Returns:
            prediction: [N, L, P], in the order and units of `targets`.
            mask: [N, L] float, 1 = removed.
        """
        patches, grid_size = self._patchify(images)
        ids_shuffle, num_visible = self._shuffle(patches, mask_ratio, noise)
        latent = self._encode(patches, grid_size, ids_shuffle[:, :num_visible])
        tokens = self._decoder_tokens(latent, grid_size, ids_shuffle, num_visible)
        for block in self.decoder_blocks:
            tokens = self._run(block, tokens)
        shuffled = self.decoder_pred(self.decoder_norm(tokens))[:, self.num_cls_tokens :]
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = torch.ones(patches.shape[:2], device=images.device).scatter_(1, ids_shuffle[:, :num_visible], 0.0)
        return _take(shuffled, ids_restore), mask

    def targets(self, images: Tensor) -> Tensor:
        """Computes the target of every patch.

        Args:
            images: [N, C, H, W], normalised.
        Returns:
            [N, L, P], float32 or wider: pixels in the order of `patchify`, normalised per patch if `norm_pix_loss` is set;
            or the descriptors of `hog_patches`.
        """
        if self.target == "hog":
            return hog_patches(images, self.patch_size, self.hog_cell_size)
        return self._pixel_targets(patchify(images, self.patch_size))

    def _pixel_targets(self, patches: Tensor) -> Tensor:
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        return normalize_patches(patches) if self.norm_pix_loss else patches

    def features(self, images: Tensor, blocks: Iterable[int] | None = None) -> Tensor | list[Tensor]:
        """Runs the encoder on unmasked images.

        Args:
            images: [N, C, H, W], normalised.
            blocks: indices of the blocks whose outputs are returned; None: the last output after the final norm.
        Returns:
            [N, 1 + L, D], cls token first, or the mean of the cls tokens; with `blocks`, a list of such tensors.
        """
        patches, grid_size = self._patchify(images)
        tokens = self._encoder_tokens(patches, grid_size, None)
        rotations = self._rotations(grid_size, patches.device, None)
        outputs = []
        for block in self.blocks:
            tokens = self._run(block, tokens, *rotations)
            outputs.append(self._without_registers(tokens))
        if blocks is None:
            return self._with_one_cls_token(self.norm(outputs[-1]))
        return [self._with_one_cls_token(outputs[i]) for i in blocks]

    def _patchify(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [N, {self.in_chans}, H, W]")
        grid_size = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        return patchify(images, self.patch_size), grid_size

    def _shuffle(self, patches: Tensor, mask_ratio: float, noise: Tensor | None) -> tuple[Tensor, int]:
        """Returns patch ids [N, L] with visible patches first, and K."""
        num_patches = patches.shape[1]
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio = {mask_ratio} must be in [0, 1)")
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=patches.device)
        elif noise.shape != patches.shape[:2]:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {tuple(patches.shape[:2])}")
        return noise.argsort(dim=1), num_visible_patches(num_patches, mask_ratio)

    def _encode(self, patches: Tensor, grid_size: tuple[int, int], ids_keep: Tensor) -> Tensor:
        """Encodes the visible patches, [N, M + K, D]."""
        tokens = self._encoder_tokens(patches, grid_size, ids_keep)
        rotations = self._rotations(grid_size, patches.device, ids_keep)
        for block in self.blocks:
            tokens = self._run(block, tokens, *rotations)
        return self.norm(self._without_registers(tokens))

    def _without_registers(self, tokens: Tensor) -> Tensor:
        if not self.num_registers:
            return tokens
        first = tokens[:, : self.num_cls_tokens]
        return torch.cat([first, tokens[:, self.num_cls_tokens + self.num_registers :]], dim=1)

    def _with_one_cls_token(self, tokens: Tensor) -> Tensor:
        if self.num_cls_tokens == 1:
            return tokens
        first = tokens[:, : self.num_cls_tokens].mean(dim=1, keepdim=True)
        return torch.cat([first, tokens[:, self.num_cls_tokens :]], dim=1)

    def _encoder_tokens(self, patches: Tensor, grid_size: tuple[int, int], ids_keep: Tensor | None) -> Tensor:
        # The projection's kernel is (D, C, p, p) and a patch is (p, p, C).
        kernel = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        visible = patches if ids_keep is None else _take(patches, ids_keep)
        tokens = F.linear(visible, kernel, self.patch_embed.proj.bias)
        cls_token: Tensor = self.cls_token
        if (pos_embed := self._encoder_positions(grid_size, patches)) is not None:
            tokens = tokens + (pos_embed[:, 1:] if ids_keep is None else pos_embed[0, 1:][ids_keep])
            cls_token = cls_token + pos_embed[:, :1]
        cls_token = cls_token.expand(len(tokens), -1, -1)
        registers = [] if self.reg_token is None else [self.reg_token.expand(len(tokens), -1, -1).to(tokens.dtype)]
        return torch.cat([cls_token.to(tokens.dtype), *registers, tokens], dim=1)

    def _decoder_tokens(
        self, latent: Tensor, grid_size: tuple[int, int], ids_shuffle: Tensor, num_visible: int
    ) -> Tensor:
        """Returns cls, visible and mask tokens in this order, with positions added, [N, M + L, E]."""
        pos_embed = self._positions(self.decoder_pos_embed, grid_size, latent)
        tokens = self.decoder_embed(latent)
        num_removed = ids_shuffle.shape[1] - num_visible
        mask_tokens = self.mask_token.to(tokens.dtype).expand(len(tokens), num_removed, -1)
        first = pos_embed[:, :1].expand(len(tokens), self.num_cls_tokens, -1)
        positions = torch.cat([first, pos_embed[0, 1:][ids_shuffle]], dim=1)
        return torch.cat([tokens, mask_tokens], dim=1) + positions

    def _rotations(
        self, grid_size: tuple[int, int], device: torch.device, ids_keep: Tensor | None
    ) -> tuple[()] | tuple[Tensor]:
        """Returns the further argument of each block: the rotations of the patches [L, 2 d] or [N, 1, K, 2 d]; () if none."""
        if not self.rotary_positions:
            return ()
        rotations = rotations_on(self.head_dim, grid_size, device)
        return (rotations if ids_keep is None else rotations[ids_keep][:, None],)

    def _encoder_positions(self, grid_size: tuple[int, int], like: Tensor) -> Tensor | None:
        if self.rotary_positions:
            return None
        if not self.learnt_positions or grid_size == self.grid_size:
            return self._positions(self.pos_embed, grid_size, like)
        table = resample_abs_pos_embed(self.pos_embed.float(), list(grid_size), list(self.grid_size))
        return table.to(self.pos_embed.dtype)

    def _positions(self, stored: Tensor, grid_size: tuple[int, int], like: Tensor) -> Tensor:
        if grid_size == self.grid_size:
            return stored
        return sincos_pos_embed_on(stored.shape[-1], grid_size, like.device, stored.dtype)

    def _run(self, block: nn.Module, *args: Any) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


_MODEL_NAME = re.compile(r"(?:mae_)?vit_([a-z0-9]+)_patch(\d+)(?:_(?:dec512d8b|(\d+)))?")


def build_mae(size: str = "base", **kwargs: Any) -> MaskedAutoencoder:
    """Builds a model of a size in `mae_et.models.sizes.MAE_SIZES`: tiny, small, base, large, huge, giant or 2b.

    Args:
        size: a size, or its name in the official release or timm, e.g. "mae_vit_base_patch16", "vit_base_patch16_224".
            A trailing image size sets `img_size`.
        **kwargs: arguments of MaskedAutoencoder that replace those of the size.
    Raises:
        ValueError: if the size is unknown, or the name has a patch size that the size does not have.
    """
    found = _MODEL_NAME.fullmatch(size)
    name = found[1] if found else size
    dims = MAE_SIZES.get(name)
    if dims is None or (found is not None and int(found[2]) != dims.patch_size):
        names = ", ".join(f"mae_vit_{known}_patch{dims.patch_size}" for known, dims in MAE_SIZES.items())
        hint = (
            f": build_mae({name!r}, patch_size={int(found[2])})" if found and dims else " with the argument patch_size"
        )
        raise ValueError(
            f"unknown MAE {size!r}; known sizes: {', '.join(MAE_SIZES)}, also as {names}. Set another patch size{hint}"
        )
    if found is not None and kwargs.get("patch_size", dims.patch_size) != dims.patch_size:
        raise ValueError(
            f"{size!r} contradicts patch_size = {kwargs['patch_size']}: use build_mae({name!r}, patch_size=...)"
        )
    named = {"img_size": int(found[3])} if found is not None and found[3] else {}
    return MaskedAutoencoder(**{**vars(dims), **named, **kwargs})


def _take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Gathers tokens [N, L, D] at ids [N, K] -> [N, K, D]."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))
