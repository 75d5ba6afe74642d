"""Supervised steps: each backbone at smaller sizes against counted FLOPs, and whole loops against timm's way of training."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benches.files import write_images
from benches.measuring import Comparison, Variants, compare, measure
from timm.data import Mixup, auto_augment, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from mae_et.config.schema import from_dict
from mae_et.config.supervised import SupervisedConfig
from mae_et.curriculum.plan import make_plan
from mae_et.data.replay import make_stream
from mae_et.data.sources.spec import open_source
from mae_et.data.transforms import make_train_transform, posterize
from mae_et.engine.distributed import join_world
from mae_et.engine.trainer import Trainer, TrainerSettings
from mae_et.models.timm_backbone import create_backbone, forward_flops, meta_backbone
from mae_et.tasks.supervised import SupervisedTask

FAMILIES = (
    "resnet50", "convnext_tiny", "deit_small_patch16_224", "pvt_small", "swin_tiny_patch4_window7_224", "cswin_tiny_224",
    "caformer_s18",
)  # fmt: skip
NUM_CLASSES = 10
FULL_SIZE_BATCH = 4  # images; smaller sizes get as many as have the same number of pixels


def size_step(name: str, size: int, batch: int) -> Callable[[], Any]:
    """Returns a function that makes forward and backward passes in bf16 autocast."""
    model = create_backbone(name, size, num_classes=1000).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def bench_sizes(rounds: int) -> list[Comparison]:
    rows = []
    for name in FAMILIES:
        batches = {size: FULL_SIZE_BATCH * 224**2 // size**2 for size in (96, 160, 224)}
        times = measure({str(size): size_step(name, size, batch) for size, batch in batches.items()}, rounds)
        network = meta_backbone(name, 224)
        flops = {size: batch * forward_flops(network, size) for size, batch in batches.items()}
        for size in (96, 160):
            title = f"{name}: speed at {size} px over that at 224 px, as a share of the ratio of FLOPs"
            rows.append(compare(title, times, str(size), "224", None, work=flops[size] / flops[224]))
    return rows


def our_training(name: str, folder: Path, size: int, batch: int, num_steps: int) -> Callable[[], Any]:
    """Returns a function that trains `num_steps` steps with our trainer, from the model's initial weights."""
    amount = num_steps * batch / len(open_source(str(folder)))
    values = {
        "data": {"train": str(folder), "image_size": size, "num_workers": 0},
        "model": {"name": name},
        "curriculum": {"preset": "constant", "equivalent_epochs": amount, "warmup_equivalent_epochs": amount / 20},
        "batch": {"global_batch_size": batch},
        "optimizer": {"base_lr": 1e-6},
        "run": {"precision": "fp32", "save_interval": 10**9},
    }
    config = from_dict(SupervisedConfig, values)
    data = SupervisedTask.open_data(config)
    plan = make_plan(config, SupervisedTask.cost(config), len(data.train))
    assert plan.num_steps == num_steps

    def run() -> None:
        with tempfile.TemporaryDirectory() as work_dir, join_world("cpu") as world:
            task = SupervisedTask(config, data, plan, world, Path(work_dir))
            stream = make_stream(data.train, make_train_transform(config.data), plan, config)
            trainer = Trainer(plan, task, task.optimizer, stream, world, TrainerSettings(config.run, Path(work_dir)))
            trainer.save = lambda: None  # type: ignore[method-assign]  # the reference saves nothing
            trainer.fit()

    return run


def timm_training(name: str, folder: Path, size: int, batch: int, num_steps: int) -> Callable[[], Any]:
    """The same recipe with timm's loader, mixup, loss, optimizer and scheduler, in the order of its training script."""
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize  # timm's own fails now and then under Pillow 13
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=NUM_CLASSES)
    criterion = SoftTargetCrossEntropy()

    def run() -> None:
        model = create_backbone(name, size, num_classes=NUM_CLASSES).train()
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-6, weight_decay=0.05)
        scheduler = CosineLRScheduler(
            optimizer, t_initial=num_steps, warmup_t=max(1, num_steps // 20), t_in_epochs=False, warmup_lr_init=0
        )
        loader = create_loader(
            create_dataset("", root=str(folder)), input_size=(3, size, size), batch_size=batch, is_training=True,
            re_prob=0.25, re_mode="pixel", scale=(0.08, 1.0), auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.0,
            interpolation="bicubic", num_workers=0, persistent_workers=False, use_prefetcher=False,
            device=torch.device("cpu"),
        )  # fmt: skip
        for step, (images, targets) in enumerate(loader, 1):
            images, targets = mixup(images, targets)
            loss = criterion(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step_update(step)
        loss.item()

    return run


def bench_supervised(rounds: int, num_steps: int = 6, batch: int = 32) -> list[Comparison]:
    for name in ("timm", "mae_et"):
        logging.getLogger(name).setLevel(logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_images(Path(temporary), num_steps * batch, 160)
        for name in ("vit_tiny_patch16_224", "resnet18"):
            shared = (name, folder, 96, batch, num_steps)
            variants: Variants = {"ours": our_training(*shared), "timm": timm_training(*shared)}
            title = f"{num_steps} steps of {name} at 96 px, batch {batch}, fp32, files and loader, against timm"
            rows.append(compare(title, measure(variants, rounds), "ours", "timm", 1.0))
    return rows + bench_sizes(rounds)
