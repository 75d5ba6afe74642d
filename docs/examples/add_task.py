"""Adds a training objective: a ViT removes noise from images, under the same curriculum as the masked autoencoder.

    python docs/examples/add_task.py CONFIG WORK_DIR

CONFIG is a pre-training config. In the package the network would be mae_et/models/denoiser.py and the task
mae_et/tasks/denoise.py. Nothing else changes: the loop, data, plan, checkpoints and records do not know the objective.

Shapes: N images, C channels, H x W px, p patch size, L = (H/p)(W/p) patches, D width.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_et.cli import run_tool
from mae_et.config.files import load_config
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.cost import ModelCost, vit_cost
from mae_et.curriculum.plan import Plan
from mae_et.data.sources.spec import open_images
from mae_et.data.stream import Batch
from mae_et.engine.distributed import World
from mae_et.engine.progress import Progress
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.blocks import layer_norm
from mae_et.models.pos_embed import sincos_pos_embed, sincos_pos_embed_on
from mae_et.models.targets import patchify
from mae_et.runs.records import PretrainSummary
from mae_et.storage.backbone import write_backbone
from mae_et.storage.digest import encoder_digest
from mae_et.tasks.pretrain import backbone_metadata, build_optimizer
from mae_et.tasks.run import TaskData, TrainingTask, run_training

NOISE_STD = 0.5  # of the noise, in units of the normalized pixels


class Denoiser(nn.Module):
    """A ViT with a linear head that predicts the clean pixels of each patch. State names of the encoder equal timm's.

    Args:
        image_size: (height, width) in px, of the stored position table; other sizes are allowed in `forward`.
        patch_size: p in px.
        in_chans: C.
        embed_dim, depth, num_heads: of the encoder.
    """

    def __init__(
        self, image_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(image_size, patch_size, in_chans, embed_dim, strict_img_size=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_pos_embed(embed_dim, self.patch_embed.grid_size))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, qkv_bias=True, norm_layer=layer_norm(1e-6)) for _ in range(depth)
        )
        self.norm = layer_norm(1e-6)(embed_dim)
        self.pixels = nn.Linear(embed_dim, in_chans * patch_size**2)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            images: [N, C, H, W], normalized.
            noise: [N, C, H, W], added to the input.
        Returns:
            The mean squared error over all pixels, a scalar.
        """
        grid_size = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        patches = self.patch_embed(images + noise)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1)
        # The bandwidth changes with the stage, so the table is computed for the grid at hand.
        tokens = tokens + sincos_pos_embed_on(tokens.shape[-1], grid_size, tokens.device, tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        predicted = self.pixels(self.norm(tokens)[:, 1:])
        return F.mse_loss(predicted.float(), patchify(images, self.patch_size).float())


class DenoisingTask(TrainingTask):
    """Trains a `Denoiser`; `run_training` does the rest."""

    kind = "pretrain"  # the kind of its records: the report and the probes treat its backbone as any other
    summary_type = PretrainSummary

    @classmethod
    def open_data(cls, config: PretrainConfig) -> TaskData:
        return TaskData(open_images(config.data, config.data.train, config.model.in_chans))

    @classmethod
    def cost(cls, config: PretrainConfig) -> ModelCost:
        encoder, dims = vit_cost(config.model), config.model.dims
        values = config.model.in_chans * dims.patch_size**2

        def forward_flops(size: tuple[int, int]) -> int:
            num_patches = (size[0] // dims.patch_size) * (size[1] // dims.patch_size)
            return encoder.forward_flops(size) + 2 * num_patches * dims.embed_dim * values

        return replace(encoder, forward_flops=forward_flops)

    def __init__(self, config: PretrainConfig, data: TaskData, plan: Plan, world: World, work_dir: Path) -> None:
        self.config, self.plan, self.world, self.work_dir = config, plan, world, work_dir
        dims = config.model.dims
        self.model: Denoiser = Denoiser(
            config.data.image_size, dims.patch_size, config.model.in_chans, dims.embed_dim, dims.depth, dims.num_heads
        ).to(world.device)
        self.optimizer = build_optimizer(config, self.model)
        metadata = backbone_metadata(config, plan)
        for key in ("mask_ratio", "decoder_num_heads"):  # this model has neither
            del metadata[key]
        self.metadata = {**metadata, "objective": "denoising", "target": "pixels"}

    def preprocess(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        data = self.config.data
        return crop_and_normalize(images, size, data.mean, data.std, self.config.curriculum.centered)

    def loss(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        # Noise from the seed and the place of each image alone: the loss does not depend on how a batch is split.
        places = batch.places if batch.showings is None else batch.showings
        noise = torch.stack([self._noise(int(place), images.shape[1:]) for place in places.tolist()])
        return model(images, noise.to(images.device)), {}

    def _noise(self, place: int, shape: torch.Size) -> Tensor:
        generator = torch.Generator().manual_seed((self.config.run.seed << 40) + place)
        return NOISE_STD * torch.randn(shape, generator=generator)

    def finish(self, progress: Progress, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.world.is_main:
            return {}
        encoder = {key: value for key, value in self.model.state_dict().items() if not key.startswith("pixels.")}
        write_backbone(encoder, self.work_dir / "backbone.safetensors", "timm", self.metadata)
        digest = encoder_digest(encoder)["encoder_sha256"]
        return {"encoder_sha256": digest, "knn_top1_before": None, "knn_top1_after": None}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Pre-train a ViT by removing noise from images.")
    parser.add_argument("config", metavar="CONFIG", help="a pre-training config")
    parser.add_argument("work_dir", metavar="WORK_DIR", help="where the run is written")
    return parser


def main(args: argparse.Namespace) -> None:
    summary = run_training(DenoisingTask, load_config(PretrainConfig, args.config), args.work_dir)
    if summary:
        print(f"loss {summary['first_loss']:.3f} -> {summary['last_loss']:.3f}; everything is in {args.work_dir}")


if __name__ == "__main__":
    run_tool(main, make_parser())
