"""Pre-training: a PretrainConfig wired into the loop of train.py."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import mae_et
from mae_et.config.schema import PretrainConfig, to_dict
from mae_et.curriculum.plan import Plan, make_plan
from mae_et.data.replay import ReplayBatches, StoredCrop, check_memory, entry_step
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.spec import check_same_classes, open_source
from mae_et.data.stream import Batch, default_num_workers, eval_loader, make_loader
from mae_et.data.transforms import make_train_transform
from mae_et.engine.distributed import World, join_world
from mae_et.engine.hardware import available_memory
from mae_et.engine.trainer import device_peak_tflops, train
from mae_et.errors import DataError
from mae_et.evaluation.collect import collect
from mae_et.evaluation.metrics import knn_predict
from mae_et.evaluation.pictures import picture_grid, reconstruct, save_picture, target_footer
from mae_et.lowfreq import crop_and_normalize, normalize
from mae_et.models.mae import MaskedAutoencoder, build_mae
from mae_et.models.param_groups import param_groups
from mae_et.models.sizes import hog_cell
from mae_et.runs.folder import describe_model, open_run, spread
from mae_et.runs.provenance import describe_weights
from mae_et.runs.records import PretrainSummary, write_record
from mae_et.runs.summary import summarize, write_stage_scalars
from mae_et.storage.backbone import encoder_digest, write_backbone
from mae_et.storage.checkpoint import load_weights
from mae_et.storage.metrics_file import read_jsonl

log = logging.getLogger(__name__)

NUM_PICTURES = 6


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
    if val is not None:
        check_same_classes(source, val)
    if config.data.num_images not in (None, len(source)):
        log.warning("data.num_images = %d, but data.train holds %d images", config.data.num_images, len(source))
    plan = make_plan(config, len(source), world.size, world.local_size)
    for note in plan.notes:
        log.info("note: %s", note)
    check_memory(plan, available_memory())
    metadata = backbone_metadata(config, plan)
    identity, state = open_run(config, "pretrain", work_dir, resume, source, plan, world, metadata)

    # ---------------------------------------------------------------- model, optimizer, objective
    initial_weights = describe_weights(config.model.init_from)  # now: the file may be gone at the end
    torch.manual_seed(config.run.seed)
    model = build_model(config, with_weights=state is None).to(world.device)
    if config.run.compile:
        model.compile(dynamic=False)  # once for each bandwidth and micro batch
    optimizer = build_optimizer(config, model)
    objective = MAEObjective(config.model.mask_ratio, config.run.seed, config.model.dims.patch_size)

    # ---------------------------------------------------------------- loader and hooks
    transform = make_train_transform(config.data)
    on_gpu = world.device.type == "cuda"
    num_workers = config.data.num_workers
    if num_workers is None:
        num_workers = default_num_workers(world.local_size, on_gpu)

    def loader(first_step: int) -> Iterable[Batch]:
        entry = entry_step(plan, first_step, config.replay.refill)
        crop = StoredCrop(plan, config.curriculum.centered) if plan.replay_bytes else None
        fresh = make_loader(
            source, transform, plan, config.run.seed, entry, world.rank, num_workers, on_gpu, crop, config.data.loading
        )
        if not plan.replay_bytes:
            return fresh
        return ReplayBatches(fresh, plan, config.run.seed, first_step, world.rank, config.replay.refill, on_gpu)

    preprocess = Preprocess(config)
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
    metadata |= {"step": str(progress.step), "num_steps": str(plan.num_steps)}
    write_backbone(model.state_dict(), work_dir / "backbone.safetensors", "timm", metadata)
    metrics = read_jsonl(work_dir / "metrics.jsonl")
    knn = [line["knn/top1"] for line in metrics if "knn/top1" in line] or [None]
    record = PretrainSummary(
        **summarize(plan, progress, metrics, world, device_peak_tflops(config.run.precision, world.device)),
        encoder_sha256=encoder_digest(model.state_dict())["encoder_sha256"],
        initial_weights=initial_weights,
        knn_top1_before=knn[0],
        knn_top1_after=knn[-1],
    )
    write_record(work_dir / "summary.json", record)
    summary = record.model_dump(mode="json")
    write_stage_scalars(summary, plan, work_dir)
    return summary


class Preprocess:
    """uint8 [n, C, S, S] or [n, C, B, B] -> normalised low-frequency crop [n, C, B, B].

    On a CPU, images that come at their bandwidth are all written to the same memory, which is quicker than new pages: the
    result holds until the next call, and a micro batch is done with by then.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.out: Tensor | None = None

    def __call__(self, images: Tensor, bandwidth: int) -> Tensor:
        if images.device.type != "cpu" or images.shape[-2:] != (bandwidth, bandwidth):
            return _preprocess(images, bandwidth, self.config)
        if self.out is None or self.out.shape != images.shape:
            self.out = torch.empty_like(images, dtype=torch.float32)
        return normalize(images, self.config.data.mean, self.config.data.std, self.out)


class MAEObjective:
    """Masks patches and predicts them.

    The mask of an image follows from its place among the images shown, so it does not depend on how the batch is split
    over processes and accumulation steps, and an image that is shown again has another mask.

    Args:
        mask_ratio: fraction removed.
        seed: of the masks.
        patch_size: px.
    """

    def __init__(self, mask_ratio: float, seed: int, patch_size: int) -> None:
        self.mask_ratio, self.seed, self.patch_size = mask_ratio, seed, patch_size

    def __call__(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        num_patches = (images.shape[-2] // self.patch_size) * (images.shape[-1] // self.patch_size)
        places = batch.places if batch.showings is None else batch.showings
        loss, _ = model(images, self.mask_ratio, place_noise(places, num_patches, self.seed))
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
        self.images = next(
            iter(
                eval_loader(
                    source, indices, config.data.image_size, NUM_PICTURES, crop_ratio=config.data.eval_crop_ratio
                )
            )
        ).images

    def due(self, step: int) -> bool:
        interval = self.config.run.picture_interval
        return bool(len(self.images)) and (step in self.ends or bool(interval and step % interval == 0))

    def __call__(self, step: int, writer: SummaryWriter) -> dict[str, float]:
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
        pixels = save_picture(picture_grid(columns, target_footer(self.model)), self.folder / f"step_{step:08d}.png")
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

    def due(self, step: int) -> bool:
        interval = self.config.run.knn_interval
        return step in (0, self.plan.num_steps) or bool(interval and step % interval == 0)

    def __call__(self, step: int, writer: SummaryWriter) -> dict[str, float]:
        (bank, bank_labels), (queries, query_labels) = (self._features(source) for source in self.sources)
        predicted = knn_predict(bank, bank_labels, queries, k=min(20, len(bank)))
        return {"knn/top1": float((predicted == query_labels).float().mean())}

    def _features(self, source: ImageSource) -> tuple[Tensor, Tensor]:
        indices = spread(len(source), self.config.run.knn_max_images)
        seen = collect(self._encode, source, indices, self.config.data, self.model.cls_token.device, self.num_workers)
        return seen.outputs, seen.labels

    def _encode(self, images: Tensor) -> Tensor:
        tokens = self.model.features(_preprocess(images, self.config.data.image_size, self.config))
        return tokens[:, 1:].mean(dim=1)  # type: ignore[call-overload]


def build_model(config: PretrainConfig, with_weights: bool = True) -> MaskedAutoencoder:
    """Builds the model of a config, at random or with the weights of model.init_from if it names any."""
    model = build_mae(
        config.model.size,
        **vars(config.model.dims),
        img_size=config.data.image_size,
        in_chans=config.model.in_chans,
        norm_pix_loss=config.model.norm_pix_loss,
        target=config.model.target,
        hog_cell_size=config.model.hog_cell_size,
        activation_checkpointing=config.run.activation_checkpointing,
    )
    if with_weights and config.model.init_from is not None:
        head = ("decoder_pred.weight", "decoder_pred.bias")
        new = load_weights(model, config.model.init_from, may_miss=("decoder_", "mask_token"), may_be_new=head)
        log.info("weights from %s", config.model.init_from)
        if new:
            log.warning(
                "%s predicts another target than model.target = %r: decoder_pred starts at random, the rest is the file's",
                config.model.init_from, config.model.target,
            )  # fmt: skip
    return model


def build_optimizer(config: PretrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Builds AdamW; its learning rate is the plan's, step by step, and 0 until then."""
    return torch.optim.AdamW(
        param_groups(model, config.optimizer.weight_decay),
        lr=0.0,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,
    )


def backbone_metadata(config: PretrainConfig, plan: Plan) -> dict[str, str]:
    """Returns where a backbone comes from, as strings for a safetensors header; structures are JSON."""
    dims, model, data = config.model.dims, config.model, config.data
    values: dict[str, Any] = {
        "mae_et_version": mae_et.__version__,
        "architecture": f"vit_{model.size}_patch{dims.patch_size}_{data.image_size}",
        "embed_dim": dims.embed_dim,
        "depth": dims.depth,
        "num_heads": dims.num_heads,
        "decoder_num_heads": dims.decoder_num_heads,
        "patch_size": dims.patch_size,
        "image_size": data.image_size,
        "in_chans": model.in_chans,
        "objective": "mae",
        "target": "hog" if model.target == "hog" else "normalised pixels" if model.norm_pix_loss else "pixels",
        "hog_cell_size": hog_cell(dims.patch_size, model.hog_cell_size) if model.target == "hog" else None,
        "mask_ratio": model.mask_ratio,
        "mean": list(data.mean),
        "std": list(data.std),
        "eval_crop_ratio": data.eval_crop_ratio,
        "data": data.train,
        "num_images": plan.dataset_size,
        "curriculum": to_dict(config.curriculum),
        "bandwidths": [stage.bandwidth for stage in plan.stages],
        "seed": config.run.seed,
    }
    known = {key: value for key, value in values.items() if value is not None}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()}


def _preprocess(images: Tensor, bandwidth: int, config: PretrainConfig) -> Tensor:
    return crop_and_normalize(images, bandwidth, config.data.mean, config.data.std, config.curriculum.centered)
