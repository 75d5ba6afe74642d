"""The bf16 pre-training step on a GPU: against a plain one with the same loss, compiled, and at smaller bandwidths."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benches.measuring import Comparison, Times, Variants, compare, measure
from benches.step import MASK_RATIO, make_optimizer, our_step, plain_step
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mae_et.engine.hardware import peak_tflops
from mae_et.errors import UserError
from mae_et.models.mae import MaskedAutoencoder, build_mae

BANDWIDTHS = (224, 160, 96)
GOALS = {160: 1.95, 96: 5.2}  # of images/s over those at 224: near the ratio of the areas
STEPS = 10  # in one measured time


def synchronized(step: Callable[..., None], *args: Any) -> None:
    """Takes `STEPS` steps and waits for the device once, as a training does."""
    for _ in range(STEPS):
        step(*args, dtype=torch.bfloat16)
    torch.cuda.synchronize()


def add_gpu_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="base", help="of the MAE; default: base")
    parser.add_argument(
        "--num-images", type=int, default=256, metavar="N", help="images of a batch at 224; default: 256"
    )
    parser.add_argument("--compile", action="store_true", help="time the compiled model too; compiling takes minutes")


def bench_gpu(args: argparse.Namespace) -> list[Comparison]:
    """Times the step at each bandwidth with as many tokens a batch. Raises UserError without a GPU."""
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a GPU, and torch finds none")
    device = torch.device("cuda")
    kinds = ("eager", "compiled") if args.compile else ("eager",)
    models = {kind: build_mae(args.size, norm_pix_loss=True).to(device).train() for kind in kinds}
    optimizers = {kind: make_optimizer(model, fused=True) for kind, model in models.items()}
    if args.compile:
        models["compiled"].compile(dynamic=False)
    plain, default = models["eager"], make_optimizer(models["eager"], fused=None)
    batches = {b: round(args.num_images * (224 / b) ** 2) for b in BANDWIDTHS}
    images = {b: torch.randn(n, 3, b, b, device=device) for b, n in batches.items()}
    variants: Variants = {"plain 224": partial(synchronized, plain_step, plain, default, images[224])}
    for b in BANDWIDTHS:
        for kind in kinds:
            variants[f"{kind} {b}"] = partial(synchronized, our_step, models[kind], optimizers[kind], images[b])
    times = measure(variants, args.rounds)
    for b in BANDWIDTHS:
        for kind in kinds:
            print(speed_line(f"{kind} {b}", times, plain, images[b]))
    rows = [compare(f"ViT-{args.size}, {STEPS} steps, eager against plain", times, "eager 224", "plain 224", 1.15)]
    if args.compile:
        for b in BANDWIDTHS:
            title = f"{batches[b]} images at {b}, compiled against eager"
            rows.append(compare(title, times, f"compiled {b}", f"eager {b}", None))
    for kind in kinds:
        for b, goal in GOALS.items():
            title = f"images/s at {b} over 224, {kind}"
            rows.append(compare(title, times, f"{kind} {b}", f"{kind} 224", goal, batches[b] / args.num_images))
    return rows


def speed_line(name: str, times: dict[str, Times], model: MaskedAutoencoder, images: Tensor) -> str:
    """Returns images/s of a variant, and its share of the GPU's peak: the FLOPs of a step count as three forward passes."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images[:1], MASK_RATIO)
    speed = STEPS * len(images) / statistics.median(times[name].wall)
    peak = peak_tflops(torch.cuda.get_device_name(images.device), "bf16")
    share = "" if peak is None else f", {3 * counter.get_total_flops() * speed / (1e12 * peak):.1%} of {peak:g} TFLOP/s"
    return f"{name}: {len(images)} images a step, {speed:,.0f} images/s{share}"
