"""Pre-trains with a change that is no option of the package: `python variant.py imagenette --resize bicubic --work-dir DIR`.

`--resize` takes Pillow's filter in place of the low-frequency crop. `--first-mask-ratio` masks another share of the patches in
the first stage. The other arguments are those of `mae-et pretrain`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_et.commands.pretrain import make_parser, print_summary
from mae_et.config.files import load_config
from mae_et.config.schema import PretrainConfig
from mae_et.lowfreq import normalize
from mae_et.tasks.pretrain import MAETask
from mae_et.tasks.run import run_training


@functools.cache
def resize_matrix(size: int, smaller: int, kind: str) -> Tensor:
    """Returns Pillow's resize of one axis as a matrix [smaller, size]: the filter is linear and works axis by axis."""
    identity = Image.fromarray(np.eye(size, dtype=np.float32))
    return torch.from_numpy(np.array(identity.resize((size, smaller), Image.Resampling[kind.upper()])))


def variant(resize: str | None, first_mask_ratio: float | None) -> type[MAETask]:
    """Returns the task with the changes."""

    class Variant(MAETask):
        def _normalize(self, images: Tensor, size: tuple[int, int]) -> Tensor:
            if resize is None or images.shape[-2:] == size:
                return super()._normalize(images, size)
            sides = zip(images.shape[-2:], size, strict=True)
            rows, columns = (resize_matrix(old, new, resize).to(images.device) for old, new in sides)
            small = rows @ (images.float() / 255) @ columns.T
            return normalize(small, self.config.data.mean, self.config.data.std)

        def loss(self, *args: Any) -> Any:
            if first_mask_ratio is None or self.plan.stage_at(self.step) is not self.plan.stages[0]:
                return super().loss(*args)
            config = self.config
            model = config.model.model_copy(update={"mask_ratio": first_mask_ratio})
            self.config = config.model_copy(update={"model": model})
            result = super().loss(*args)
            self.config = config
            return result

    return Variant


def main() -> None:
    """Runs one training."""
    parser = make_parser()
    parser.add_argument("--resize", choices=["bicubic", "lanczos"])
    parser.add_argument("--first-mask-ratio", type=float)
    args = parser.parse_args()
    config = load_config(PretrainConfig, args.config, args.cfg_options)
    task = variant(args.resize, args.first_mask_ratio)
    work_dir = Path(args.work_dir)
    print_summary(run_training(task, config, work_dir, args.resume, args.device), work_dir)


if __name__ == "__main__":
    main()
