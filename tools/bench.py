"""Times the crop, the training step, the stages, fine-tuning and extraction against references, paired in one process.

The references are written out here. `python tools/bench.py WHAT [--threads N] [--rounds N] [--json FILE]`
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _checkout  # noqa: F401
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_et.cli import run_tool
from mae_et.errors import UserError
from mae_et.lowfreq import crop_and_normalize, low_frequency_crop
from mae_et.models.mae import MaskedAutoencoder, build_mae
from mae_et.models.targets import normalize_patches, patchify
from mae_et.optim import param_groups

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MASK_RATIO = 0.75
Variants = dict[str, Callable[[], Any]]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time what this project does against plain references, alternating in one process.",
        epilog="example: python tools/bench.py step --threads 2 --json benchmarks/step.json; trust ratios to 10%%",
    )
    parser.add_argument(
        "what",
        choices=BENCHES,
        help="lowfreq: the crop; step: one pre-training step; stages: images/s; finetune: whole loops, ours and timm's, with "
        "decoding and augmentation; extract: tools/extract.py against the forward pass alone",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads; default: 1")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"measured rounds; default: {DEFAULT_ROUNDS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw times, e.g. benchmarks/NAME.json")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.threads < 1 or (args.rounds is not None and args.rounds < 1):
        raise UserError("--threads and --rounds must be at least 1")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"no such folder: {args.json.parent}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    bench, rounds = BENCHES[args.what]
    comparisons = bench(args.rounds or rounds)
    print(table(comparisons))
    if args.json:
        record = {"what": args.what, "machine": machine, "load_at_end": os.getloadavg(), "comparisons": comparisons}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written: {args.json}")


# ---- measuring ----


class Times(NamedTuple):
    """Seconds of each run."""

    wall: list[float]
    cpu: list[float]  # of all threads: what other processes take does not count, waiting threads do


def measure(variants: Variants, rounds: int) -> dict[str, Times]:
    """Runs the variants in turn, round after round, each round in the opposite order of the one before.

    Returns:
        The times by variant. The first round is not kept.
    """
    times = {name: Times([], []) for name in variants}
    for i in range(rounds + 1):
        for name in list(variants)[:: -1 if i % 2 else 1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            variants[name]()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            if i:
                times[name].wall.append(seconds)
                times[name].cpu.append(cpu_seconds)
    return times


def compare(
    title: str, times: dict[str, Times], ours: str, reference: str, goal: float | None, work: float = 1.0
) -> dict[str, Any]:
    """Returns a row of the table.

    Args:
        title: of the row.
        times: as from `measure`.
        ours, reference: variants.
        goal: of the ratio reference / ours of the median times a unit of work; None: for information.
        work: units of work of ours for one of the reference's (images, where the batches differ).
    """
    a, b = times[ours], times[reference]
    ratio = work * statistics.median(b.wall) / statistics.median(a.wall)
    return {
        "title": title,
        "ours_ms": {"median": 1e3 * statistics.median(a.wall), "min": 1e3 * min(a.wall)},
        "reference_ms": {"median": 1e3 * statistics.median(b.wall), "min": 1e3 * min(b.wall)},
        "ratio": ratio,
        "ratio_of_minima": work * min(b.wall) / min(a.wall),
        "ratio_of_cpu_time": work * statistics.median(b.cpu) / statistics.median(a.cpu),
        "goal": goal,
        "met": None if goal is None else ratio >= goal,
        "raw_ms": {
            f"{name}, {kind}": [1e3 * t for t in getattr(side, kind)]
            for name, side in (("ours", a), ("reference", b))
            for kind in Times._fields
        },
    }


def table(comparisons: list[dict[str, Any]]) -> str:
    rows = [["", "ours ms: median", "min", "reference ms: median", "min", "ratio", "minima", "CPU", "goal", ""]]
    for c in comparisons:
        numbers = [c[side][kind] for side in ("ours_ms", "reference_ms") for kind in ("median", "min")]
        goal = ["", ""] if c["goal"] is None else [f">= {c['goal']:g}", "met" if c["met"] else "MISSED"]
        ratios = [f"{c[key]:.2f}" for key in ("ratio", "ratio_of_minima", "ratio_of_cpu_time")]
        rows.append([c["title"], *(f"{number:.1f}" for number in numbers), *ratios, *goal])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    legend = "ratio: reference over ours, of the medians; minima: of the fastest runs; CPU: of the median CPU times"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], legend])


def describe_machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load": round(os.getloadavg()[0], 2),
    }


# ---- the low-frequency crop ----


def fft_crop(images: Tensor, bandwidth: int) -> Tensor:
    """The definition: DFT, keep the centred block, scale, inverse DFT, real part."""
    height, width = images.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    top, left = height // 2 - bandwidth // 2, width // 2 - bandwidth // 2
    block = torch.fft.ifftshift(spectrum[..., top : top + bandwidth, left : left + bandwidth], dim=(-2, -1))
    return torch.fft.ifft2(block * (bandwidth**2 / (height * width))).real


def bench_lowfreq(rounds: int) -> list[dict[str, Any]]:
    pixels = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = pixels.float().div(255).sub(mean).div(std)
    rows = []
    for bandwidth, goal, bicubic_goal in ((96, 7.5, 1.0), (128, None, 1.0), (160, 5.0, None), (192, 3.7, None)):
        variants: Variants = {
            "published": partial(low_frequency_crop, images, bandwidth),
            "centered": partial(low_frequency_crop, images, bandwidth, centered=True),
            "fft": partial(fft_crop, images, bandwidth),
            "bicubic": partial(F.interpolate, images, (bandwidth, bandwidth), mode="bicubic", antialias=True),
        }
        check_equal(f"crop to {bandwidth}", variants["published"](), variants["fft"](), 1e-5)
        times = measure(variants, rounds)
        for ours in ("published", "centered"):
            rows.append(compare(f"224 -> {bandwidth}, {ours}, against FFT", times, ours, "fft", goal))
            rows.append(compare(f"224 -> {bandwidth}, {ours}, against bicubic", times, ours, "bicubic", bicubic_goal))
    decoded = pixels.permute(0, 2, 3, 1).contiguous()  # rows of RGB pixels, as decoders give them
    for layout, batch, goal in (("HWC", decoded.permute(0, 3, 1, 2), 10.0), ("CHW", pixels, None)):
        variants = {
            "published": partial(crop_and_normalize, batch, 96, MEAN, STD),
            "centered": partial(crop_and_normalize, batch, 96, MEAN, STD, centered=True),
            "fft": partial(normalize_then_fft, batch, mean, std),
        }
        check_equal("fused crop", variants["published"](), variants["fft"](), 1e-5)
        times = measure(variants, rounds)
        for ours in ("published", "centered"):
            title = f"uint8 {layout} -> normalised 96, {ours}, against normalise + FFT"
            rows.append(compare(title, times, ours, "fft", goal))
    return rows


def normalize_then_fft(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """What ToTensor and Normalize do to each image, then the crop of the batch."""
    images = [image.contiguous().float().div(255).sub(mean).div(std) for image in pixels]
    return fft_crop(torch.stack(images), 96)


def check_equal(what: str, ours: Tensor, reference: Tensor, tolerance: float) -> None:
    error = ((ours - reference).abs().max() / reference.abs().max()).item()
    if not error <= tolerance:
        raise UserError(
            f"{what}: ours differs from the reference by {error:.2g} of its largest value, above {tolerance:g}"
        )


# ---- the training step ----


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
    mask = torch.ones(n, num_patches)
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


def our_step(model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    model(images, MASK_RATIO)[0].backward()
    torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad()


def plain_step(model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    loss = plain_loss(model, images, torch.rand(len(images), model.pos_embed.shape[1] - 1))
    loss.item()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def bench_step(rounds: int) -> list[dict[str, Any]]:
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


# ---- the stages ----


def bench_stages(rounds: int, num_images: int = 32) -> list[dict[str, Any]]:
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


# ---- fine-tuning and extraction, with files and loaders ----

NUM_CLASSES = 10


def write_images(folder: Path, num_images: int, side: int) -> Path:
    """Writes scenes as JPEG files in a folder for each class."""
    from mae_et.data.sources import open_source

    source = open_source(f"scenes:{num_images}@{side},seed=1")
    assert source.labels is not None
    for i in range(num_images):
        path = folder / f"class_{source.labels[i]}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.load(i).save(path, quality=90)
    return folder


def our_finetuning(folder: Path, size: int, batch: int, num_steps: int, num_workers: int) -> Callable[[], Any]:
    """Returns a function that trains `num_steps` steps in the loop of mae_et.train, without saving."""
    from mae_et import train as loop
    from mae_et.classifier import build_classifier, build_optimizer
    from mae_et.classify import ClassifyObjective, preprocess
    from mae_et.config import ClassifyConfig, from_dict
    from mae_et.curriculum import make_plan
    from mae_et.data.loader import make_loader
    from mae_et.data.sources import open_source
    from mae_et.data.transforms import make_train_transform
    from mae_et.distributed import join_world

    source = open_source(str(folder))
    amount = num_steps * batch / len(source)
    values = {
        "data": {
            "train": str(folder), "val": str(folder), "image_size": size,
            "augmentation": {"ramp": "randaugment", "min_scale": 0.08, "color_jitter": 0.0},
        },
        "model": {"size": "tiny", "drop_path_rate": 0.1},
        "curriculum": {"preset": "constant", "equivalent_epochs": amount, "warmup_equivalent_epochs": amount / 20},
        "batch": {"global_batch_size": batch},
        "optimizer": {"base_lr": 1e-6, "layer_decay": 0.65, "betas": [0.9, 0.999]},
        "run": {"precision": "fp32"},
    }  # fmt: skip
    config = from_dict(ClassifyConfig, values)
    plan = make_plan(config, len(source))
    assert plan.num_steps == num_steps
    model = build_classifier(config, NUM_CLASSES)
    optimizer = build_optimizer(config, model)
    transform = make_train_transform(config.data)

    def run() -> None:
        objective = ClassifyObjective(config, NUM_CLASSES, torch.device("cpu"))
        quiet = unittest.mock.patch.object(loop, "save_checkpoint")
        with tempfile.TemporaryDirectory() as work_dir, join_world("cpu") as world, quiet:
            loop.train(
                plan, model, objective, optimizer,
                lambda first: make_loader(source, transform, plan, 0, first, 0, num_workers),
                partial(preprocess, config=config), config.run, world, Path(work_dir),
            )  # fmt: skip

    return run


def timm_finetuning(
    folder: Path, size: int, batch: int, num_steps: int, num_workers: int, prefetcher: bool
) -> Callable[[], Any]:
    """The same recipe as timm's training script goes about it; with its prefetcher, images are mixed before they are floats."""
    from timm.data import FastCollateMixup, Mixup, auto_augment, create_dataset, create_loader
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    from mae_et.data.transforms import posterize

    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize  # timm's own fails now and then under Pillow 13
    mixing = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "num_classes": NUM_CLASSES}
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, num_classes=NUM_CLASSES, drop_path_rate=0.1, global_pool="avg"
    ).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-6, weight_decay=0.05, layer_decay=0.65)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=num_steps, warmup_t=max(1, num_steps // 20), t_in_epochs=False, warmup_lr_init=0
    )
    criterion = SoftTargetCrossEntropy()
    mixup = None if prefetcher else Mixup(**mixing)

    def run() -> None:
        loader = create_loader(
            create_dataset("", root=str(folder)), input_size=(3, size, size), batch_size=batch, is_training=True,
            re_prob=0.25, re_mode="pixel", scale=(0.08, 1.0), auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.0,
            interpolation="bicubic", num_workers=num_workers, persistent_workers=num_workers > 0,
            collate_fn=FastCollateMixup(**mixing) if prefetcher else None, use_prefetcher=prefetcher,
            device=torch.device("cpu"),
        )  # fmt: skip
        step = 0
        while step < num_steps:
            for images, targets in loader:
                if mixup is not None:
                    images, targets = mixup(images, targets)
                loss = criterion(model(images), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                scheduler.step_update(step)
                if step == num_steps:
                    break
        loss.item()

    return run


def bench_finetune(rounds: int, num_steps: int = 8, batch: int = 32) -> list[dict[str, Any]]:
    logging.getLogger("timm").setLevel(logging.WARNING)
    logging.getLogger("mae_et").setLevel(logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_images(Path(temporary), num_steps * batch, 160)
        for size, num_workers in ((96, 0), (96, 1)):
            shared = (folder, size, batch, num_steps, num_workers)
            variants: Variants = {
                "ours": our_finetuning(*shared),
                "timm": timm_finetuning(*shared, prefetcher=False),
                "timm, prefetcher": timm_finetuning(*shared, prefetcher=True),
            }
            times = measure(variants, rounds)
            title = f"{num_steps} steps of ViT-tiny at {size}, batch {batch}, loader processes {num_workers}, against "
            rows += [compare(title + name, times, "ours", name, 1.0) for name in ("timm", "timm, prefetcher")]
    return rows


def bench_extract(rounds: int, num_images: int = 128, batch: int = 32) -> list[dict[str, Any]]:
    """Features of image files on disk, from the command line's words to the finished file, against the network alone."""
    import extract

    from mae_et.export import random_encoder, write_backbone

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_images(Path(temporary) / "images", num_images, 160)
        for size, image_size, num_workers in (("tiny", 160, 0), ("tiny", 160, 1), ("small", 160, 0)):
            model = random_encoder(image_size, size=size).eval()
            path = Path(temporary) / f"{size}.safetensors"
            write_backbone(model.state_dict(), path, "timm", {"image_size": str(image_size)})
            words = [path, folder, "--out", path.with_suffix(".npy"), "--batch-size", batch, "--device", "cpu"]
            args = extract.make_parser().parse_args([*map(str, words), "--num-workers", str(num_workers)])
            images = torch.randn(num_images, 3, image_size, image_size)

            def ours(args: argparse.Namespace = args) -> None:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    extract.main(args)

            @torch.inference_mode()
            def bare(model: Any = model, images: Tensor = images) -> None:
                for part in images.split(batch):
                    model.forward_features(part)[:, 1:].mean(dim=1)

            times = measure({"ours": ours, "bare": bare}, rounds)
            title = f"{num_images} files, ViT-{size} at {image_size}, loader processes {num_workers}, against the forward pass"
            rows.append(compare(title, times, "ours", "bare", 0.9))
    return rows


BENCHES: dict[str, tuple[Callable[[int], list[dict[str, Any]]], int]] = {
    "lowfreq": (bench_lowfreq, 15),
    "step": (bench_step, 9),
    "stages": (bench_stages, 7),
    "finetune": (bench_finetune, 5),
    "extract": (bench_extract, 5),
}
DEFAULT_ROUNDS = ", ".join(f"{rounds} for {name}" for name, (_, rounds) in BENCHES.items())


if __name__ == "__main__":
    run_tool(main, make_parser())
