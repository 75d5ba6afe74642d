"""Writes small run folders as the tools do, with every number known."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from mae_et.evaluation.classification import wilson_interval
from mae_et.runs.records import (
    ClassifierSummary,
    DenseSummary,
    InitialWeights,
    KnnSummary,
    PretrainSummary,
    SupervisedSummary,
    TestSummary,
)  # fmt: skip

CPU = {
    "record_version": 2, "command": ["tools/pretrain.py"], "mae_et": "0.1.0", "python": "3.11", "torch": "2.11", "timm": "1",
    "numpy": "2", "platform": "Linux", "processor": "x86_64", "device": "cpu", "cuda": None, "num_threads": 1, "world_size": 1,
}  # fmt: skip
CONSTANT, ETPP = [32], [16, 24, 32]


def digest(name: str) -> str:
    """Returns a made-up digest that depends on the name."""
    return (name.encode().hex() * 64)[:64]


def write(folder: Path, **files: Any) -> Path:
    """Writes JSON files (by stem), `config` as config.py, `metrics` as metrics.jsonl; None leaves a file out."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        if content is None:
            continue
        if stem == "config":
            text = "".join(f"{key} = {value!r}\n" for key, value in content.items())
            (folder / "config.py").write_text(f'"""A config."""\n\n{text}', encoding="utf-8")
        elif stem == "metrics":
            (folder / "metrics.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in content), encoding="utf-8"
            )
        else:
            (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def pretrain(
    folder: Path,
    *,
    seed: int = 0,
    bands: list[int] = CONSTANT,
    epochs: float = 4.0,
    baseline: float = 4.0,
    seconds: float = 100.0,
    data: str = "data/photos/train",
    knn: float = 0.3,
    finished: bool = True,
    **config: Any,
) -> Path:
    """A pre-training; `**config` are dotted keys with "__" for "."."""
    images = [int(epochs * 100 / len(bands) * (32 / band) ** 2) for band in bands]
    stages = [stage(band, count) for band, count in zip(bands, images, strict=True)]
    values: dict[str, Any] = {
        "data": {"train": data, "image_size": 32},
        "model": {"size": "tiny", "patch_size": 8, "embed_dim": 48, "depth": 3, "norm_pix_loss": True},
        "curriculum": {
            "preset": "constant" if len(bands) == 1 else "etpp",
            "equivalent_epochs": epochs,
            "baseline_equivalent_epochs": baseline,
        },
        "optimizer": {"base_lr": 0.001},
        "run": {"seed": seed, "log_interval": 1},
    }
    for key, value in config.items():
        part, name = key.split("__")
        values.setdefault(part, {})[name] = value
    lines = [
        {
            "step": step,
            "stage": 0,
            "bandwidth": bands[0],
            "compute_fraction": step / 10,
            "equivalent_epochs": epochs * step / 10,
            "loss": 1 / step,
            "lr": 0.001,
            "strength": 1.0,
            "seconds": seconds * step / 10,
        }
        for step in (2, 4, 6, 8, 10)
    ]
    lines.append({"step": 5, "knn/top1": knn})
    lines += [{"step": step, **{f"val/band_error_{k}": 1 - step * (8 - k) / 100 for k in range(8)}} for step in (5, 10)]
    record = PretrainSummary(
        **training(seconds, stages, epochs, baseline),
        initial_weights=None,
        encoder_sha256=digest(folder.name),
        knn_top1_before=0.1,
        knn_top1_after=knn,
    )
    write(
        folder,
        config=values,
        environment=CPU,
        plan={"stages": [{"bandwidth": one["bandwidth"], "num_images": one["num_images"]} for one in stages],
              "dataset_size": 100},
        metrics=lines if finished else lines[:2],
        summary=record.model_dump(mode="json") if finished else None,
    )  # fmt: skip
    if not finished:
        age(folder)
    return folder


def edit(folder: Path, **values: Any) -> None:
    """Changes fields of summary.json without the checks of its schema."""
    summary = json.loads((folder / "summary.json").read_text())
    write(folder, summary={**summary, **values})


def age(folder: Path, seconds: float = 7200.0) -> None:
    """Sets the times of all files back, as of a run that stopped."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - seconds,) * 2)


def stage(bandwidth: int, num_images: int) -> dict[str, Any]:
    return {
        "bandwidth": bandwidth, "num_steps": 5, "num_images": num_images, "num_fresh_images": num_images,
        "load_reduction": 1.0, "seconds": 1.0, "images_per_second": 1.0, "waiting_fraction": 0.0, "petaflops": 0.1,
        "tflops_per_second": 0.1, "mfu": None, "speed_over_full_size": None, "ideal_by_area": 1.0, "ideal_by_flops": None,
        "speed_over_ideal_by_area": None, "speed_over_ideal_by_flops": None,
    }  # fmt: skip


def training(seconds: float, stages: list[dict[str, Any]], epochs: float, baseline: float) -> dict[str, Any]:
    """Returns the fields of a `TrainingSummary`."""
    num_images = sum(one["num_images"] for one in stages)
    return {
        "seconds": seconds, "peak_memory_mb": None, "num_steps": 10, "num_images": num_images,
        "num_fresh_images": num_images, "refilled_images": 0, "refill_seconds": 0.0, "load_reduction": 1.0,
        "dataset_size": 100, "equivalent_epochs": epochs, "real_epochs": num_images / 100,
        "train_petaflops": epochs / 1000, "images_per_second": num_images / seconds, "waiting_fraction": 0.0,
        "tflops_per_second": 0.1, "mfu": None, "peak_tflops": None, "stages": stages,
        "baseline_equivalent_epochs": baseline, "nominal_speedup": baseline / epochs,
        "nominal_speedup_flops": baseline / epochs, "speedup_against_baseline": 1.0, "speedup_over_nominal": None,
        "speedup_over_nominal_flops": None, "first_loss": 0.5, "last_loss": 0.1, "bad_images": 0, "skipped_steps": 0,
        "world_size": 1,
    }  # fmt: skip


def classify(
    folder: Path,
    backbone: str | None,
    top1: float,
    *,
    kind: str = "knn",
    seed: int = 0,
    data: str = "data/flowers",
    num_val: int = 200,
    metadata: dict[str, str] | None = None,
    **config: Any,
) -> Path:
    """A result on labelled images; `backbone` is the folder name of a pre-training."""
    common: dict[str, Any] = {
        "top1": top1, "top1_interval_95": wilson_interval(round(top1 * num_val), num_val), "num_val": num_val,
        "num_classes": 10, "unreadable_val_images": 0, "initial_weights": weights(backbone, metadata),
    }  # fmt: skip
    record: Any
    if kind == "knn":
        record = KnnSummary(
            **common, top5=None, seconds=5.0 + seed, peak_memory_mb=None, k=20, top1_by_k={20: top1}, temperature=0.07,
            num_train=100, unreadable_train_images=0, feature_seconds=4.0, knn_seconds=1.0,
        )  # fmt: skip
    else:
        stages = [stage(32, 300)]
        record = ClassifierSummary(
            **common, **training(5.0 + seed, stages, 3.0, 3.0), kind=kind, top5=min(1.0, top1 + 0.2), top1_history=[]
        )
    values = {
        "protocol": kind,
        "data": {"train": f"{data}/train", "val": f"{data}/val", "image_size": 32},
        "model": {"size": "tiny"},
        "curriculum": {"equivalent_epochs": 3.0},
        "run": {"seed": seed},
        **config,
    }
    return write(folder, summary=record.model_dump(mode="json"), config=values, environment=CPU)


def supervised(
    folder: Path, top1: float, *, bands: list[int] = CONSTANT, epochs: float = 4.0, num_val: int = 200
) -> Path:
    """A supervised training of Swin-T on "imagenet"."""
    stages = [stage(band, 100) for band in bands]
    record = SupervisedSummary(
        **training(50.0 * epochs, stages, epochs, 4.0), initial_weights=None, model="swin_tiny_patch4_window7_224",
        encoder_sha256=digest(folder.name), num_classes=10, top1=top1, num_val=num_val,
        top1_interval_95=wilson_interval(round(top1 * num_val), num_val), top5=min(1.0, top1 + 0.2),
    )  # fmt: skip
    values = {
        "data": {"train": "data/imagenet/train", "val": "data/imagenet/val", "image_size": 32},
        "model": {"name": "swin_tiny_patch4_window7_224"},
        "curriculum": {
            "preset": "constant" if len(bands) == 1 else "etpp",
            "equivalent_epochs": epochs,
            "baseline_equivalent_epochs": 4.0,
        },
        "run": {"seed": 0},
    }
    plan = {"stages": [{"bandwidth": one["bandwidth"], "num_images": one["num_images"]} for one in stages],
            "dataset_size": 100}  # fmt: skip
    return write(folder, summary=record.model_dump(mode="json"), config=values, environment=CPU, plan=plan)


def weights(backbone: str | None, metadata: dict[str, str] | None = None, path: str | None = None) -> Any:
    """The weights of a pre-training's folder; None: random."""
    if backbone is None:
        return None
    path = path or f"work_dirs/{backbone}/backbone.safetensors"
    sha256 = digest(f"file of {backbone}")
    return InitialWeights(file=path, sha256=sha256, encoder_sha256=digest(backbone), metadata=metadata or {})


def dense(
    folder: Path,
    task: str,
    metrics: dict[str, Any],
    backbone: str | None,
    *,
    data: str = "photos_coco",
    tta: bool | None = None,
    trained: str | None = None,
    seed: int = 0,
    num_val: int = 50,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A work dir of tools/train.py, or with `tta` given one of tools/test.py."""
    common: dict[str, Any] = {
        "kind": task, "metrics": metrics, "initial_weights": weights(backbone, metadata),
        "weights_sha256": digest(trained or folder.name), "model": "MaskRCNN", "backbone_type": "ViTDet", "data": data,
        "data_splits": {"val": "annotations/val.json"}, "max_iters": 100, "seed": seed, "num_val": num_val,
        "config": "demo.py", "world_size": 1, "seconds": 9.0, "peak_memory_mb": 100.0,
    }  # fmt: skip
    if tta is not None:
        name = "test_summary_tta" if tta else "test_summary"
        test = TestSummary(**common, tta=tta, checkpoint="iter_100.pth")
        return write(folder, **{name: test.model_dump(mode="json")})
    record = DenseSummary(
        **common, all_metrics=[], num_steps=100, num_steps_this_process=100, first_loss=3.0, last_loss=1.5,
        images_per_second=1.0, train_seconds=8.0,
    )  # fmt: skip
    return write(folder, summary=record.model_dump(mode="json"), environment=CPU)


def box_metrics(ap: float) -> dict[str, float | None]:
    """COCO's twelve numbers, from 0 to 1; None where there is no such object."""
    found: dict[str, float | None] = {}
    for part in ("bbox", "segm"):
        for i, suffix in enumerate(("", "_50", "_75", "_s", "_m")):
            found[f"coco/{part}_mAP{suffix}"] = round(ap + i / 100, 4)
        found[f"coco/{part}_mAP_l"] = None
    return found


def example(root: Path) -> Path:
    """Two curricula at two and three seeds, results of every kind, and one of each trouble."""
    for seed in (0, 1, 2):
        pretrain(root / f"etpp_{seed}", seed=seed, bands=ETPP, epochs=2.0, seconds=50.0 + seed, knn=0.4 + seed / 100)
        classify(root / f"etpp_{seed}_knn", f"etpp_{seed}", 0.50 + seed / 100)
    for seed in (0, 1):
        pretrain(root / f"constant_{seed}", seed=seed, seconds=100.0 + 4 * seed)
        classify(root / f"constant_{seed}_knn", f"constant_{seed}", 0.47 + seed / 50)
        classify(root / f"constant_{seed}_linear", f"constant_{seed}", 0.4, kind="linear_probe")
    classify(root / "random_knn", None, 0.2)
    classify(root / "etpp_0_linear", "etpp_0", 0.45, kind="linear_probe")
    dense(root / "etpp_0_detection", "detection", box_metrics(0.31), "etpp_0")
    dense(
        root / "etpp_0_segmentation",
        "segmentation",
        {"mIoU": 33.5, "mAcc": 40.0, "aAcc": 70.0},
        "etpp_0",
        data="ade_small",
    )
    dense(
        root / "etpp_0_segmentation_tta",
        "segmentation",
        {"mIoU": 34.5, "mAcc": 41.0, "aAcc": 71.0},
        "etpp_0",
        data="ade_small",
        tta=True,
        trained="etpp_0_segmentation",
    )
    pretrain(root / "stopped", finished=False, seconds=60.0, optimizer__base_lr=0.002)
    pretrain(root / "running", finished=False, seed=7, seconds=70.0, optimizer__base_lr=0.002)
    os.utime(root / "running" / "metrics.jsonl")
    write(root / "broken", environment=CPU).joinpath("summary.json").write_text('{"status": "fini')
    pretrain(root / "copies" / "etpp_0", seed=0, bands=ETPP, epochs=2.0, seconds=50.0, knn=0.4)
    return root
