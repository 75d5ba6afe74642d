"""What the user said: frozen dataclasses with types and ranges. Standard library only.

`from_dict` turns nested dicts (a config file after its overrides) into a dataclass and reports ALL faults at once.
What follows from a config (steps, absolute learning rates, batch per stage) is a Plan: see curriculum.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from mae_et.config.validation import Range, build, flat, plain
from mae_et.errors import ConfigError
from mae_et.models.sizes import MAE_SIZES, MAESize, hog_cell

T = TypeVar("T")


Positive = Annotated[int, Range(ge=1)]
Count = Annotated[int, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]


@dataclass(frozen=True)
class BackboneConfig:
    """The ViT."""

    size: Literal["tiny", "small", "base", "large", "huge"] = "base"
    patch_size: Positive | None = None  # px; None: 14 for huge, 16 for the others
    in_chans: Literal[1, 3] = 3
    embed_dim: Positive | None = None  # these override the size's own
    depth: Positive | None = None
    num_heads: Positive | None = None

    @property
    def dims(self) -> MAESize:
        """The size's table row with this config's overrides."""
        size = MAE_SIZES[self.size]
        own = {name: getattr(self, name) for name in vars(size) if getattr(self, name, None) is not None}
        return dataclasses.replace(size, **own)

    def faults(self) -> Iterator[str]:
        dims = self.dims
        for prefix in ("", "decoder_"):
            width, heads = getattr(dims, f"{prefix}embed_dim"), getattr(dims, f"{prefix}num_heads")
            if width % heads or width % 4:
                yield f"{prefix}embed_dim = {width} must be a multiple of 4 and of {prefix}num_heads = {heads}"


@dataclass(frozen=True)
class ModelConfig(BackboneConfig):
    """The masked autoencoder."""

    mask_ratio: Annotated[float, Range(gt=0, lt=1)] = 0.75
    target: Literal["pixels", "hog"] = "pixels"  # what the decoder predicts
    norm_pix_loss: bool = True  # pixels normalised by their patch's mean and deviation; no effect on target "hog"
    hog_cell_size: Positive | None = None  # px of a histogram's cell, target "hog"; None: half a patch
    decoder_embed_dim: Positive | None = None
    decoder_depth: Positive | None = None
    decoder_num_heads: Positive | None = None
    init_from: str | None = None  # a local checkpoint to start from: ours, or the official MAE's (encoder or full)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.target == "hog":
            try:
                hog_cell(self.dims.patch_size, self.hog_cell_size)
            except ValueError as error:
                yield f"target = 'hog': {error}"
        elif self.hog_cell_size is not None:
            yield f"hog_cell_size = {self.hog_cell_size} has no effect with target = {self.target!r}: leave it out"


@dataclass(frozen=True)
class AugmentationConfig:
    """RandomResizedCrop and flip, and how they grow with the strength (0 to 1) that the curriculum gives."""

    ramp: Literal["none", "crop_scale", "randaugment"] = "none"
    min_scale: Annotated[float, Range(gt=0, le=1)] = 0.2  # smallest share of the area that a crop keeps
    start_min_scale: Annotated[float, Range(gt=0, le=1)] = 0.67  # the same at strength 0, ramp "crop_scale"
    flip: bool = True
    max_magnitude: Annotated[float, Range(ge=0, le=10)] = 9.0  # of RandAugment at strength 1
    color_jitter: Annotated[float, Range(ge=0, le=1)] = 0.4  # at strength 1

    def faults(self) -> Iterator[str]:
        if self.ramp == "crop_scale" and self.start_min_scale < self.min_scale:
            yield f"start_min_scale = {self.start_min_scale} must not be below min_scale = {self.min_scale}"


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are read."""

    train: str  # folder, tar shards ("train-{000..099}.tar") or "scenes:NUM@SIZE": see mae_et/data/sources/spec.py
    val: str | None = None  # labelled images for the kNN accuracy during pre-training
    image_size: Positive = 224  # px; the bandwidth of the last stage
    num_images: Positive | None = None  # what `train` should hold; tools/plan.py plans with it
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of pixels in [0, 1]; tools/dataset_stats.py measures yours
    std: tuple[Annotated[float, Range(gt=0)], ...] = (0.229, 0.224, 0.225)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    loading: Literal["exact", "fast", "direct"] = "exact"  # of training images; see docs/running.md before changing it
    num_workers: Count | None = None  # loader processes for each training process; None: from the cores
    eval_crop_ratio: Annotated[float, Range(gt=0, le=1)] = 0.875  # share of the shorter side that evaluation sees
    max_bad_fraction: Fraction = 0.01  # of all images: more unreadable ones than this stop the run


@dataclass(frozen=True)
class StageConfig:
    """One row of a curriculum."""

    compute_fraction: Annotated[float, Range(gt=0, le=1)]
    bandwidth: Positive  # px
    strength: Fraction | None = None  # of the augmentation; None: rises linearly with the compute done
    global_batch_size: Positive | None = None  # None: batch.global_batch_size


@dataclass(frozen=True)
class CurriculumConfig:
    """What the model sees when. The presets are in curriculum.py."""

    preset: Literal["etpp", "etpp_deit", "etpp_convnext", "et", "blog", "constant", "custom"] = "etpp"
    stages: tuple[StageConfig, ...] = ()  # with preset="custom"
    equivalent_epochs: Annotated[float, Range(gt=0)] = 400.0  # budget, in epochs at full image size
    baseline_equivalent_epochs: Annotated[float, Range(gt=0)] = 1600.0  # what the run is compared with
    warmup_equivalent_epochs: Annotated[float, Range(ge=0)] = 40.0
    centered: bool = True  # half-pixel phase: the crop neither shifts the image nor breaks flips

    def faults(self) -> Iterator[str]:
        if self.warmup_equivalent_epochs >= self.equivalent_epochs:
            yield (
                f"warmup_equivalent_epochs = {self.warmup_equivalent_epochs:g} must be below "
                f"equivalent_epochs = {self.equivalent_epochs:g}"
            )
        if (self.preset == "custom") != bool(self.stages):
            yield 'stages and preset="custom" belong together: give both, or neither'
        total = sum(stage.compute_fraction for stage in self.stages)
        if self.stages and abs(total - 1) > 1e-6:
            yield f"the compute_fraction of the stages must add up to 1, not {total:g}"


@dataclass(frozen=True)
class EarlyLargeBatchConfig:
    """Larger batches while the images are small (EfficientTrain++); the lr grows with the root of the batch.

    Rule "area": batch.global_batch_size (image_size / bandwidth)^2, rounded as `area_batch` in curriculum.py says.
    Rule "list": the stages' own global_batch_size. Rule "none": those too, but with an lr that grows with the batch.
    """

    rule: Literal["none", "area", "list"] = "none"
    max_global_batch_size: Positive | None = None  # of rule "area"; None: no limit
    max_lr: Annotated[float, Range(gt=0)] | None = None  # absolute, of any stage; None: no limit

    def faults(self) -> Iterator[str]:
        for key, rules in (("max_global_batch_size", ("area",)), ("max_lr", ("area", "list"))):
            value = getattr(self, key)
            if value is not None and self.rule not in rules:
                yield f"{key} = {value} has no effect with rule = {self.rule!r}: leave it out"


@dataclass(frozen=True)
class BatchConfig:
    """Images a step. Accumulation follows from the global and the micro batch, stage by stage."""

    global_batch_size: Positive = 4096  # over all processes and accumulation steps
    micro_batch_size: Positive | None = None  # images one device holds at full image size; None: as many as it takes
    micro_batch_sizes: tuple[Positive, ...] = ()  # the same for each stage, before the above; tools/plan.py finds them
    early_large_batch: EarlyLargeBatchConfig = field(default_factory=EarlyLargeBatchConfig)

    def faults(self) -> Iterator[str]:
        most = self.early_large_batch.max_global_batch_size
        if most is not None and most < self.global_batch_size:
            yield (
                f"early_large_batch.max_global_batch_size = {most} is below global_batch_size = {self.global_batch_size}, "
                "the batch at full image size"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. Defaults: MAE's."""

    base_lr: Annotated[float, Range(gt=0)] = 1.5e-4  # for each 256 images of the global batch
    min_lr: Annotated[float, Range(ge=0)] = 0.0  # absolute, at the end of the cosine
    weight_decay: Annotated[float, Range(ge=0)] = 0.05
    betas: tuple[Annotated[float, Range(ge=0, lt=1)], Annotated[float, Range(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Range(gt=0)] = 1e-8
    clip_grad_norm: Annotated[float, Range(gt=0)] | None = None


@dataclass(frozen=True)
class RunConfig:
    """How the run is carried out. Nothing here changes what is learnt, except `seed` and `precision`."""

    seed: Count = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the device has it, else fp32
    compile: bool = False  # torch.compile, once for each bandwidth
    activation_checkpointing: bool = False
    log_interval: Positive = 20  # steps
    save_interval: Positive = 1000  # steps
    keep_checkpoints: Positive = 2
    max_skipped_steps: Count = 0  # steps with a non-finite loss or gradient that are skipped before the run stops
    picture_interval: Count = 0  # steps between reconstruction pictures; 0: one for each stage and one at the end
    knn_interval: Count = 0  # steps between kNN accuracies on data.val; 0: before the first and after the last step
    knn_max_images: Positive = 5000  # of each split


@dataclass(frozen=True)
class ReplayStageConfig:
    """The replay buffer of the stages at one bandwidth."""

    bandwidth: Positive  # px
    factor: Positive  # R: images shown for each one that the loader prepares
    size: Positive = 256  # of the buffer, in loader batches of global_batch_size / factor images, as published


@dataclass(frozen=True)
class ReplayConfig:
    """Shows prepared images again where the loader is the limit: see replay_plan.py and docs/running.md."""

    mode: Literal["off", "mix", "alternate"] = "off"  # replayed images within each batch, or as whole batches
    stages: tuple[ReplayStageConfig, ...] = ()  # (): as published, by bandwidth over image size; not listed: factor 1
    max_memory_gib: Annotated[float, Range(gt=0)] | None = None  # of one machine, all its processes; None: what is free
    on_excess: Literal["refuse", "cap"] = "refuse"  # what to do with a buffer above max_memory_gib
    refill: Literal["exact", "gradual"] = "exact"  # on resume: read again what the buffer held, or start it empty

    def faults(self) -> Iterator[str]:
        if self.on_excess == "cap" and self.max_memory_gib is None:
            yield 'on_excess = "cap" needs max_memory_gib: a size that follows the free memory would change the run'
        bandwidths = [stage.bandwidth for stage in self.stages]
        for bandwidth in sorted({b for b in bandwidths if bandwidths.count(b) > 1}):
            yield f"stages name bandwidth {bandwidth} more than once: give it one row"


@dataclass(frozen=True)
class PretrainConfig:
    """A pre-training run."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def faults(self) -> Iterator[str]:
        yield from _image_faults(self)
        yield from _batch_faults(self)


@dataclass(frozen=True)
class ClassifierConfig(BackboneConfig):
    """A ViT with a linear head. The dimensions must be those of the backbone file."""

    pool: Literal["token", "avg"] = "avg"  # cls token, or mean of the patches and then a norm of its own
    drop_path_rate: Annotated[float, Range(ge=0, lt=1)] = 0.0
    head_init_std: Annotated[float, Range(gt=0)] = 2e-5


@dataclass(frozen=True)
class RegularizationConfig:
    """Of fine-tuning. Defaults: MAE's."""

    mixup: Annotated[float, Range(ge=0)] = 0.8
    cutmix: Annotated[float, Range(ge=0)] = 1.0
    label_smoothing: Annotated[float, Range(ge=0, lt=1)] = 0.1
    erasing: Fraction = 0.25  # probability
    ema_decay: Annotated[float, Range(gt=0, lt=1)] | None = None  # None: no average of the weights


@dataclass(frozen=True)
class ClassifyOptimizerConfig(OptimizerConfig):
    """AdamW with layer decay for fine-tuning, LARS for the linear probe."""

    name: Literal["adamw", "lars"] = "adamw"
    layer_decay: Annotated[float, Range(gt=0, le=1)] = 1.0
    momentum: Annotated[float, Range(ge=0, lt=1)] = 0.9  # of LARS
    trust_coefficient: Annotated[float, Range(gt=0)] = 0.001  # of LARS


@dataclass(frozen=True)
class KnnConfig:
    """Of the kNN protocol."""

    ks: tuple[Positive, ...] = (10, 20, 100, 200)
    temperature: Annotated[float, Range(gt=0)] = 0.07

    def faults(self) -> Iterator[str]:
        if not self.ks:
            yield "ks = [] must name at least one number of neighbours"


@dataclass(frozen=True)
class ClassifyConfig:
    """A verdict on a backbone by labelled images."""

    data: DataConfig
    protocol: Literal["finetune", "linear_probe", "knn"] = "finetune"
    backbone: str | None = None  # a file; None: random weights
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    curriculum: CurriculumConfig = field(
        default_factory=lambda: CurriculumConfig(
            preset="constant", equivalent_epochs=100.0, baseline_equivalent_epochs=100.0, warmup_equivalent_epochs=5.0
        )
    )
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(global_batch_size=1024))
    optimizer: ClassifyOptimizerConfig = field(default_factory=ClassifyOptimizerConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    run: RunConfig = field(default_factory=RunConfig)
    eval_interval: Count = 0  # steps between accuracies on data.val; 0: at the end of each tenth of the run

    def faults(self) -> Iterator[str]:
        yield from _image_faults(self)
        yield from _batch_faults(self)
        if self.data.val is None:
            yield "data.val is missing: accuracies are measured on it"
        mixes = self.protocol == "finetune" and (self.regularization.mixup or self.regularization.cutmix)
        batches = (self.batch.global_batch_size, self.batch.micro_batch_size or 2, *self.batch.micro_batch_sizes)
        if mixes and any(batch % 2 for batch in batches):
            yield "mixup and cutmix need even batch sizes"
        if self.optimizer.name == "lars" and self.protocol == "finetune":
            yield 'optimizer.name = "lars" is for the linear probe; fine-tune with "adamw"'
        stages, preset = self.curriculum.stages, self.curriculum.preset
        shrinks = preset not in ("constant", "custom") or any(s.bandwidth != self.data.image_size for s in stages)
        if self.protocol != "knn" and shrinks:
            yield (
                f"curriculum.preset = {preset!r} shows smaller images, but a classifier's position embedding is learnt at "
                'data.image_size: use preset = "constant"'
            )


# Keys that may change between a run and its resumption: they change how the work is done, not what is learnt.
# data.train may move; that it holds the same images is checked apart from its path.
RESUME_FREE = frozenset(
    {
        "data.train", "data.val", "backbone", "eval_interval", "data.num_images", "data.num_workers", "data.max_bad_fraction",
        "batch.micro_batch_size", "batch.micro_batch_sizes", "curriculum.baseline_equivalent_epochs", "model.init_from",
        "run.log_interval", "run.save_interval", "run.keep_checkpoints", "run.max_skipped_steps",
        "run.picture_interval", "run.knn_interval", "run.knn_max_images", "run.compile", "run.activation_checkpointing",
    }
)  # fmt: skip
MICRO_BATCH = frozenset({"batch.micro_batch_size", "batch.micro_batch_sizes"})


def resume_free(kind: str) -> frozenset[str]:
    """Returns the config keys that cannot change the result of a run of this kind.

    The micro batch changes it outside pre-training: mixup, drop path and the linear probe's BatchNorm see it.
    """
    return RESUME_FREE if kind == "pretrain" else RESUME_FREE - MICRO_BATCH


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Builds a frozen config from nested dicts.

    Args:
        cls: one of the dataclasses above.
        values: nested mappings of plain values; keys that begin with "_" are ignored.
        where: the file, for the message.
    Raises:
        ConfigError: with all faults: unknown keys (and the nearest known one), wrong types, values out of range.
    """
    if told := _other_kind(cls, values):
        raise ConfigError([told], where)
    faults: list[str] = []
    config = build(cls, values, faults)
    if faults:
        raise ConfigError(faults, where)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as nested dicts of plain values, tuples as lists."""
    return plain(dataclasses.asdict(config))


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], free: frozenset[str] = RESUME_FREE) -> list[str]:
    """Lists what matters and differs between two configs (as from `to_dict`), one "key: old -> new" each."""
    flat_old, flat_new = dict(flat(old)), dict(flat(new))
    keys = [key for key in {**flat_old, **flat_new} if key not in free]
    return [
        f"{key}: {flat_old.get(key, 'absent')!r} -> {flat_new.get(key, 'absent')!r}"
        for key in keys
        if flat_old.get(key, "absent") != flat_new.get(key, "absent")
    ]


def _image_faults(config: PretrainConfig | ClassifyConfig) -> Iterator[str]:
    """What must agree between the images, the patches and the curriculum."""
    size, patch = config.data.image_size, config.model.dims.patch_size
    if size % patch:
        near = max(patch, round(size / patch) * patch)
        yield f"data.image_size = {size} is no multiple of the patch size {patch}; the nearest is {near}"
    for name in ("mean", "std"):
        values = getattr(config.data, name)
        if len(values) != config.model.in_chans:
            yield f"data.{name} has {len(values)} values, but model.in_chans = {config.model.in_chans}"
    if config.data.loading != "exact" and config.model.in_chans != 3:
        yield f'data.loading = "{config.data.loading}" is for colour images; with model.in_chans = 1 use "exact"'
    for i, stage in enumerate(config.curriculum.stages):
        key, band = f"curriculum.stages[{i}].bandwidth", stage.bandwidth
        if band % patch:
            below, above = band // patch * patch, (band // patch + 1) * patch
            near_two = f"{below} or {above}" if below else f"{above}"
            yield f"{key} = {band} is no multiple of the patch size {patch}; use {near_two}"
        if band > size:
            yield f"{key} = {band} exceeds data.image_size = {size}"


def _batch_faults(config: PretrainConfig | ClassifyConfig) -> Iterator[str]:
    """What must agree between the batch, the stages and the learning rate."""
    early, key = config.batch.early_large_batch, "batch.early_large_batch"
    own = [i for i, stage in enumerate(config.curriculum.stages) if stage.global_batch_size is not None]
    if early.rule == "area" and own:
        yield (
            f"{key}.rule = 'area' and curriculum.stages[{own[0]}].global_batch_size both say how large the batch is: leave "
            "one out, or set rule = 'list'"
        )
    if early.rule == "list" and not own:
        yield f"{key}.rule = 'list' needs a global_batch_size in curriculum.stages (preset = 'custom'); none has one"
    lr = config.optimizer.base_lr * config.batch.global_batch_size / 256
    if early.max_lr is not None and early.max_lr < lr:
        yield f"{key}.max_lr = {early.max_lr:g} is below the lr at full image size, base_lr * global_batch_size / 256 = {lr:g}"


def _other_kind(cls: type, values: Mapping[str, Any]) -> str | None:
    """Says so if the values are plainly of the other kind of config, half of whose keys would be unknown here."""
    if not isinstance(values, Mapping):
        return None
    names = {kind: {f.name for f in dataclasses.fields(kind)} for kind in (PretrainConfig, ClassifyConfig, ModelConfig)}
    if cls is PretrainConfig:
        theirs = sorted((names[ClassifyConfig] - names[PretrainConfig] - {"backbone"}) & set(values))
        if theirs:
            return f"this is a classification config (it has {', '.join(theirs)}): run it with tools/classify.py"
    if cls is ClassifyConfig and "protocol" not in values and isinstance(values.get("model"), Mapping):
        own = {f.name for f in dataclasses.fields(ClassifierConfig)}
        theirs = sorted((names[ModelConfig] - own) & set(values["model"]))
        if theirs:
            return (
                f"this is a pre-training config (it has {', '.join(f'model.{key}' for key in theirs)}): run it with "
                "tools/pretrain.py, and judge its backbone with one of configs/classification/"
            )
    return None
