"""Pre-training of a masked autoencoder."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import mae_et
from mae_et.config.filters import FilterConfig
from mae_et.config.schema import PretrainConfig, to_dict
from mae_et.curriculum.cost import ModelCost, mae_cost
from mae_et.curriculum.plan import Plan
from mae_et.data.buffers import Batch
from mae_et.data.eval_loader import eval_loader
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.spec import check_same_classes, open_images
from mae_et.data.stream import choose_num_workers
from mae_et.engine.distributed import World
from mae_et.engine.loggers import Loggers
from mae_et.engine.parallel import build_on_device, is_without_values, moving_average
from mae_et.engine.progress import Progress
from mae_et.engine.task import Hook
from mae_et.errors import ConfigError, DataError
from mae_et.evaluation.collect import Collected, collect
from mae_et.evaluation.knn import knn_predict
from mae_et.evaluation.pictures import picture_footer, picture_grid, reconstruct, save_picture
from mae_et.lowfreq import crop_and_normalize, normalize
from mae_et.models.architecture import DECODER
from mae_et.models.mae import MaskedAutoencoder, build_mae
from mae_et.models.masks import Masks, mask_order, num_uniform
from mae_et.models.param_groups import param_groups
from mae_et.models.sizes import MAE_SIZES, Size, hog_cell, plain_size
from mae_et.runs.folder import spread
from mae_et.runs.provenance import describe_weights
from mae_et.runs.records import PretrainSummary
from mae_et.storage.backbone import load_initial_weights, write_backbone
from mae_et.storage.digest import encoder_digest
from mae_et.storage.metadata import loading_lines
from mae_et.tasks.bands import BandHook
from mae_et.tasks.filtering import filtered, filtered_for_training
from mae_et.tasks.label_free import LABEL_FREE, LabelFreeHook
from mae_et.tasks.masks import place_noise
from mae_et.tasks.run import TaskData, TrainingTask, run_training

log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig, work_dir: str | Path, resume: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Pre-trains a masked autoencoder, from the config to the backbone file.

    Args and raises: as for `run_training`. The work dir also gets reconstructions/ and backbone.safetensors.
    """
    return run_training(MAETask, config, work_dir, resume, device)


class MAETask(TrainingTask):
    """Masks patches of each image and predicts them.

    The mask of an image follows from its place among the images shown. So it does not depend on how a batch is split over
    processes and accumulation steps, and an image that is shown again gets another mask.

    Args:
        config: of the run.
        data: of the run; `val` is for the kNN accuracy and the measures without labels.
        plan: of the run.
        world: this process among the others.
        work_dir: gets reconstructions/ and backbone.safetensors.
    """

    kind = "pretrain"
    summary_type = PretrainSummary
    model: MaskedAutoencoder

    @classmethod
    def open_data(cls, config: PretrainConfig) -> TaskData:
        source = open_images(config.data, config.data.train, config.model.in_chans)
        if config.data.val is None:
            return TaskData(source)
        val = open_images(config.data, config.data.val, config.model.in_chans)
        if fault := _why_no_knn(config, source, val):
            if config.run.label_free_interval is None:
                raise DataError(f"{fault}, or set run.label_free_interval, which judges on data.val without labels")
            log.warning("no kNN accuracy: %s", fault)
        return TaskData(source, val)

    @classmethod
    def cost(cls, config: PretrainConfig) -> ModelCost:
        return mae_cost(config.model, config.curriculum.decoder_warmup_fraction)

    def __init__(self, config: PretrainConfig, data: TaskData, plan: Plan, world: World, work_dir: Path) -> None:
        self.config, self.plan, self.world, self.work_dir = config, plan, world, work_dir
        self.model = build_on_device(lambda: build_model(config), config.run, world)
        if config.model.ema_decay is not None:
            self.ema = moving_average(self.model, decay=config.model.ema_decay)
        self.optimizer = build_optimizer(config, self.model)
        self.metadata = backbone_metadata(config, plan)
        self.initial_weights = describe_weights(config.model.init_from)
        held_out = data.val or data.train
        self.hooks: list[Hook] = [PictureHook(self, held_out)]
        if data.val is not None and _why_no_knn(config, data.train, data.val) is None:
            self.hooks.append(KnnHook(self, data.train, data.val))
        if data.val is not None and config.run.label_free_interval is not None:
            self.hooks.append(LabelFreeHook(self, data.val))
        if config.model.target == "pixels":
            self.hooks.append(BandHook(self, held_out))
        self.input_memory: Tensor | None = None

    def load_initial_weights(self) -> None:
        if self.config.model.init_from is not None and not is_without_values(self.model):
            path, warmup = self.config.model.init_from, self.config.curriculum.decoder_warmup_equivalent_epochs
            has_decoder = load_initial_weights(self.model, path, self.config.model.adapt_channels)
            if has_decoder and warmup:
                raise ConfigError(
                    [
                        f"curriculum.decoder_warmup_equivalent_epochs = {warmup:g} has no effect: model.init_from = {path!r} "
                        "holds a decoder, which is trained already. Set it to 0"
                    ]
                )
            if self.ema is not None:
                self.ema.set(self.model)

    def enter_step(self, step: int) -> bool:
        """Trains the decoder alone as long as `curriculum.decoder_warmup_equivalent_epochs` says."""
        fraction = self.config.curriculum.decoder_warmup_fraction
        if not fraction:
            return False
        trained = self.plan.compute_fraction(step) >= fraction
        encoder = [value for name, value in self.model.named_parameters() if not name.startswith(DECODER)]
        if encoder[0].requires_grad == trained:
            return False
        for parameter in encoder:
            parameter.requires_grad_(trained)
        log.info("step %d: training %s from here on", step, "encoder and decoder" if trained else "the decoder alone")
        return True

    @property
    def judged(self) -> MaskedAutoencoder:
        """The network that is judged, drawn and written: the average of the weights where there is one."""
        return self.model if self.ema is None else cast(MaskedAutoencoder, self.ema.module)

    def preprocess(self, images: Tensor, size: Size) -> Tensor:
        """Crops to the low frequencies, normalizes, and filters if the config says so.

        On a CPU, images that arrive at their size are all written to the same memory, which is faster than new pages.
        So a result is valid until the next call; the micro batch is done by then.
        """
        data, done = self.config.data, self.plan.compute_fraction(self.step)
        return filtered_for_training(self._normalize(images, size), data.filter, data.image_size, done)

    def _normalize(self, images: Tensor, size: Size) -> Tensor:
        data = self.config.data
        if images.device.type != "cpu" or images.shape[-2:] != size:
            return crop_and_normalize(images, size, data.mean, data.std, self.config.curriculum.centered)
        if self.input_memory is None or self.input_memory.shape != images.shape:
            self.input_memory = torch.empty_like(images, dtype=torch.float32)
        return normalize(images, data.mean, data.std, self.input_memory)

    def loss(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        patch_size = self.model.patch_size
        grid_size = images.shape[-2] // patch_size, images.shape[-1] // patch_size
        places = batch.places if batch.showings is None else batch.showings
        config = self.config.model
        masks = Masks(config.mask_kind, config.mask_grid)
        uniform = place_noise(places, num_uniform(masks, grid_size), self.config.run.seed)
        noise = mask_order(masks, uniform, grid_size, config.mask_ratio)
        loss, _ = model(images, config.mask_ratio, noise)
        return loss, {}

    def finish(self, progress: Progress, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.world.is_main:
            return {}
        metadata = {**self.metadata, "step": str(progress.step), "num_steps": str(self.plan.num_steps)}
        state = self.judged.state_dict()
        backbone = self.work_dir / "backbone.safetensors"
        written = write_backbone(state, backbone, "timm", metadata)
        log.info("to load the backbone:\n%s", loading_lines(written, backbone))
        knn = [line["knn/top1"] for line in metrics if "knn/top1" in line] or [None]
        last = {key: value for line in metrics for key, value in line.items()}
        return {
            "encoder_sha256": encoder_digest(state)["encoder_sha256"],
            "knn_top1_before": knn[0],
            "knn_top1_after": knn[-1],
            **{key: last.get(f"val/{name}") for key, name in LABEL_FREE.items()},
        }


def _why_no_knn(config: PretrainConfig, train: ImageSource, val: ImageSource) -> str | None:
    """Returns why no kNN accuracy can be measured, with a fix; None if both splits have labels of the same classes."""
    for name, source in (("val", val), ("train", train)):
        if source.labels is None:
            why, how = (getattr(source, key, "") for key in ("why_no_labels", "how_to_label"))
            return (
                f"data.val = {config.data.val!r} asks for a kNN accuracy, but data.{name} = {getattr(config.data, name)!r} has "
                f"no labels{why and f' ({why})'}: {how or 'give labelled images'}, or set data.val = None"
            )
    try:
        check_same_classes(train, val)
    except DataError as error:
        return str(error)
    return None


class PictureHook:
    """Draws reconstructions of a few fixed images at the end of each stage, and every `run.picture_interval` steps."""

    def __init__(self, task: MAETask, source: ImageSource) -> None:
        self.task = task
        self.images: Tensor | None = None  # on the main process
        num, data = task.config.run.num_pictures, task.config.data
        if task.world.is_main and num:
            indices = spread(len(source), num)
            loader = eval_loader(source, indices, data.image_size, num, crop_ratio=data.eval_crop_ratio)
            self.images = next(iter(loader)).images

    def due(self, step: int) -> bool:
        interval = self.task.config.run.picture_interval
        ends_stage = any(step == stage.first_step + stage.num_steps for stage in self.task.plan.stages)
        return ends_stage or bool(interval and step % interval == 0)

    def __call__(self, step: int, writer: Loggers | None) -> dict[str, float]:
        if writer is None or self.images is None or not len(self.images):
            return {}
        config, model = self.task.config, self.task.judged
        columns = reconstruct(
            model,
            self.images,
            self.task.plan.stage_at(max(0, step - 1)).input_size,
            config.data.mean,
            config.data.std,
            config.model.mask_ratio,
            config.curriculum.centered,
            masks=Masks(config.model.mask_kind, config.model.mask_grid),
            channels=config.run.picture_channels,
        )
        footer = picture_footer(model, self.images, config.run.picture_channels)
        path = self.task.work_dir / "reconstructions" / f"step_{step:08d}.png"
        pixels = save_picture(picture_grid(columns, footer), path)
        writer.add_image("reconstructions", pixels, step)
        return {}


class KnnHook:
    """kNN accuracy of the mean patch feature at full image size, on evenly spread subsets of both splits.

    Under each of data.val_filters it is measured again, with training and validation images filtered alike.
    """

    def __init__(self, task: MAETask, train: ImageSource, val: ImageSource) -> None:
        self.task, self.sources = task, (train, val)
        world = task.world
        self.num_workers = choose_num_workers(
            task.config.data.num_workers, world.local_size, world.device.type == "cuda"
        )

    def due(self, step: int) -> bool:
        interval = self.task.config.run.knn_interval
        return step in (0, self.task.plan.num_steps) or bool(interval and step % interval == 0)

    def __call__(self, step: int, writer: Loggers | None) -> dict[str, float]:
        filters = self.task.config.data.val_filters
        banks, queries = (
            mean_features(self.task, source, self.num_workers, filters, gather)
            for source, gather in zip(self.sources, (False, True), strict=True)
        )
        names = ["knn/top1", *(f"knn/top1/{row.name}" for row in filters)]
        pairs = zip(names, banks, queries, strict=True)
        return {name: knn_top1(bank, query, self.task.world) for name, bank, query in pairs}


def mean_features(
    task: MAETask, source: ImageSource, num_workers: int, filters: Sequence[FilterConfig] = (), gather: bool = True
) -> list[Collected]:
    """Returns the mean patch features at full image size of evenly spread images, `run.knn_max_images` at most.

    Args:
        task: whose model is used.
        source: the images.
        num_workers: loader processes.
        filters: of the images.
        gather: as for `collect`; false for the bank of `knn_top1`.
    Returns:
        The features of the unfiltered images, then those with each filter.
    """
    config = task.config
    data = config.data

    def encode(images: Tensor) -> Tensor:
        plain = crop_and_normalize(images, data.image_size, data.mean, data.std, config.curriculum.centered)
        views = [plain, *(filtered(plain, row, data.image_size) for row in filters)]
        features = [task.judged.features(view)[:, 1:].mean(dim=1) for view in views]  # type: ignore[call-overload]
        return torch.stack(features, dim=1)

    indices = spread(len(source), config.run.knn_max_images)
    seen = collect(encode, source, indices, data, task.world, num_workers, gather=gather)
    if not len(seen.outputs):  # this process had no images
        return [seen] * (1 + len(filters))
    return [replace(seen, outputs=outputs) for outputs in seen.outputs.unbind(1)]


def knn_top1(bank: Collected, queries: Collected, world: World) -> float:
    """Returns the accuracy of 20 nearest neighbours, fewer if the bank is smaller.

    Args:
        bank: collected without `gather`.
        queries: collected with it.
        world: this process among the others.
    """
    k = min(20, len(bank.labels))
    predicted = knn_predict(bank.outputs, bank.labels, queries.outputs, [k], world=world, block_sizes=bank.batch_sizes)
    return float((predicted[k] == queries.labels).float().mean())


def build_model(config: PretrainConfig) -> MaskedAutoencoder:
    """Builds the model of a config with random weights."""
    return build_mae(
        config.model.size,
        **{**vars(config.model.dims), **config.model.encoder_options},
        img_size=config.data.image_size,
        norm_pix_loss=config.model.norm_pix_loss,
        target=config.model.target,
        hog_cell_size=config.model.hog_cell_size,
        learnt_positions=config.model.learnt_positions,
    )


def build_optimizer(config: PretrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Builds AdamW. Its learning rate is 0 until the plan sets it, step by step."""
    return torch.optim.AdamW(
        param_groups(model, config.optimizer.weight_decay),
        lr=0.0,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,
    )


def _architecture_name(config: PretrainConfig) -> str:
    """Returns e.g. "vit_base_patch16_224", with width and depth in place of a size that the config has changed."""
    dims, usual = config.model.dims, MAE_SIZES[config.model.size]
    same = (dims.embed_dim, dims.depth, dims.num_heads) == (usual.embed_dim, usual.depth, usual.num_heads)
    size = config.model.size if same else f"width{dims.embed_dim}_depth{dims.depth}"
    return f"vit_{size}_patch{dims.patch_size}_{'x'.join(map(str, dict.fromkeys(config.data.image_size)))}"


def backbone_metadata(config: PretrainConfig, plan: Plan) -> dict[str, str]:
    """Returns where a backbone comes from, as strings for a safetensors header; structures are JSON."""
    dims, model, data = config.model.dims, config.model, config.data
    values: dict[str, Any] = {
        "mae_et_version": mae_et.__version__,
        "architecture": _architecture_name(config),
        "embed_dim": dims.embed_dim,
        "depth": dims.depth,
        "num_heads": dims.num_heads,
        "decoder_num_heads": dims.decoder_num_heads,
        "patch_size": dims.patch_size,
        "image_size": plain_size(data.image_size),
        "in_chans": model.in_chans,
        "objective": "mae",
        "target": "hog" if model.target == "hog" else "normalised pixels" if model.norm_pix_loss else "pixels",
        "hog_cell_size": hog_cell(dims.patch_size, model.hog_cell_size) if model.target == "hog" else None,
        "mask_ratio": model.mask_ratio,
        "mask_kind": None if model.mask_kind == "random" else model.mask_kind,
        "mask_grid": None if model.mask_grid == 1 else model.mask_grid,
        "num_cls_tokens": None if model.num_cls_tokens == 1 else model.num_cls_tokens,
        "num_registers": model.num_registers or None,
        "rotary_positions": model.rotary_positions or None,
        "ema_decay": model.ema_decay,
        "mean": list(data.mean),
        "std": list(data.std),
        "eval_crop_ratio": data.eval_crop_ratio,
        "value_range": data.value_range and list(data.value_range),
        "data": data.train,
        "num_images": plan.dataset_size,
        "curriculum": to_dict(config.curriculum),
        "bandwidths": [stage.bandwidth for stage in plan.stages],
        "filter": None if config.data.filter.kind == "none" else to_dict(config.data.filter),
        "seed": config.run.seed,
    }
    known = {key: value for key, value in values.items() if value is not None}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()}
