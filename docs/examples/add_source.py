"""Adds a data source: images in a NumPy array on disk, written by `numpy.save`.

    python docs/examples/add_source.py IMAGES.npy CONFIG WORK_DIR

The array is [N, H, W, 3] uint8. In the package the class would be mae_et/data/sources/array.py, and `open_source` in
mae_et/data/sources/spec.py would open it for a path that ends in .npy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mae_et.cli import run_tool
from mae_et.config.files import load_config
from mae_et.config.schema import PretrainConfig
from mae_et.data.decoding import Decoding
from mae_et.data.sources.listing import LeftOut
from mae_et.errors import DataError
from mae_et.tasks.pretrain import MAETask
from mae_et.tasks.run import TaskData, run_training


class ArraySource:
    """The images of an array; implements `mae_et.data.sources.source.ImageSource`.

    Loader processes open the file themselves, so that its pages are shared and nothing is copied at their start.

    Args:
        path: of the .npy file.
    Raises:
        DataError: if the file is not such an array.
    """

    labels: Sequence[int] | None = None
    class_names: Sequence[str] | None = None

    def __init__(self, path: str | Path) -> None:
        self.path, self.decoding, self.left_out = Path(path), Decoding(), LeftOut()
        self._images: np.ndarray | None = None
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): write it with numpy.save") from error
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not len(array):
            raise DataError(
                f"{path} holds {array.dtype} of shape {array.shape}: save an array [N, H, W, 3] of uint8, N at least 1"
            )
        self._num_images = len(array)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_images": None}

    def __len__(self) -> int:
        return self._num_images

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def key(self, index: int) -> str:
        return str(index)

    def size(self, index: int) -> int | None:
        return None

    def read(self, index: int) -> bytes | None:
        return None  # there is no file of a single image

    def load(self, index: int) -> Image.Image:
        if self._images is None:
            self._images = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return Image.fromarray(np.ascontiguousarray(self._images[index]))


class ArrayTask(MAETask):
    """Pre-trains on an array: `data.train` is its path."""

    @classmethod
    def open_data(cls, config: PretrainConfig) -> TaskData:
        return TaskData(ArraySource(config.data.train))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Pre-train a masked autoencoder on an array of images.")
    parser.add_argument("images", metavar="IMAGES.npy", help="array [N, H, W, 3] of uint8")
    parser.add_argument("config", metavar="CONFIG", help="a pre-training config")
    parser.add_argument("work_dir", metavar="WORK_DIR", help="where the run is written")
    return parser


def main(args: argparse.Namespace) -> None:
    overrides = {"data.train": args.images, "data.val": "None", "data.num_images": "None"}
    config = load_config(PretrainConfig, args.config, overrides)
    summary = run_training(ArrayTask, config, args.work_dir)
    if summary:
        print(f"{summary['num_images']} images shown; everything is in {args.work_dir}")


if __name__ == "__main__":
    run_tool(main, make_parser())
