"""Run folders as the tools leave them, written by the tests: small, and with every number known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CPU = {"device": "cpu", "num_threads": 1, "world_size": 1}
CONSTANT, ETPP = [32], [16, 24, 32]


def digest(name: str) -> str:
    """A made-up digest that depends on the name."""
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
    stages = [{"bandwidth": band, "num_images": count} for band, count in zip(bands, images, strict=True)]
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
        values[part][name] = value
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
    summary = {
        "status": "finished",
        "seconds": seconds,
        "num_steps": 10,
        "num_images": sum(images),
        "dataset_size": 100,
        "equivalent_epochs": epochs,
        "real_epochs": sum(images) / 100,
        "train_petaflops": epochs / 1000,
        "stages": stages,
        "nominal_speedup": baseline / epochs,
        "speedup_against_baseline": 1.0,
        "first_loss": 0.5,
        "last_loss": 0.1,
        "bad_images": 0,
        "skipped_steps": 0,
        "world_size": 1,
        "encoder_sha256": digest(folder.name),
        "knn_top1_before": 0.1,
        "knn_top1_after": knn,
    }
    return write(
        folder,
        config=values,
        environment={"command": ["tools/pretrain.py"], **CPU},
        plan={"stages": stages, "dataset_size": 100},
        metrics=lines if finished else lines[:2],
        summary=summary if finished else None,
    )


def classify(
    folder: Path,
    backbone: str | None,
    top1: float,
    *,
    protocol: str = "knn",
    seed: int = 0,
    data: str = "data/flowers",
    num_val: int = 200,
    with_digest: bool = True,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A result on labelled images; `backbone` is the folder name of a pre-training."""
    known = {"encoder_sha256": digest(backbone), **(metadata or {})} if backbone and with_digest else None
    summary = {
        "protocol": protocol,
        "top1": top1,
        "top5": None if protocol == "knn" else min(1.0, top1 + 0.2),
        "num_val": num_val,
        "num_classes": 10,
        "backbone": None if backbone is None else f"work_dirs/{backbone}/backbone.safetensors",
        "backbone_metadata": known,
        "status": "finished",
        "seconds": 5.0 + seed,
    }
    config = {
        "protocol": protocol,
        "data": {"train": f"{data}/train", "val": f"{data}/val", "image_size": 32},
        "model": {"size": "tiny"},
        "curriculum": {"equivalent_epochs": 3.0},
        "run": {"seed": seed},
    }
    return write(folder, summary=summary, config=config, environment={**CPU})


def dense(
    folder: Path,
    task: str,
    metrics: dict[str, float],
    backbone: str | None,
    *,
    data: str = "photos_coco",
    tta: bool | None = None,
    weights: str | None = None,
    seed: int = 0,
    num_val: int = 50,
) -> Path:
    """A work dir of tools/train.py, or with `tta` given one of tools/test.py."""
    told = {
        "metrics": metrics,
        "backbone": None
        if backbone is None
        else {
            "file": "backbone.safetensors",
            "sha256": digest(f"file of {backbone}"),
            "metadata": {"encoder_sha256": digest(backbone)},
        },
        "weights_sha256": digest(weights or folder.name),
        "task": task,
        "model": "MaskRCNN",
        "backbone_type": "ViTDet",
        "data": data,
        "data_splits": {"val": "annotations/val.json"},
        "max_iters": 100,
        "seed": seed,
        "num_val": num_val,
        "config": "demo.py",
        "device": "cpu",
        "num_processes": 1,
        "seconds": 9.0,
    }
    if tta is None:
        return write(folder, summary={"status": "finished", "num_steps": 100, "last_loss": 1.5, **told})
    name = "test_summary_tta" if tta else "test_summary"
    return write(folder, **{name: {"status": "tested", "tta": tta, "checkpoint": "iter_100.pth", **told}})


def box_metrics(ap: float) -> dict[str, float]:
    """COCO's twelve numbers, from 0 to 1; -1 where there is no such object."""
    found = {}
    for part in ("bbox", "segm"):
        for i, suffix in enumerate(("", "_50", "_75", "_s", "_m")):
            found[f"coco/{part}_mAP{suffix}"] = round(ap + i / 100, 4)
        found[f"coco/{part}_mAP_l"] = -1.0
    return found


def example(root: Path) -> Path:
    """Two curricula at two and three seeds, results of every kind, and one of each trouble."""
    for seed in (0, 1, 2):
        pretrain(root / f"etpp_{seed}", seed=seed, bands=ETPP, epochs=2.0, seconds=50.0 + seed, knn=0.4 + seed / 100)
        classify(root / f"etpp_{seed}_knn", f"etpp_{seed}", 0.50 + seed / 100)
    for seed in (0, 1):
        pretrain(root / f"constant_{seed}", seed=seed, seconds=100.0 + 4 * seed)
        classify(root / f"constant_{seed}_knn", f"constant_{seed}", 0.47 + seed / 50)
        classify(root / f"constant_{seed}_linear", f"constant_{seed}", 0.4, protocol="linear_probe")
    classify(root / "random_knn", None, 0.2)
    classify(root / "etpp_0_linear", "etpp_0", 0.45, protocol="linear_probe")
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
        weights="etpp_0_segmentation",
    )
    pretrain(root / "going_on", finished=False, optimizer__base_lr=0.002)
    write(root / "broken", environment=CPU).joinpath("summary.json").write_text('{"status": "fini')
    pretrain(root / "copies" / "etpp_0", seed=0, bands=ETPP, epochs=2.0, seconds=50.0, knn=0.4)
    return root
