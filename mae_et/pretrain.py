"""Pre-training: a PretrainConfig wired into the loop of train.py."""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import mae_et
from mae_et.checkpoint import list_checkpoints, load_newest, load_weights
from mae_et.config import PretrainConfig, changed_keys, to_dict
from mae_et.config_io import save_config
from mae_et.curriculum import Plan, make_plan
from mae_et.data.loader import Batch, default_num_workers, eval_loader, make_loader, reading
from mae_et.data.sources import ImageSource, open_source
from mae_et.data.transforms import TrainTransform
from mae_et.distributed import World, join_world
from mae_et.errors import CheckpointError, DataError, UserError
from mae_et.export import run_metadata, write_backbone
from mae_et.lowfreq import crop_and_normalize
from mae_et.metrics import knn_predict, read_jsonl
from mae_et.models.mae import MaskedAutoencoder, build_mae
from mae_et.optim import param_groups
from mae_et.train import train
from mae_et.train_log import Progress
from mae_et.visualize import NORM_PIX_FOOTER, picture_grid, reconstruct, save_picture

log = logging.getLogger(__name__)

NUM_PICTURES = 6
KNN_BATCH = 256


def pretrain(
    config: PretrainConfig, work_dir: str | Path, resume: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Runs a pre-training from the config to the backbone file.

    Args:
        config: what to do.
        work_dir: gets config.py, plan.json, environment.json, metrics.jsonl, tensorboard/, checkpoints/,
            reconstructions/, backbone.safetensors and summary.json.
        resume: go on from the newest checkpoint there; start anew if the run did not get to its first one.
        device: "cpu" or "cuda"; None: CUDA where there is one.
    Returns:
        The summary, as in summary.json.
    Raises:
        UserError: whatever the user can mend; see errors.py.
    """
    work_dir = Path(work_dir)
    with join_world(device) as world:
        if not world.is_main:
            logging.getLogger("mae_et").setLevel(logging.WARNING)
        return _pretrain(config, work_dir, resume, world)


def _pretrain(config: PretrainConfig, work_dir: Path, resume: bool, world: World) -> dict[str, Any]:
    # ---------------------------------------------------------------- data and plan
    source = open_source(config.data.train, config.model.in_chans)
    val = None if config.data.val is None else open_source(config.data.val, config.model.in_chans, need_labels=True)
    if val is not None and source.labels is None:
        raise DataError(
            f"data.val = {config.data.val!r} asks for a kNN accuracy, but data.train = {config.data.train!r} has no "
            "labels: give labelled training images, or set data.val = None"
        )
    if config.data.num_images not in (None, len(source)):
        log.warning("data.num_images = %d, but data.train holds %d images", config.data.num_images, len(source))
    plan = make_plan(config, len(source), world.size)
    for note in plan.notes:
        log.info("note: %s", note)

    # ---------------------------------------------------------------- the run folder
    identity = {
        "config": to_dict(config),
        "data_fingerprint": _fingerprint(source),
        "dataset_size": len(source),
        "num_steps": plan.num_steps,
        "version": mae_et.__version__,
    }
    state = _open_work_dir(work_dir, resume, identity)
    world.barrier()  # every process has looked before the main one writes
    if world.is_main:
        _clean(work_dir, keep_metrics=state is not None)
        save_config(config, work_dir / "config.py", "The resolved config of this run.")
        _write_json(work_dir / "plan.json", plan.to_dict())
        _write_json(work_dir / "environment.json", _environment(world))

    # ---------------------------------------------------------------- model, optimizer, objective
    torch.manual_seed(config.run.seed)
    model = _build_model(config).to(world.device)
    if config.run.compile:
        model.compile(dynamic=False)  # once for each bandwidth and micro batch
    optimizer = torch.optim.AdamW(
        param_groups(model, config.optimizer.weight_decay),
        lr=0.0,  # the plan's, step by step
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,
    )
    objective = MAEObjective(config.model.mask_ratio, config.run.seed, config.model.dims.patch_size)

    # ---------------------------------------------------------------- loader and hooks
    augmentation = config.data.augmentation
    transform = TrainTransform(
        config.data.image_size,
        ramp=augmentation.ramp,
        min_scale=augmentation.min_scale,
        start_min_scale=augmentation.start_min_scale,
        flip=augmentation.flip,
        max_magnitude=augmentation.max_magnitude,
        color_jitter=augmentation.color_jitter,
    )
    on_gpu = world.device.type == "cuda"
    num_workers = config.data.num_workers
    if num_workers is None:
        num_workers = default_num_workers(world.local_size, on_gpu)

    def loader(first_step: int) -> Iterable[Batch]:
        return make_loader(
            source, transform, plan, config.run.seed, first_step, world.rank, num_workers, pin_memory=on_gpu
        )

    preprocess = partial(_preprocess, config=config)
    hooks: list[Any] = []
    if world.is_main:
        hooks.append(PictureHook(model, val or source, plan, config, work_dir / "reconstructions"))
    if world.is_main and val is not None:
        hooks.append(KnnHook(model, source, val, plan, config, num_workers))

    # ---------------------------------------------------------------- train, export, sum up
    log.info(
        "%s: %d images, %s, %d steps in %d stages at bandwidths %s, on %s",
        work_dir, len(source), describe_model(model), plan.num_steps, len(plan.stages),
        ", ".join(str(stage.bandwidth) for stage in plan.stages), world.device,
    )  # fmt: skip
    progress = train(
        plan, model, objective, optimizer, loader, preprocess, config.run, world, work_dir,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        hooks=hooks,
        identity=identity,
        resume_from=state,
        max_bad_images=int(config.data.max_bad_fraction * len(source)),
        image_name=source.name,
    )  # fmt: skip
    if not world.is_main:
        return {}
    metadata = run_metadata(config, progress.step, plan.num_steps, len(source))
    write_backbone(model.state_dict(), work_dir / "backbone.safetensors", "timm", metadata)
    summary = summarize(plan, progress, read_jsonl(work_dir / "metrics.jsonl"), world)
    _write_json(work_dir / "summary.json", summary)
    return summary


class MAEObjective:
    """Masks patches and predicts them.

    The mask of an image follows from its place in the stream, so it does not depend on how the batch is split over
    processes and accumulation steps.

    Args:
        mask_ratio: fraction removed.
        seed: of the masks.
        patch_size: px.
    """

    def __init__(self, mask_ratio: float, seed: int, patch_size: int) -> None:
        self.mask_ratio, self.seed, self.patch_size = mask_ratio, seed, patch_size

    def __call__(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        num_patches = (images.shape[-2] // self.patch_size) * (images.shape[-1] // self.patch_size)
        loss, _ = model(images, self.mask_ratio, place_noise(batch.places, num_patches, self.seed))
        return loss, {}


def place_noise(places: Tensor, num_patches: int, seed: int) -> Tensor:
    """Returns uniform numbers that depend on (seed, place, patch) alone, the same on every device.

    Args:
        places: [n] int64.
        num_patches: L.
        seed: any int.
    Returns:
        [n, L] float32 in [0, 1).
    Source: the finaliser of SplitMix64, a bijection of 64 bits, applied twice.
    """
    patches = torch.arange(num_patches, device=places.device)
    keys = _mix64(_mix64(places + seed * 0x5851F42D4C957F2D % 2**63)[:, None] + patches)
    return (keys >> 40 & 0xFFFFFF).float() / 2**24


def _mix64(x: Tensor) -> Tensor:
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, None)):
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))  # a logical shift
        x = x if factor is None else x * factor  # wraps around
    return x


class PictureHook:
    """Draws reconstructions of a few fixed images at each stage's end, and every `run.picture_interval` steps."""

    def __init__(
        self, model: MaskedAutoencoder, source: ImageSource, plan: Plan, config: PretrainConfig, folder: Path
    ) -> None:
        self.model, self.plan, self.config, self.folder = model, plan, config, folder
        self.ends = {stage.first_step + stage.num_steps for stage in plan.stages}
        indices = spread(len(source), NUM_PICTURES)
        self.images = next(iter(eval_loader(source, indices, config.data.image_size, NUM_PICTURES))).images

    def __call__(self, step: int, writer: SummaryWriter) -> dict[str, float]:
        interval = self.config.run.picture_interval
        if not (step in self.ends or (interval and step % interval == 0)) or not len(self.images):
            return {}
        data = self.config.data
        columns = reconstruct(
            self.model,
            self.images,
            self.plan.stage_at(max(0, step - 1)).bandwidth,
            data.mean,
            data.std,
            self.config.model.mask_ratio,
            self.config.curriculum.centered,
        )
        footer = NORM_PIX_FOOTER if self.model.norm_pix_loss else ""
        pixels = save_picture(picture_grid(columns, footer), self.folder / f"step_{step:08d}.png")
        writer.add_image("reconstructions", pixels, step, dataformats="HWC")
        return {}


class KnnHook:
    """kNN accuracy of the mean patch feature at full image size, on evenly spread subsets of both splits."""

    def __init__(
        self,
        model: MaskedAutoencoder,
        train_source: ImageSource,
        val_source: ImageSource,
        plan: Plan,
        config: PretrainConfig,
        num_workers: int,
    ) -> None:
        self.model, self.sources, self.plan, self.config = model, (train_source, val_source), plan, config
        self.num_workers = num_workers

    def __call__(self, step: int, writer: SummaryWriter) -> dict[str, float]:
        interval = self.config.run.knn_interval
        if step not in (0, self.plan.num_steps) and not (interval and step % interval == 0):
            return {}
        (bank, bank_labels), (queries, query_labels) = (self._features(source) for source in self.sources)
        predicted = knn_predict(bank, bank_labels, queries, k=min(20, len(bank)))
        return {"knn/top1": float((predicted == query_labels).float().mean())}

    @torch.no_grad()
    def _features(self, source: ImageSource) -> tuple[Tensor, Tensor]:
        size, device = self.config.data.image_size, self.model.cls_token.device
        indices = spread(len(source), self.config.run.knn_max_images)
        features, labels = [], []
        with reading(eval_loader(source, indices, size, KNN_BATCH, self.num_workers)) as batches:
            for batch in batches:
                if len(batch.images):
                    images = _preprocess(batch.images.to(device), size, self.config)
                    features.append(self.model.features(images)[:, 1:].mean(dim=1))  # type: ignore[call-overload]
                    labels.append(batch.labels)
        return torch.cat(features), torch.cat(labels).to(device)


def spread(num: int, most: int) -> np.ndarray:
    """Returns at most `most` indices, evenly spread over range(num)."""
    return np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(np.int64))


def summarize(plan: Plan, progress: Progress, metrics: list[dict[str, Any]], world: World) -> dict[str, Any]:
    """Returns what a finished run cost and reached.

    Speed-ups are measured where a stage at full image size gives the images/s to compare with, else None.
    `speedup_against_baseline` is the time that `baseline_equivalent_epochs` would take at that speed over the time taken.
    """
    stats = [progress.stages[stage.index] for stage in plan.stages]
    rates = [stage.num_images / stage.seconds for stage in stats]
    full = plan.stages[-1].bandwidth == plan.image_size
    full_rate, full_gflops = (rates[-1], plan.stages[-1].gflops_per_image) if full else (None, None)
    stages = [
        {
            "bandwidth": planned.bandwidth,
            "num_steps": planned.num_steps,
            "num_images": stage.num_images,
            "seconds": stage.seconds,
            "images_per_second": rate,
            "waiting_fraction": stage.waiting_seconds / stage.seconds,
            "petaflops": 3 * planned.gflops_per_image * stage.num_images / 1e6,
            "speed_over_full_size": rate / full_rate if full_rate else None,
            "ideal_by_area": (plan.image_size / planned.bandwidth) ** 2,
            "ideal_by_flops": full_gflops / planned.gflops_per_image if full_gflops else None,
        }
        for planned, stage, rate in zip(plan.stages, stats, rates, strict=True)
    ]
    knn = [line["knn/top1"] for line in metrics if "knn/top1" in line]
    losses = [line["loss"] for line in metrics if "loss" in line]
    baseline_images = plan.baseline_equivalent_epochs * plan.dataset_size
    return {
        "status": "finished",
        "seconds": progress.seconds,
        "num_steps": plan.num_steps,
        "num_images": sum(stage.num_images for stage in stats),
        "dataset_size": plan.dataset_size,
        "equivalent_epochs": plan.planned_equivalent_epochs,
        "real_epochs": plan.real_epochs,
        "train_petaflops": sum(stage["petaflops"] or 0 for stage in stages),
        "images_per_second": sum(stage.num_images for stage in stats) / progress.seconds,
        "stages": stages,
        "nominal_speedup": plan.nominal_speedup,
        "nominal_speedup_flops": plan.nominal_speedup_flops,
        "speedup_against_baseline": baseline_images / full_rate / progress.seconds if full_rate else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "knn_top1_before": knn[0] if knn else None,
        "knn_top1_after": knn[-1] if knn else None,
        "bad_images": len(progress.bad_images),
        "skipped_steps": progress.num_skipped,
        "world_size": world.size,
    }


def describe_model(model: nn.Module) -> str:
    """Returns the model's class and size in words."""
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"


def _build_model(config: PretrainConfig) -> MaskedAutoencoder:
    model = build_mae(
        config.model.size,
        **vars(config.model.dims),
        img_size=config.data.image_size,
        in_chans=config.model.in_chans,
        norm_pix_loss=config.model.norm_pix_loss,
        activation_checkpointing=config.run.activation_checkpointing,
    )
    if config.model.init_from is not None:
        load_weights(model, config.model.init_from, may_miss=("decoder_", "mask_token"))
        log.info("weights from %s", config.model.init_from)
    return model


def _preprocess(images: Tensor, bandwidth: int, config: PretrainConfig) -> Tensor:
    return crop_and_normalize(images, bandwidth, config.data.mean, config.data.std, config.curriculum.centered)


def _open_work_dir(work_dir: Path, resume: bool, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the checkpoint to resume from, if there is one; refuses what must not be overwritten."""
    checkpoints = work_dir / "checkpoints"
    if not resume:
        if list_checkpoints(checkpoints):
            raise UserError(f"{work_dir} holds a run already: --resume goes on with it; or choose another --work-dir")
        return None
    if not work_dir.is_dir():
        raise CheckpointError(f"no run to resume: {work_dir} does not exist; start without --resume")
    if not list_checkpoints(checkpoints):
        log.warning("%s holds no checkpoint yet: starting from the first step", work_dir)
        return None
    path, state = load_newest(checkpoints, log.warning)
    if "config" not in state:
        raise CheckpointError(f"{path} is not from a pre-training run")
    changes = changed_keys(state["config"], identity["config"])
    if state["data_fingerprint"] != identity["data_fingerprint"]:
        changes.append(
            f"data.train: other images ({state['dataset_size']} before, {identity['dataset_size']} now, or other names)"
        )
    if changes:
        raise CheckpointError(
            f"{path} was made with another config:\n" + "\n".join(f"  - {change}" for change in changes) + "\n"
            "Undo these changes to resume, or start a new run in another --work-dir (model.init_from takes its weights)"
        )
    log.info("resuming from %s", path)
    return state


def _clean(work_dir: Path, keep_metrics: bool) -> None:
    """Makes the run folder and removes what an earlier start left half done."""
    (work_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    for partial_file in (*work_dir.glob(".*.writing"), *work_dir.glob("checkpoints/.*.writing")):
        partial_file.unlink()
    if not keep_metrics:
        (work_dir / "metrics.jsonl").unlink(missing_ok=True)
        for events in work_dir.glob("tensorboard/events.*"):
            events.unlink()


def _fingerprint(source: ImageSource) -> list[str]:
    """Names that tell a data set from another one, wherever it lies."""
    return [Path(source.name(int(i))).name for i in spread(len(source), 64)] + [str(len(source))]


def _environment(world: World) -> dict[str, Any]:
    gpu = world.device.type == "cuda"
    return {
        "command": sys.argv,
        "mae_et": mae_et.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "cuda": torch.version.cuda if gpu else None,
        "num_threads": torch.get_num_threads(),
        "world_size": world.size,
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
