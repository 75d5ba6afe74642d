"""The loader from files to normalised batches on one core, against the reference loader and the authors' path to 96.

The reference: Pillow opens, RandomResizedCrop (bicubic), flip, ToTensor, Normalize. The authors' path to 96: the same to
224, then Pillow's Lanczos before ToTensor.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from benches.files import write_images
from benches.measuring import Comparison, Variants, compare, measure
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import transforms as v1

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.curriculum.cost import mae_cost
from mae_et.curriculum.plan import Plan, make_plan
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.spec import open_source
from mae_et.data.stream import Loading, make_loader
from mae_et.data.transforms import make_train_transform
from mae_et.errors import UserError
from mae_et.lowfreq import crop_and_normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, SMALL, BATCH = 224, 96, 32


class Goals(NamedTuple):
    full: float  # at 224, 55 dB
    direct: float  # at 96, 36 dB
    exact: float | None  # at 96 with the exact low frequencies, 55 dB


class Photos(NamedTuple):
    """A kind of images to read."""

    name: str
    option: str  # of the command line that names a folder of them
    size: str  # of those generated otherwise, HxW
    goals: Goals


KINDS = (
    Photos("photos", "photos", "338x500", Goals(1.75, 2.7, 2.1)),
    Photos("256-px images", "small", "256x341", Goals(2.3, 4.0, None)),
)


def add_loader_options(parser: argparse.ArgumentParser) -> None:
    for kind in KINDS:
        parser.add_argument(
            f"--{kind.option}", metavar="DATA", help=f"folder or shards of {kind.name}; default: generated, {kind.size}"
        )
    parser.add_argument("--num-images", type=int, default=128, metavar="N", help="of each kind (default: %(default)s)")


def bench_loader(args: argparse.Namespace) -> list[Comparison]:
    if args.num_images < BATCH:
        raise UserError(f"--num-images is {args.num_images}; a batch has {BATCH}, so ask for at least that many")
    versions = {name: metadata.version(name) for name in ("torchvision", "pillow", "simplejpeg")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    rows = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = getattr(args, kind.option)
            if folder is None:
                write_images(Path(temporary), args.num_images, kind.size, quality=95)
            source = Some(open_source(folder or temporary), args.num_images)
            about = describe(source, "generated" if folder is None else folder)
            print(f"{kind.name}: {about}", flush=True)
            rows += [{**row, "images": about, "versions": versions} for row in bench_kind(source, kind, args.rounds)]
    return rows


def bench_kind(source: ImageSource, kind: Photos, rounds: int) -> list[Comparison]:
    num = len(source) // BATCH * BATCH
    ours: dict[str, Callable[[], Iterator[Tensor]]] = {
        "exact 224": partial(our_batches, source, "exact", SIZE),
        "fast 224": partial(our_batches, source, "fast", SIZE),
        "exact 96": partial(our_batches, source, "exact", SMALL),
        "fast 96": partial(our_batches, source, "fast", SMALL),
        "direct 96": partial(our_batches, source, "direct", SMALL),
    }
    reference: dict[str, Callable[[], Iterator[Tensor]]] = {
        "reference 224": partial(reference_batches, source, num, None),
        "authors 96": partial(reference_batches, source, num, SMALL),
        "torchvision 224": partial(torchvision_batches, source, num),
    }
    variants: Variants = {name: partial(exhaust, batches) for name, batches in {**ours, **reference}.items()}
    times = measure(variants, rounds)
    rows = []
    for title, name, against, goal, exact in (
        ("fast", "fast 224", "reference 224", kind.goals.full, "exact 224"),
        ("exact", "exact 224", "reference 224", None, None),
        ("fast", "fast 224", "torchvision 224", None, "exact 224"),
        ("direct", "direct 96", "authors 96", kind.goals.direct, "exact 96"),
        ("fast, low frequencies", "fast 96", "authors 96", kind.goals.exact, "exact 96"),
        ("exact, low frequencies", "exact 96", "authors 96", None, None),
    ):
        row = compare(f"{num} {kind.name}, {title}, against {against}", times, name, against, goal)
        if exact is not None:
            row["psnr_db"] = fidelity(ours[name](), ours[exact]())
            row["title"] += ", PSNR {mean:.1f} (worst {min:.1f})".format(**row["psnr_db"])
        rows.append(row)
    return rows


class Some:
    """The first images of a source that are files."""

    labels = class_names = None

    def __init__(self, source: ImageSource, num_images: int) -> None:
        if len(source) < num_images or source.read(0) is None:
            raise UserError(f"{source.name(0)}, ...: {len(source)} images; name a folder with {num_images} image files")
        step = len(source) / num_images
        self.source, self.indices = source, [int(i * step) for i in range(num_images)]
        self.decoding, self.left_out = source.decoding, source.left_out

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def key(self, index: int) -> str:
        return self.source.key(self.indices[index])

    def size(self, index: int) -> int | None:
        return self.source.size(self.indices[index])

    def read(self, index: int) -> bytes | None:
        return self.source.read(self.indices[index])

    def load(self, index: int) -> Image.Image:
        return self.source.load(self.indices[index])


def describe(source: ImageSource, where: str) -> str:
    sizes = [source.load(i).size for i in range(len(source))]
    width, height = (statistics.median(size[axis] for size in sizes) for axis in (0, 1))
    kilobytes = statistics.mean(len(source.read(i) or b"") for i in range(len(source))) / 1e3
    return f"{len(source)} images, {where}; median {width:g} x {height:g} px, mean {kilobytes:.0f} kB"


def exhaust(batches: Callable[[], Iterator[Tensor]]) -> None:
    for _ in batches():
        pass


def constant_plan(source: ImageSource, loading: Loading, bandwidth: int) -> tuple[PretrainConfig, Plan]:
    """Returns a run of one pass over the images at a bandwidth."""
    values = {
        "data": {"train": "here", "image_size": SIZE, "loading": loading},
        "curriculum": {"preset": "constant", "equivalent_epochs": 1, "warmup_equivalent_epochs": 0},
        "batch": {"global_batch_size": BATCH},
    }
    config = from_dict(PretrainConfig, values)
    plan = make_plan(config, mae_cost(config.model), len(source) // BATCH * BATCH)
    return config, replace(
        plan,
        stages=tuple(replace(stage, bandwidth=bandwidth, input_size=(bandwidth, bandwidth)) for stage in plan.stages),
    )


def our_batches(source: ImageSource, loading: Loading, bandwidth: int) -> Iterator[Tensor]:
    """Normalised batches as a run at this bandwidth has them."""
    config, plan = constant_plan(source, loading, bandwidth)
    for batch in make_loader(source, make_train_transform(config.data), plan, seed=0, loading=loading):
        yield crop_and_normalize(batch.images, bandwidth, MEAN, STD, centered=True)


class _Decoded(Dataset):
    """What a decoder and a transform make of each file, as torchvision's ImageFolder does."""

    def __init__(self, source: ImageSource, num_images: int, decode: Callable, transform: Callable) -> None:
        self.source, self.num_images, self.decode, self.transform = source, num_images, decode, transform

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.decode(self.source.read(index)))


def _decode_with_pillow(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _decode_with_torchvision(content: bytes) -> Tensor:
    return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)


def reference_batches(source: ImageSource, num_images: int, side: int | None) -> Iterator[Tensor]:
    """The reference loader; with a side, the authors' path to it."""
    steps = [
        v1.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
        v1.RandomHorizontalFlip(),
        *([v1.Resize((side, side), interpolation=InterpolationMode.LANCZOS)] if side else []),
        v1.ToTensor(),
        v1.Normalize(MEAN, STD),
    ]
    return iter(DataLoader(_Decoded(source, num_images, _decode_with_pillow, v1.Compose(steps)), BATCH, shuffle=True))


def torchvision_batches(source: ImageSource, num_images: int) -> Iterator[Tensor]:
    """torchvision's own decoder and tensors all the way."""
    steps = [
        v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    return iter(
        DataLoader(_Decoded(source, num_images, _decode_with_torchvision, v2.Compose(steps)), BATCH, shuffle=True)
    )


def fidelity(found: Iterator[Tensor], expected: Iterator[Tensor]) -> dict[str, float]:
    """Mean and smallest PSNR of the same images, in dB of 8-bit levels."""
    levels = 255 * torch.tensor(STD).view(3, 1, 1)
    values = []
    for a, b in zip(found, expected, strict=True):
        errors = ((a - b) * levels).square().mean(dim=(1, 2, 3))
        values += [10 * math.log10(255**2 / max(error, 1e-9)) for error in errors.tolist()]
    return {"mean": statistics.mean(values), "min": min(values)}
