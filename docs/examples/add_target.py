"""Adds a target of the masked autoencoder: coarse pixels, the mean of each 4 x 4 cell of a patch.

    python docs/examples/add_target.py CONFIG WORK_DIR

CONFIG is a pre-training config. docs/guides/extending.md says where each part would be in the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from mae_et.cli import run_tool
from mae_et.config.files import load_config
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.plan import Plan
from mae_et.engine.distributed import World
from mae_et.errors import ConfigError
from mae_et.models.mae import MaskedAutoencoder
from mae_et.tasks.pretrain import MAETask, build_optimizer
from mae_et.tasks.run import TaskData, run_training

CELL = 4  # px


def cell_means(patches: Tensor, patch_size: int, cell: int = CELL) -> Tensor:
    """Replaces each pixel of a patch by the mean of its cell.

    Args:
        patches: [N, L, p p C], in the order of `mae_et.models.targets.patchify`.
        patch_size: p in px, a multiple of the cell.
        cell: side of a cell, px.
    Returns:
        [N, L, p p C]; the mean of each patch is unchanged.
    Raises:
        ValueError: if the patch size is not a multiple of the cell.
    """
    if patch_size % cell:
        raise ValueError(f"patch_size = {patch_size} is not a multiple of the cell, {cell} px")
    n, num_patches, values = patches.shape
    cells, channels = patch_size // cell, values // patch_size**2
    cut = patches.view(n, num_patches, cells, cell, cells, cell, channels)
    return cut.mean(dim=(3, 5), keepdim=True).expand_as(cut).reshape(n, num_patches, values)


class CoarseAutoencoder(MaskedAutoencoder):
    """A masked autoencoder that predicts the cell means of the pixels."""

    def _pixel_targets(self, patches: Tensor) -> Tensor:
        return super()._pixel_targets(cell_means(patches, self.patch_size))


class CoarseTask(MAETask):
    """Trains a `CoarseAutoencoder`; everything else is that of the masked autoencoder."""

    def __init__(self, config: PretrainConfig, data: TaskData, plan: Plan, world: World, work_dir: Path) -> None:
        if config.model.target != "pixels":
            raise ConfigError([f"model.target = {config.model.target!r} is not used here: set 'pixels'"])
        super().__init__(config, data, plan, world, work_dir)
        self.model: CoarseAutoencoder = CoarseAutoencoder(
            img_size=config.data.image_size,
            in_chans=config.model.in_chans,
            norm_pix_loss=config.model.norm_pix_loss,
            **vars(config.model.dims),
        ).to(world.device)
        self.optimizer = build_optimizer(config, self.model)
        # Files name a target only if `MaskedAutoencoder` knows it: its head must not be loaded as that of another target.
        self.metadata = {key: value for key, value in self.metadata.items() if key != "target"}
        self.metadata["objective"] = "mae, cell means"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Pre-train a masked autoencoder that predicts coarse pixels.")
    parser.add_argument("config", metavar="CONFIG", help="a pre-training config")
    parser.add_argument("work_dir", metavar="WORK_DIR", help="where the run is written")
    return parser


def main(args: argparse.Namespace) -> None:
    summary = run_training(CoarseTask, load_config(PretrainConfig, args.config), args.work_dir)
    if summary:
        print(f"loss {summary['first_loss']:.3f} -> {summary['last_loss']:.3f}; everything is in {args.work_dir}")


if __name__ == "__main__":
    run_tool(main, make_parser())
