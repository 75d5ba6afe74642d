"""The masked autoencoder. State names are those of the official release, and its encoder's those of timm's ViT.

The training path computes exactly the published loss with less work: only visible patches are embedded, tokens stay in
shuffled order (attention does not mind; each token carries its own position), and the last decoder block and the head run
on removed patches alone, because no other output enters the loss. See benchmarks/ for what that buys.

Shapes: N images, C channels, H x W px, p patch side, L = (H/p)(W/p) patches, K = int(L (1 - mask_ratio)) visible ones,
R = L - K removed ones, P values of a patch's target (p p C pixels; see hog.py for HOG), D and E widths of encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_et.models.hog import hog_patches
from mae_et.models.pos_embed import sincos_pos_embed, sincos_pos_embed_on
from mae_et.models.sizes import MAE_SIZES, num_visible_patches, target_width
from mae_et.models.targets import normalize_patches, patchify

LAYER_NORM: Any = partial(nn.LayerNorm, eps=1e-6)


class MaskedAutoencoder(nn.Module):
    """A ViT encoder on the visible patches and a light decoder that predicts the removed ones.

    Args:
        img_size: px, side or (H, W), of the stored position tables; images of any other size get tables of their own.
        patch_size: p in px.
        in_chans: C.
        embed_dim, depth, num_heads: the encoder; D, a multiple of 4.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder; E, a multiple of 4.
        mlp_ratio: hidden width of the MLPs over D and E.
        norm_pix_loss: predict patches normalised by their own mean and variance; for target "pixels".
        activation_checkpointing: recompute the blocks' activations in the backward pass, to save memory.
        target: what is predicted: "pixels" or "hog", histograms of oriented gradients.
        hog_cell_size: px, for "hog"; None: half a patch.
    Raises:
        ValueError: if there is no such target, or the patch is no multiple of the cell.
    Source: MAE (arXiv 2111.06377).
    """

    pos_embed: Tensor
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
        norm_pix_loss: bool = False,
        activation_checkpointing: bool = False,
        target: str = "pixels",
        hog_cell_size: int | None = None,
    ) -> None:
        super().__init__()
        if target not in ("pixels", "hog"):
            raise ValueError(f"target = {target!r} must be 'pixels' or 'hog'")
        self.target, self.hog_cell_size = target, hog_cell_size
        self.patch_size, self.in_chans, self.norm_pix_loss = patch_size, in_chans, norm_pix_loss
        self.activation_checkpointing = activation_checkpointing
        self.embed_dim, self.decoder_embed_dim = embed_dim, decoder_embed_dim

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=False)
        self.grid_size: tuple[int, int] = self.patch_embed.grid_size  # of the stored tables
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = _blocks(depth, embed_dim, num_heads, mlp_ratio)
        self.norm = LAYER_NORM(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_blocks = _blocks(decoder_depth, decoder_embed_dim, decoder_num_heads, mlp_ratio)
        self.decoder_norm = LAYER_NORM(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, target_width(target, patch_size, in_chans, hog_cell_size))

        # Fixed tables. They are part of the state because the official checkpoints and timm's ViT have them.
        self.register_buffer("pos_embed", sincos_pos_embed(embed_dim, self.grid_size))
        self.register_buffer("decoder_pos_embed", sincos_pos_embed(decoder_embed_dim, self.grid_size))
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))  # seen as a matrix
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computes the training loss.

        Args:
            images: [N, C, H, W], normalised; H and W multiples of p.
            mask_ratio: fraction of the patches removed.
            noise: [N, L]; the K smallest stay. None draws it.
        Returns:
            loss: scalar float32 (or better), mean squared error over the removed patches.
            mask: [N, L] float, 1 = removed.
        Raises:
            ValueError: if the sizes do not fit the patches, or no patch would stay or be removed.
        """
        patches, grid_size = self._patchify(images)
        ids_shuffle, num_visible = self._shuffle(patches, mask_ratio, noise)
        if not 0 < num_visible < patches.shape[1]:
            raise ValueError(
                f"mask_ratio = {mask_ratio} keeps {num_visible} of {patches.shape[1]} patches; "
                "training needs at least one visible and one removed patch"
            )
        ids_removed = ids_shuffle[:, num_visible:]
        # Before the activations are there, so that its temporaries do not add to their memory.
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
        """Predicts every patch, also the visible ones (which the loss does not train).

        Args:
            images, mask_ratio, noise: as in `forward`; mask_ratio 0 is allowed.
        Returns:
            prediction: [N, L, P], in the order and the units of `targets`.
            mask: [N, L] float, 1 = removed.
        """
        patches, grid_size = self._patchify(images)
        ids_shuffle, num_visible = self._shuffle(patches, mask_ratio, noise)
        latent = self._encode(patches, grid_size, ids_shuffle[:, :num_visible])
        tokens = self._decoder_tokens(latent, grid_size, ids_shuffle, num_visible)
        for block in self.decoder_blocks:
            tokens = self._run(block, tokens)
        shuffled = self.decoder_pred(self.decoder_norm(tokens))[:, 1:]
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = torch.ones(patches.shape[:2], device=images.device).scatter_(1, ids_shuffle[:, :num_visible], 0.0)
        return _take(shuffled, ids_restore), mask

    def targets(self, images: Tensor) -> Tensor:
        """Computes what the prediction is compared with, for every patch.

        Args:
            images: [N, C, H, W], normalised.
        Returns:
            [N, L, P] float32 (or better): pixels in the order of `patchify`, normalised with `norm_pix_loss`; or the
            descriptors of `hog_patches`.
        """
        if self.target == "hog":
            return hog_patches(images, self.patch_size, self.hog_cell_size)
        return self._pixel_targets(patchify(images, self.patch_size))

    def _pixel_targets(self, patches: Tensor) -> Tensor:
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        return normalize_patches(patches) if self.norm_pix_loss else patches

    def features(self, images: Tensor, blocks: Iterable[int] | None = None) -> Tensor | list[Tensor]:
        """Runs the encoder on whole images, nothing masked.

        Args:
            images: [N, C, H, W], normalised.
            blocks: indices of blocks whose raw outputs are wanted; None: the last one's, normalised.
        Returns:
            [N, 1 + L, D], cls token first; with `blocks`, a list of them.
        """
        patches, grid_size = self._patchify(images)
        tokens = self._encoder_tokens(patches, grid_size, None)
        outputs = []
        for block in self.blocks:
            tokens = self._run(block, tokens)
            outputs.append(tokens)
        return self.norm(tokens) if blocks is None else [outputs[i] for i in blocks]

    def _patchify(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [N, {self.in_chans}, H, W]")
        grid_size = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        return patchify(images, self.patch_size), grid_size

    def _shuffle(self, patches: Tensor, mask_ratio: float, noise: Tensor | None) -> tuple[Tensor, int]:
        """Returns ids [N, L], visible patches first, and K."""
        num_patches = patches.shape[1]
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio = {mask_ratio} must be in [0, 1)")
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=patches.device)
        elif noise.shape != patches.shape[:2]:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {tuple(patches.shape[:2])}")
        return noise.argsort(dim=1), num_visible_patches(num_patches, mask_ratio)

    def _encode(self, patches: Tensor, grid_size: tuple[int, int], ids_keep: Tensor) -> Tensor:
        """Encodes the visible patches, [N, 1 + K, D]."""
        tokens = self._encoder_tokens(patches, grid_size, ids_keep)
        for block in self.blocks:
            tokens = self._run(block, tokens)
        return self.norm(tokens)

    def _encoder_tokens(self, patches: Tensor, grid_size: tuple[int, int], ids_keep: Tensor | None) -> Tensor:
        pos_embed = self._positions(self.pos_embed, grid_size, patches)
        # The projection's kernel is (D, C, p, p) and a patch is (p, p, C).
        kernel = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        visible = patches if ids_keep is None else _take(patches, ids_keep)
        position = pos_embed[:, 1:] if ids_keep is None else pos_embed[0, 1:][ids_keep]
        tokens = F.linear(visible, kernel, self.patch_embed.proj.bias) + position
        cls_token = (self.cls_token + pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return torch.cat([cls_token.to(tokens.dtype), tokens], dim=1)

    def _decoder_tokens(
        self, latent: Tensor, grid_size: tuple[int, int], ids_shuffle: Tensor, num_visible: int
    ) -> Tensor:
        """Returns cls, visible and mask tokens in that order, each with its position, [N, 1 + L, E]."""
        pos_embed = self._positions(self.decoder_pos_embed, grid_size, latent)
        tokens = self.decoder_embed(latent)
        num_removed = ids_shuffle.shape[1] - num_visible
        mask_tokens = self.mask_token.to(tokens.dtype).expand(len(tokens), num_removed, -1)
        positions = torch.cat([pos_embed[:, :1].expand(len(tokens), -1, -1), pos_embed[0, 1:][ids_shuffle]], dim=1)
        return torch.cat([tokens, mask_tokens], dim=1) + positions

    def _positions(self, stored: Tensor, grid_size: tuple[int, int], like: Tensor) -> Tensor:
        if grid_size == self.grid_size:
            return stored
        return sincos_pos_embed_on(stored.shape[-1], grid_size, like.device, stored.dtype)

    def _run(self, block: nn.Module, tokens: Tensor, num_last: int | None = None) -> Tensor:
        run = block if num_last is None else partial(_block_on_last, block, num_last=num_last)
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(run, tokens, use_reentrant=False)
        return run(tokens)


def build_mae(size: str = "base", **kwargs: Any) -> MaskedAutoencoder:
    """Builds one of the sizes of `mae_et.config.schema.MAE_SIZES`: tiny, small, base, large, huge.

    Args:
        size: its name; also as in the official release and timm, e.g. "mae_vit_base_patch16".
        **kwargs: arguments of MaskedAutoencoder that differ from the size's own.
    Raises:
        ValueError: if there is no such size.
    """
    name = next((known for known in MAE_SIZES if known in size), None)
    if name is None:
        raise ValueError(f"no MAE size {size!r}; known: {', '.join(MAE_SIZES)}")
    return MaskedAutoencoder(**{**vars(MAE_SIZES[name]), **kwargs})


def _blocks(depth: int, dim: int, num_heads: int, mlp_ratio: float) -> nn.ModuleList:
    return nn.ModuleList(Block(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=LAYER_NORM) for _ in range(depth))


def _take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Gathers tokens [N, L, D] at ids [N, K] -> [N, K, D]."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def _block_on_last(block: Any, tokens: Tensor, num_last: int) -> Tensor:
    """Runs a pre-norm block for the last tokens alone; keys and values come from all. [N, T, D] -> [N, num_last, D]."""
    attention = block.attn
    n, _, dim = tokens.shape
    heads, width = attention.num_heads, dim // attention.num_heads
    normed = block.norm1(tokens)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = F.linear(normed[:, -num_last:], weight[:dim], bias[:dim])
    key, value = F.linear(normed, weight[dim:], bias[dim:]).chunk(2, dim=-1)
    query, key, value = (t.view(n, -1, heads, width).transpose(1, 2) for t in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, num_last, dim)
    last = tokens[:, -num_last:] + attention.proj(mixed)
    return last + block.mlp(block.norm2(last))
