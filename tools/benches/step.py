"""The training step: against a plain one with the same loss, and at smaller bandwidths."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from benches.measuring import Comparison, Variants, compare, measure
from torch import Tensor, nn

from mae_et.errors import UserError
from mae_et.models.attention import prefers_explicit, set_attention
from mae_et.models.mae import MaskedAutoencoder, build_mae
from mae_et.models.param_groups import param_groups
from mae_et.models.targets import normalize_patches, patchify

MASK_RATIO = 0.75


def plain_loss(model: MaskedAutoencoder, images: Tensor, noise: Tensor) -> Tensor:
    """The plain MAE loss with the same weights: all patches embedded and decoded, all errors weighed by the mask."""
    n, num_patches = noise.shape
    num_keep = int(num_patches * (1 - MASK_RATIO))
    projection = model.patch_embed.proj
    tokens = F.conv2d(images, projection.weight, projection.bias, stride=model.patch_size).flatten(2).transpose(1, 2)
    tokens = tokens + model.pos_embed[:, 1:]

    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    kept = ids_shuffle[:, :num_keep].unsqueeze(-1).repeat(1, 1, tokens.shape[-1])
    mask = torch.ones(n, num_patches, device=images.device)
    mask[:, :num_keep] = 0
    mask = mask.gather(1, ids_restore)
    cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(n, -1, -1)
    tokens = torch.cat([cls_token, tokens.gather(1, kept)], dim=1)
    for block in model.blocks:
        tokens = block(tokens)
    tokens = model.decoder_embed(model.norm(tokens))

    mask_tokens = model.mask_token.repeat(n, num_patches - num_keep, 1)
    patches = torch.cat([tokens[:, 1:], mask_tokens], dim=1)
    patches = patches.gather(1, ids_restore.unsqueeze(-1).repeat(1, 1, tokens.shape[-1]))
    tokens = torch.cat([tokens[:, :1], patches], dim=1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        tokens = block(tokens)
    prediction = model.decoder_pred(model.decoder_norm(tokens))[:, 1:]

    error = (prediction - normalize_patches(patchify(images, model.patch_size))).pow(2).mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def make_optimizer(model: nn.Module, fused: bool | None) -> torch.optim.AdamW:
    return torch.optim.AdamW(param_groups(model, 0.05), lr=1e-6, betas=(0.9, 0.95), fused=fused)


def our_step(
    model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, images: Tensor, dtype: torch.dtype | None = None
) -> None:
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        loss = model(images, MASK_RATIO)[0]
    loss.backward()
    torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad()


def plain_step(
    model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, images: Tensor, dtype: torch.dtype | None = None
) -> None:
    noise = torch.rand(len(images), model.pos_embed.shape[1] - 1, device=images.device)
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        loss = plain_loss(model, images, noise)
    loss.item()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def with_attention(
    step: Callable[..., None], explicit: bool, dtype: torch.dtype | None, model: MaskedAutoencoder, *args: Any
) -> None:
    """Takes a step with one form of attention, under autocast where a dtype is given."""
    set_attention(model, explicit)
    step(model, *args, dtype=dtype)


def bench_precision(rounds: int) -> list[Comparison]:
    """ViT-base, batch 32: our step against the plain one in both precisions, and bf16 against fp32."""
    model = build_mae("base", norm_pix_loss=True).train()
    images = torch.randn(32, 3, 224, 224)
    fused, default = make_optimizer(model, fused=True), make_optimizer(model, fused=None)
    variants: Variants = {}
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        explicit = prefers_explicit("cpu", dtype, model.pos_embed.shape[1])
        variants[f"ours {name}"] = partial(with_attention, our_step, explicit, dtype, model, fused, images)
        variants[f"plain {name}"] = partial(with_attention, plain_step, False, dtype, model, default, images)
    times = measure(variants, rounds)
    return [
        compare("ViT-base, batch 32, fp32 against plain fp32", times, "ours fp32", "plain fp32", 1.15),
        compare("ViT-base, batch 32, bf16 against plain bf16", times, "ours bf16", "plain bf16", 1.15),
        compare("ViT-base, batch 32, bf16 against our fp32", times, "ours bf16", "ours fp32", 3.0),
    ]


def bench_step(rounds: int) -> list[Comparison]:
    rows = []
    for size, batch in (("tiny", 32), ("base", 8)):
        model = build_mae(size, norm_pix_loss=True).train()
        images = torch.randn(batch, 3, 224, 224)
        noise = torch.rand(batch, 196)
        with torch.no_grad():
            losses = model(images, MASK_RATIO, noise)[0].item(), plain_loss(model, images, noise).item()
        if not math.isclose(*losses, rel_tol=1e-6):
            raise UserError(f"ViT-{size}: our loss {losses[0]!r} is not the reference's {losses[1]!r}")
        fused, default = make_optimizer(model, fused=True), make_optimizer(model, fused=None)
        variants: Variants = {
            "ours": partial(our_step, model, fused, images),
            "plain": partial(plain_step, model, default, images),
            "plain, fused AdamW": partial(plain_step, model, fused, images),
        }
        times = measure(variants, rounds)
        rows.append(compare(f"step of ViT-{size}, batch {batch}", times, "ours", "plain", 1.15))
        rows.append(compare(f"the same, AdamW fused in both, batch {batch}", times, "ours", "plain, fused AdamW", None))
    return rows


def bench_stages(rounds: int, num_images: int = 32) -> list[Comparison]:
    """Images/s of our step at smaller bandwidths over those at 224, with as many tokens a batch."""
    model = build_mae("tiny", norm_pix_loss=True).train()
    optimizer = make_optimizer(model, fused=True)
    batches = {b: round(num_images * (224 / b) ** 2) for b in (224, 160, 96)}
    images = {b: torch.randn(n, 3, b, b) for b, n in batches.items()}
    times = measure({str(b): partial(our_step, model, optimizer, images[b]) for b in batches}, rounds)
    return [
        compare(
            f"ViT-tiny, {batches[b]} images at {b} over {num_images} at 224",
            times,
            str(b),
            "224",
            goal,
            batches[b] / num_images,
        )
        for b, goal in ((96, 5.2), (160, 1.95))
    ]
