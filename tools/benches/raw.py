"""The loader from raw shards on one core: speed, what it adds to reading and resizing, and fidelity by level and bandwidth."""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from benches.files import write_images
from benches.loader import (
    BATCH,
    SIZE,
    SMALL,
    Some,
    constant_plan,
    describe,
    exhaust,
    fidelity,
    our_batches,
    reference_batches,
)
from benches.measuring import Comparison, Variants, compare, measure
from torch import Tensor
from torch.nn.functional import interpolate

from mae_et.data.sources.raw import RawOptions, RawSource
from mae_et.data.sources.raw_writer import RawJob, write_raw
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.spec import open_source
from mae_et.data.stream import Loading, make_loader
from mae_et.data.transforms import draw_box, make_train_transform, sample_rng
from mae_et.errors import UserError

LEVELS: tuple[tuple[int, ...], ...] = (
    (256,),
    (256, 192),
    (256, 160),
    (256, 128),
)  # pyramids whose fidelity is measured
BANDWIDTHS = (96, 128, 160, 192, 224)


class Row(NamedTuple):
    """A comparison of two variants."""

    title: str
    ours: str
    reference: str
    goal: float | None = None


ROWS = (
    Row("raw at 96 (direct), against the authors' path", "raw direct 96", "authors 96", 10.0),
    Row("raw at 96 (direct), against JPEG (direct)", "raw direct 96", "direct 96", 3.5),
    Row("pyramid 256 128 at 96 (direct), against JPEG (direct)", "pyramid direct 96", "direct 96"),
    Row("raw at 224 (fast), against the reference loader", "raw fast 224", "reference 224"),
    Row("raw at 224 (fast), against JPEG (fast)", "raw fast 224", "fast 224"),
    Row("raw at 96 with exact low frequencies (fast), against JPEG (fast)", "raw fast 96", "fast 96"),
    # The overhead is at most 20% of the time if the kernels take at least 80% of it.
    Row("reading and resizing alone to 96, against the loader", "loader 96", "kernels 96", 0.8),
    Row("reading and resizing alone to 224, against the loader", "loader 224", "kernels 224", 0.8),
    Row("one process, against the loader with one worker at 96", "worker 96", "loader 96"),
    Row("one process, against the loader with one worker at 224", "worker 224", "loader 224"),
    Row("memory of its own for each batch, against buffers, one worker at 96", "worker 96", "fresh 96"),
    Row("memory of its own for each batch, against buffers, one worker at 224", "worker 224", "fresh 224"),
)


def add_raw_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", metavar="DATA", help="folder or shards of 256-px images; default: generated, 256x341"
    )
    parser.add_argument("--num-images", type=int, default=512, metavar="N", help="default: %(default)s")


def bench_raw(args: argparse.Namespace) -> list[Comparison]:
    if args.num_images < BATCH:
        raise UserError(f"--num-images is {args.num_images}; a batch has {BATCH}, so ask for at least that many")
    logging.getLogger("mae_et").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = args.images or str(write_images(folder / "images", args.num_images, "256x341", quality=95))
        source = Some(open_source(images), args.num_images)
        about = describe(source, "generated" if args.images is None else images)
        print(about, flush=True)
        raw = {sizes: raw_set(source, folder, sizes) for sizes in LEVELS}
        times = measure(variants(source, raw), args.rounds)
        num = len(source) // BATCH * BATCH
        rows = [compare(f"{num} images, {r.title}", times, r.ours, r.reference, r.goal) for r in ROWS]
        for row in rows:
            row["images"] = about
        rows[0]["fidelity_db"] = fidelities(source, raw)
        rows[0]["ms_an_image"] = {name: 1e3 * statistics.median(t.wall) / num for name, t in times.items()}
        rows[0]["cold_kb_an_image"] = cold_bytes(raw[(256,)]) / 1e3
    for name, milliseconds in rows[0]["ms_an_image"].items():
        print(f"{name}: {milliseconds:.3f} ms an image")
    for line in rows[0]["fidelity_db"]:
        print(", ".join(f"{key} {value}" for key, value in line.items()))
    print(f"read from disk: {rows[0]['cold_kb_an_image']:.0f} KB an image, from a cold cache")
    return rows


class _RawInOrder(Some):
    """A raw set in the order of the images that it was made from, with each block checked already."""

    def __init__(self, raw: RawSource, source: ImageSource) -> None:
        places = {raw.key(index).partition(".raw:")[2]: index for index in range(len(raw))}
        self.source, self.indices = raw, [places[source.key(index)] for index in range(len(source))]
        self.raw, self.decoding, self.left_out = raw, raw.decoding, raw.left_out
        for index in range(len(raw)):
            for side in (None, *raw.sizes):
                raw.read_region(index, (0, 0, *raw.shape(index)), side)

    def shape(self, index: int) -> tuple[int, int]:
        return self.raw.shape(self.indices[index])

    def read_region(self, index: int, box: tuple[int, int, int, int], side: int | None = None) -> np.ndarray:
        return self.raw.read_region(self.indices[index], box, side)


def raw_set(source: ImageSource, folder: Path, sizes: tuple[int, ...]) -> _RawInOrder:
    job = RawJob(source, folder / "_".join(map(str, sizes)), "train", RawOptions(sizes))
    write_raw(job)
    return _RawInOrder(RawSource(job.header_path), source)


def variants(source: ImageSource, raw: dict[tuple[int, ...], _RawInOrder]) -> Variants:
    full, pyramid, num = raw[(256,)], raw[(256, 128)], len(source) // BATCH * BATCH
    batches: dict[str, Callable[[], Iterator[Tensor]]] = {
        "raw direct 96": partial(our_batches, full, "direct", SMALL),
        "pyramid direct 96": partial(our_batches, pyramid, "direct", SMALL),
        "direct 96": partial(our_batches, source, "direct", SMALL),
        "authors 96": partial(reference_batches, source, num, SMALL),
        "raw fast 224": partial(our_batches, full, "fast", SIZE),
        "raw fast 96": partial(our_batches, full, "fast", SMALL),
        "fast 96": partial(our_batches, source, "fast", SMALL),
        "fast 224": partial(our_batches, source, "fast", SIZE),
        "reference 224": partial(reference_batches, source, num, None),
    }
    timed: Variants = {name: partial(exhaust, make) for name, make in batches.items()}
    ways: tuple[tuple[int, Loading], ...] = ((SMALL, "direct"), (SIZE, "fast"))
    for side, loading in ways:
        timed[f"kernels {side}"] = partial(kernels, boxes(full, side), full, side)
        timed[f"loader {side}"] = partial(loader_alone, full, loading, side)
        timed[f"worker {side}"] = partial(loader_alone, full, loading, side, num_workers=1)
        timed[f"fresh {side}"] = partial(loader_alone, full, loading, side, num_workers=1, reuse=False)
    return timed


def loader_alone(
    source: ImageSource, loading: Loading, bandwidth: int, num_workers: int = 0, reuse: bool = True
) -> None:
    """Reads all batches, as bytes. Workers are started each time, which is part of the time."""
    config, plan = constant_plan(source, loading, bandwidth)
    transform = make_train_transform(config.data)
    loader = make_loader(source, transform, plan, seed=0, loading=loading, num_workers=num_workers)
    if not reuse:
        loader.batch_sampler.buffers.free.clear()  # type: ignore[union-attr]
    for _ in loader:
        pass


class Crop(NamedTuple):
    """A crop of an image."""

    image: int
    box: tuple[int, int, int, int]
    flip: bool


def boxes(source: _RawInOrder, side: int) -> list[Crop]:
    """Returns the crops of one pass over the images, drawn as the loader draws them."""
    crops = []
    for index in range(len(source) // BATCH * BATCH):
        with sample_rng(index, torch_alone=True):
            crops.append(Crop(index, draw_box(*source.shape(index), 0.2), bool(torch.rand(1).item() < 0.5)))
    return crops


def kernels(crops: list[Crop], source: _RawInOrder, side: int) -> None:
    """Reads and resizes, and nothing else."""
    out = torch.empty(BATCH, 3, side, side, dtype=torch.uint8)
    for i, (image, box, flip) in enumerate(crops):
        region = torch.from_numpy(source.raw.read_region(source.indices[image], box, side)).permute(2, 0, 1)[None]
        pixels = interpolate(region, (side, side), mode="bicubic", antialias=True)[0]
        out[i % BATCH] = pixels.flip(-1) if flip else pixels


def fidelities(source: ImageSource, raw: dict[tuple[int, ...], _RawInOrder]) -> list[dict[str, str | int]]:
    """Returns the PSNR of the same crops of the same images.

    exact: Pillow's crop resized to 224, then the exact low-frequency crop. resized: Pillow's crop resized to the bandwidth.
    """
    lines: list[dict[str, str | int]] = []
    for bandwidth in BANDWIDTHS:
        exact = list(our_batches(source, "exact", bandwidth))
        resized = list(our_batches(_PillowOnly(source), "direct", bandwidth))
        for sizes, images in raw.items():
            line: dict[str, str | int] = {"bandwidth": bandwidth, "sizes": " ".join(map(str, sizes))}
            for loading in ("fast", "direct"):
                found = list(our_batches(images, loading, bandwidth))
                line[f"{loading} against exact"] = _text(fidelity(iter(found), iter(exact)))
                if loading == "direct":
                    line["direct against resized"] = _text(fidelity(iter(found), iter(resized)))
            lines.append(line)
    return lines


class _PillowOnly(Some):
    """Images without files, so that every way of loading takes Pillow."""

    def __init__(self, source: ImageSource) -> None:
        self.source, self.indices = source, list(range(len(source)))
        self.decoding, self.left_out = source.decoding, source.left_out

    def read(self, index: int) -> None:
        return None


def _text(decibels: dict[str, float]) -> str:
    return "{mean:.1f} ({min:.1f})".format(**decibels)


def cold_bytes(source: _RawInOrder) -> float:
    """Returns the bytes an image that one pass of crops reads from disk, after its files were put out of the cache."""
    files = {file.descriptor for file in source.raw._descriptors.values()}
    for descriptor in files:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    before = _bytes_from_disk()
    crops = boxes(source, SIZE)
    kernels(crops, source, SIZE)
    return (_bytes_from_disk() - before) / len(crops)


def _bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))
