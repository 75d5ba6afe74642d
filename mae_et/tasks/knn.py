"""kNN accuracy of a backbone's features: no training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.config.schema import ClassifyConfig
from mae_et.data.stream import choose_num_workers
from mae_et.engine.distributed import join_world
from mae_et.engine.precision import autocast_dtype
from mae_et.errors import ConfigError, DataError
from mae_et.evaluation.classification import write_verdict
from mae_et.evaluation.collect import collect
from mae_et.evaluation.knn import knn_predict
from mae_et.models.linear_probe import pooled
from mae_et.runs.folder import RunFolder
from mae_et.runs.provenance import describe_weights, peak_memory_mb
from mae_et.runs.records import KnnSummary, write_record
from mae_et.tasks.classification import open_labelled, preprocess
from mae_et.tasks.classifier import Backbone, build_encoder, open_backbone
from mae_et.tasks.resolve import with_precision
from mae_et.tasks.run import TaskData, inspect_data


def judge_by_knn(
    config: ClassifyConfig, work_dir: str | Path, resume: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Extracts the features of both splits and classifies data.val by the nearest neighbours in data.train.

    Args, returns and raises: as for `classify`.
    """
    with join_world(device) as world:
        config = with_precision(config, world.device)
        data = open_labelled(config)
        if max(config.knn.ks) > len(data.train):
            raise ConfigError(
                [f"knn.ks: k = {max(config.knn.ks)} exceeds the {len(data.train)} labelled images of data.train"]
            )
        backbone = open_backbone(config)
        with RunFolder(Path(work_dir), config, world) as folder:
            folder.check_unused(resume)
            world.barrier()  # every process has looked before the main one writes
            if world.is_main:
                folder.describe()
            findings = inspect_data(data, config.data, world)
            return _knn(config, folder, data, backbone, findings)


def _knn(
    config: ClassifyConfig, folder: RunFolder, data: TaskData, backbone: Backbone | None, findings: dict[str, Any]
) -> dict[str, Any]:
    world, work_dir, class_names = folder.world, folder.path, list(data.class_names)
    train_source, val_source = data.train, data.val
    assert val_source is not None  # `open_labelled` opened it
    initial_weights = describe_weights(config.backbone)
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(config, backbone).to(world.device).eval()
    dtype = autocast_dtype(config.run.precision, world.device)
    num_workers = choose_num_workers(config.data.num_workers, world.local_size, world.device.type == "cuda")

    def features(images: Tensor) -> Tensor:
        with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
            return pooled(encoder, preprocess(images, config.data.image_size, config), config.model.pool)

    start = time.perf_counter()
    bank, queries = (
        collect(features, source, range(len(source)), config.data, world, num_workers, title, gather)
        for source, title, gather in (
            (train_source, "training features", False),
            (val_source, "validation features", True),
        )
    )
    extracted = time.perf_counter()
    if max(config.knn.ks) > len(bank.labels):
        raise DataError(
            f"only {len(bank.labels)} images of data.train can be read, fewer than the {max(config.knn.ks)} neighbours of "
            "knn.ks: lower k or fix the images"
        )
    predictions = knn_predict(
        bank.outputs, bank.labels, queries.outputs, config.knn.ks, config.knn.temperature, len(class_names), world,
        bank.batch_sizes,
    )  # fmt: skip
    if not world.is_main:
        return {}
    top1 = {k: float((predicted == queries.labels).double().mean()) for k, predicted in predictions.items()}
    k = 20 if 20 in top1 else config.knn.ks[0]
    votes = F.one_hot(predictions[k], len(class_names)).float()
    done = time.perf_counter()
    record = KnnSummary(
        **write_verdict(votes, queries.labels, class_names, work_dir, top5=False),
        k=k,
        top1_by_k=top1,
        temperature=config.knn.temperature,
        initial_weights=initial_weights,
        num_train=len(bank.labels),
        unreadable_train_images=len(bank.bad_images),
        unreadable_val_images=len(queries.bad_images),
        seconds=done - start,
        feature_seconds=extracted - start,
        knn_seconds=done - extracted,
        peak_memory_mb=peak_memory_mb(),
        data_findings=findings,
    )
    write_record(work_dir / "summary.json", record)
    return record.model_dump(mode="json")
