"""Whole fine-tuning loops with files and loaders, ours and timm's."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from benches.files import write_images
from benches.measuring import Comparison, Variants, compare, measure
from timm.data import FastCollateMixup, Mixup, auto_augment, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

from mae_et.config.schema import ClassifyConfig, from_dict
from mae_et.curriculum.cost import vit_cost
from mae_et.curriculum.plan import make_plan
from mae_et.data.replay import make_stream
from mae_et.data.sources.spec import open_source
from mae_et.data.transforms import make_train_transform, posterize
from mae_et.engine.distributed import join_world
from mae_et.engine.trainer import Trainer, TrainerSettings
from mae_et.tasks.finetune import FinetuneTask

NUM_CLASSES = 10


def our_finetuning(folder: Path, size: int, batch: int, num_steps: int, num_workers: int) -> Callable[[], Any]:
    """Returns a function that trains `num_steps` steps with our trainer. The model is built and saved once in it."""
    source = open_source(str(folder))
    amount = num_steps * batch / len(source)
    values = {
        "data": {
            "train": str(folder), "val": str(folder), "image_size": size, "num_workers": num_workers,
            "augmentation": {"ramp": "randaugment", "min_scale": 0.08, "color_jitter": 0.0},
        },
        "model": {"size": "tiny", "drop_path_rate": 0.1},
        "curriculum": {"preset": "constant", "equivalent_epochs": amount, "warmup_equivalent_epochs": amount / 20},
        "batch": {"global_batch_size": batch},
        "optimizer": {"base_lr": 1e-6, "layer_decay": 0.65, "betas": [0.9, 0.999]},
        "run": {"precision": "fp32", "save_interval": 10**9},
    }  # fmt: skip
    config = from_dict(ClassifyConfig, values)
    plan = make_plan(config, vit_cost(config.model), len(source))
    assert plan.num_steps == num_steps
    data = FinetuneTask.open_data(config)

    def run() -> None:
        with tempfile.TemporaryDirectory() as work_dir, join_world("cpu") as world:
            task = FinetuneTask(config, data, plan, world, Path(work_dir))
            task.hooks = []  # no evaluation
            stream = make_stream(data.train, make_train_transform(config.data), plan, config)
            Trainer(plan, task, task.optimizer, stream, world, TrainerSettings(config.run, Path(work_dir))).fit()

    return run


def timm_finetuning(
    folder: Path, size: int, batch: int, num_steps: int, num_workers: int, prefetcher: bool
) -> Callable[[], Any]:
    """The same recipe as timm's training script goes about it; with its prefetcher, images are mixed before they are floats."""
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


def bench_finetune(rounds: int, num_steps: int = 8, batch: int = 32) -> list[Comparison]:
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
