"""Whole pre-training runs from image files where loading is the limit: a minimal model beside one loader process, or a GPU.

Equal equivalent epochs cost equal compute under every curriculum. But the curriculum shows more, smaller images, each of
which must be read. So the time that is lost to loading is what differs. The reference is a run at full size that loads as the
authors do: Pillow to 224, and Lanczos from there to the bandwidth. (Normalising, which they do in the loader, is left out.)
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benches.files import write_images
from benches.measuring import Comparison, Times, compare
from PIL import Image
from torchvision.transforms import functional as F

from mae_et.config.schema import DataConfig, PretrainConfig, from_dict
from mae_et.curriculum.plan import Plan, make_plan
from mae_et.data.decoding import MAX_IMAGE_PIXELS
from mae_et.data.replay import make_stream
from mae_et.data.sources.raw import RawOptions
from mae_et.data.sources.raw_writer import RawJob, write_raw
from mae_et.data.sources.spec import open_source
from mae_et.data.stream import Stream
from mae_et.data.transforms import TrainTransform, make_train_transform
from mae_et.engine.distributed import join_world
from mae_et.engine.trainer import Trainer, TrainerSettings
from mae_et.models.sizes import Size
from mae_et.runs.summary import summarize
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks.pretrain import MAETask


class Run(NamedTuple):
    """A pre-training."""

    preset: str  # of the curriculum
    loading: str  # data.loading, or "authors"
    others: dict[str, Any] = {}  # noqa: RUF012  further sections of the config
    goal: float | None = None  # of the reference's time over this one's
    sizes: tuple[int, ...] = ()  # of the raw set that is read instead of the images
    own_goal: float | None = None  # of the time of our constant run on the raw set over this one's


OWN = "constant, raw"
REPLAY = {"replay": {"mode": "mix"}}  # R = 4, 2, 1 as published
# The first is the reference.
RUNS = {
    "constant, authors' loader": Run("constant", "authors"),
    "constant, exact": Run("constant", "exact"),
    "constant, fast": Run("constant", "fast"),
    "etpp, authors' loader": Run("etpp", "authors"),
    "etpp, exact": Run("etpp", "exact"),
    "etpp, fast": Run("etpp", "fast"),
    "etpp, direct": Run("etpp", "direct"),
    "etpp, authors' loader, replay": Run("etpp", "authors", REPLAY),
    "etpp, fast, replay": Run("etpp", "fast", REPLAY, goal=1.5),
    OWN: Run("constant", "direct", sizes=(256,)),
    "etpp, raw": Run("etpp", "direct", goal=2.0, sizes=(256,), own_goal=0.7),
    "etpp, raw, pyramid": Run("etpp", "direct", sizes=(256, 128), own_goal=0.7),
}


# Its step takes a millisecond an image at 224 on one core: less than loading.
MINIMAL = {
    "size": "tiny", "embed_dim": 32, "depth": 1, "num_heads": 1, "norm_pix_loss": False,
    "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 1,
}  # fmt: skip


def add_whole_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="DATA", help="folder or shards; default: 256 generated photos, 338x500")
    parser.add_argument(
        "--budget",
        type=int,
        default=2000,
        metavar="N",
        help="of each run, in images at full size (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the step (default: %(default)s)")
    parser.add_argument(
        "--model",
        choices=["none", "minimal", "tiny", "small", "base"],
        default="minimal",
        help="minimal: so small that a CPU waits for one loader process (default); on a GPU take a real one; none: the images "
        "are read and nothing is trained",
    )


def bench_whole(args: argparse.Namespace) -> list[Comparison]:
    logging.getLogger("mae_et").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        images = args.images
        if images is None:
            print("generated photos, 338x500 px", flush=True)
            images = str(write_images(Path(temporary) / "images", 256, "338x500", quality=95))
        raw = {run.sizes: images for run in RUNS.values()}
        for sizes in filter(None, raw):
            raw[sizes] = str(raw_set(images, Path(temporary) / "raw", sizes))
        times = {name: Times([], []) for name in RUNS}
        summaries: dict[str, dict[str, Any]] = {}
        for i in range(args.rounds):
            for name in list(RUNS)[:: -1 if i % 2 else 1]:
                work_dir = Path(temporary) / f"{i} {name}"
                cpu = sum(os.times()[:4])
                summaries[name] = execute(RUNS[name], args, raw[RUNS[name].sizes], work_dir)
                times[name].wall.append(summaries[name]["seconds"])
                times[name].cpu.append(sum(os.times()[:4]) - cpu)
    reference, *others = RUNS
    rows = [make_row(name, reference, times, summaries, RUNS[name].goal) for name in others]
    own = [name for name in others if RUNS[name].own_goal is not None]
    return rows + [make_row(name, OWN, times, summaries, RUNS[name].own_goal) for name in own]


def raw_set(images: str, folder: Path, sizes: tuple[int, ...]) -> Path:
    """Writes a raw set of the images and returns its header."""
    job = RawJob(open_source(images), folder, "_".join(map(str, sizes)), RawOptions(sizes))
    write_raw(job)
    return job.header_path


def make_row(
    name: str, reference: str, times: dict[str, Times], summaries: dict[str, dict[str, Any]], goal: float | None
) -> Comparison:
    """Adds to a comparison of times how many images were shown and how long each stage waited for them."""
    ours, theirs = summaries[name], summaries[reference]
    ideal = theirs["train_petaflops"] / ours["train_petaflops"]
    waiting = sum(stage["waiting_fraction"] * stage["seconds"] for stage in ours["stages"]) / ours["seconds"]
    title = f"{name}: {ours['num_images']} images shown, {waiting:.0%} waiting, ideal {ideal:.2f}, against {reference}"
    return {
        **compare(title, times, name, reference, goal),
        "ideal_by_flops": ideal,
        "stages": {"ours": ours["stages"], "reference": theirs["stages"]},
    }


def execute(run: Run, args: argparse.Namespace, images: str, work_dir: Path) -> dict[str, Any]:
    """Runs a pre-training and returns its summary."""
    authors = run.loading == "authors"
    equivalent_epochs = args.budget / len(open_source(images))
    values: dict[str, Any] = {
        **run.others,
        # "direct" hands the bandwidth to the transform, the authors' too.
        "data": {"train": images, "image_size": 224, "loading": "direct" if authors else run.loading},
        "model": MINIMAL if args.model in ("none", "minimal") else {"size": args.model},
        "curriculum": {
            "preset": run.preset,
            "equivalent_epochs": equivalent_epochs,
            "baseline_equivalent_epochs": equivalent_epochs,
            "warmup_equivalent_epochs": equivalent_epochs / 20,
        },
        "batch": {"global_batch_size": 32},
        "run": {"precision": "fp32", "save_interval": 10**9, "log_interval": 100},
    }  # fmt: skip
    values["data"]["num_workers"] = args.workers
    config = from_dict(PretrainConfig, values)
    transform = authors_transform(config.data) if authors else make_train_transform(config.data)
    with join_world(args.device) as world:
        data = MAETask.open_data(config)
        plan = make_plan(config, MAETask.cost(config), len(data.train))
        if args.model == "none":
            return read_alone(plan, make_stream(data.train, transform, plan, config))
        task = MAETask(config, data, plan, world, work_dir)
        task.hooks = []  # no pictures
        work_dir.mkdir()
        stream = make_stream(data.train, transform, plan, config, on_gpu=world.device.type == "cuda")
        progress = Trainer(plan, task, task.optimizer, stream, world, TrainerSettings(config.run, work_dir)).fit()
        summary = summarize(plan, progress, read_jsonl(work_dir / "metrics.jsonl"), world, None)
        return {**summary, "stages": [stage.model_dump() for stage in summary["stages"]]}


def read_alone(plan: Plan, stream: Stream) -> dict[str, Any]:
    """Reads the images of a run; returns what `make_row` needs."""
    start, num_images = time.perf_counter(), 0
    with stream.open(0, lambda: False) as batches:
        for stage in plan.stages:
            for _ in range(stage.num_steps * stage.accum_steps):
                num_images += len(next(batches).images)
    seconds = time.perf_counter() - start
    waiting = [{"waiting_fraction": 1.0, "seconds": seconds}]
    flops = plan.train_petaflops
    return {"seconds": seconds, "num_images": num_images, "train_petaflops": flops, "stages": waiting}


class AuthorsTransform(TrainTransform):
    """Pillow to image_size, then Lanczos to the bandwidth."""

    def __call__(self, image: Image.Image, strength: float, size: Size | None = None) -> torch.Tensor:
        pixels = super().__call__(image, strength)
        if size is None or size == self.image_size:
            return pixels
        return F.pil_to_tensor(F.to_pil_image(pixels).resize(size[::-1], Image.Resampling.LANCZOS))

    def from_jpeg(
        self, content: bytes, strength: float, size: Size | None = None, max_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        return None


def authors_transform(data: DataConfig) -> TrainTransform:
    return AuthorsTransform(data.image_size, min_scale=data.augmentation.min_scale)
