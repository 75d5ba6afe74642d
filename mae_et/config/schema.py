"""The configs of this project: PretrainConfig and ClassifyConfig, and the sections that are theirs alone.

`from_dict` turns nested dicts (a config file after its overrides) into one of them and reports all faults at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mae_et.config.data import (
    AsTuple,
    AugmentationConfig,
    Count,
    DataConfig,
    Fraction,
    Positive,
    PositiveFloat,
    UnitInterval,
)
from mae_et.config.filters import FilterConfig, FilteredDataConfig, TrainFilterConfig
from mae_et.config.network import BackboneConfig, ModelConfig
from mae_et.config.probes import KnnConfig, LabelsConfig, SweepConfig
from mae_et.config.section import Section, check, unused
from mae_et.config.training import (
    BatchConfig,
    CurriculumConfig,
    NetworkConfig,
    OptimizerConfig,
    ReplayConfig,
    ReplayStageConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
)
from mae_et.config.validation import flat, from_dict, to_dict

__all__ = [
    "RESUME_FREE", "AugmentationConfig", "BackboneConfig", "BatchConfig", "ClassifyConfig", "CurriculumConfig", "DataConfig",
    "FilterConfig", "FilteredDataConfig", "ModelConfig", "NetworkConfig", "OptimizerConfig", "PretrainConfig", "ReplayConfig",
    "ReplayStageConfig", "RunConfig", "StageConfig", "TrainConfig", "TrainFilterConfig", "changed_keys", "from_dict", "to_dict",
]  # fmt: skip


class PretrainCurriculumConfig(CurriculumConfig):
    """The curriculum of a pre-training run."""

    decoder_warmup_equivalent_epochs: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Trains the new decoder alone at the start, for so many equivalent epochs, where model.init_from brings an "
        "encoder without decoder. The encoder keeps its weights to the bit.",
    )

    @check
    def _decoder_warmup(self) -> Iterator[str]:
        if self.decoder_warmup_equivalent_epochs >= self.equivalent_epochs:
            yield (
                f"decoder_warmup_equivalent_epochs = {self.decoder_warmup_equivalent_epochs:g} must be below "
                f"equivalent_epochs = {self.equivalent_epochs:g}: the encoder would never be trained"
            )

    @property
    def decoder_warmup_fraction(self) -> float:
        """Fraction of the compute that trains the decoder alone."""
        return self.decoder_warmup_equivalent_epochs / self.equivalent_epochs


class PretrainRunConfig(RunConfig):
    """Adds what pre-training shows while it runs."""

    num_pictures: Count = Field(6, description="Images of which reconstructions are drawn after each stage; 0: none.")
    picture_interval: Positive | None = Field(
        None, description="Steps between reconstruction pictures. None: one after each stage."
    )
    picture_channels: Annotated[tuple[Count, ...], AsTuple] | None = Field(
        None,
        description="Channels of the images that are drawn, one or three, counted from 0: (2, 1, 0) for bands in the order blue, "
        "green, red. None: the first three, or the first of one or two.",
    )
    knn_interval: Positive | None = Field(
        None, description="Steps between kNN accuracies on data.val. None: before the first and after the last step."
    )
    label_free_interval: Positive | None = Field(
        None,
        description="Steps between held-out loss, RankMe and alpha-ReQ on data.val, which needs no labels then; also before "
        "the first and after the last step. An image costs about as much as its training step. None: off.",
    )
    knn_max_images: Positive = Field(
        5000, description="Images of each split that kNN accuracy, held-out loss, RankMe and alpha-ReQ are measured on."
    )

    @check
    def _unused_interval(self) -> Iterator[str]:
        if not self.num_pictures:
            yield from unused(self, ["picture_interval", "picture_channels"], "num_pictures = 0")


class PretrainConfig(TrainConfig):
    """A pre-training run."""

    folder: ClassVar[str] = "pretrain"

    data: FilteredDataConfig
    model: ModelConfig = ModelConfig()
    curriculum: PretrainCurriculumConfig = PretrainCurriculumConfig()
    run: PretrainRunConfig = PretrainRunConfig()

    @check
    def _decoder_warmup(self) -> Iterator[str]:
        if self.model.init_from is None:
            yield from unused(
                self.curriculum, ["decoder_warmup_equivalent_epochs"], "model.init_from = None", "curriculum."
            )

    @check
    def _picture_channels(self) -> Iterator[str]:
        channels, num_channels = self.run.picture_channels, self.model.in_chans
        if channels is not None and (len(channels) not in (1, 3) or max(channels) >= num_channels):
            yield (
                f"run.picture_channels = {list(channels)} must be one or three channels from 0 to {num_channels - 1} "
                f"(model.in_chans = {num_channels})"
            )

    @check
    def _held_out_images(self) -> Iterator[str]:
        if self.data.val is None:
            yield from unused(self.run, ["label_free_interval"], "data.val = None", "run.")

    @classmethod
    def other_kind(cls, values: Mapping[str, Any]) -> str | None:
        if message := _supervised(values):
            return message
        theirs = sorted((set(ClassifyConfig.model_fields) - set(cls.model_fields) - {"backbone"}) & set(values))
        if theirs:
            return f"this is a classification config (it has {', '.join(theirs)}): run it with `mae-et classify`"
        return None


class ClassifierConfig(BackboneConfig):
    """A ViT with a linear head. The dimensions must be those of the backbone file."""

    pool: Literal["token", "avg"] = Field(
        "avg",
        description="Feature of an image: the cls token, or the mean of the patches, followed by a norm of its own.",
    )
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Stochastic depth of fine-tuning.")
    head_init_std: PositiveFloat = Field(2e-5, description="Deviation of the head's initial weights, in fine-tuning.")


class ClassifyCurriculumConfig(CurriculumConfig):
    """The curriculum of a classification run: full size throughout, unless asked otherwise."""

    preset: Literal["etpp", "etpp_deit", "etpp_convnext", "et", "blog", "constant", "custom"] = Field(
        "constant", description=CurriculumConfig.model_fields["preset"].description
    )
    equivalent_epochs: PositiveFloat = Field(100.0, description="Compute budget, in epochs at full image size.")
    baseline_equivalent_epochs: PositiveFloat = Field(
        100.0, description="Budget of the run that this one is compared with."
    )
    warmup_equivalent_epochs: Annotated[float, Field(ge=0)] = Field(
        5.0, description="Length of the linear warm-up of the learning rate, in equivalent epochs."
    )


class ClassifyBatchConfig(BatchConfig):
    """The batch of a classification run."""

    global_batch_size: Positive = Field(
        1024, description="Images per optimizer step, over all processes and accumulation steps."
    )


class RegularizationConfig(Section):
    """Regularization of fine-tuning. The defaults are MAE's."""

    mixup: Annotated[float, Field(ge=0)] = Field(0.8, description="Alpha of mixup. 0: off.")
    cutmix: Annotated[float, Field(ge=0)] = Field(1.0, description="Alpha of cutmix. 0: off.")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="Label smoothing.")
    erasing: Fraction = Field(0.25, description="Probability of random erasing.")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Decay of the moving average of the weights. None: no average."
    )


class ClassifyOptimizerConfig(OptimizerConfig):
    """AdamW, with layer decay for fine-tuning; or LARS, for the probes."""

    name: Literal["adamw", "lars"] = Field("adamw", description="The optimizer.")
    layer_decay: UnitInterval = Field(1.0, description="Factor of the lr from each block to the one before.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Momentum of LARS.")
    trust_coefficient: PositiveFloat = Field(0.001, description="Trust coefficient of LARS.")

    @check
    def _unused(self) -> Iterator[str]:
        others = {"adamw": ["momentum", "trust_coefficient"], "lars": ["betas", "eps", "layer_decay"]}
        yield from unused(self, others[self.name], f"name = {self.name!r}")


class ClassifyConfig(TrainConfig):
    """An evaluation of a backbone on labelled images: fine-tuning, or a probe of frozen features."""

    folder: ClassVar[str] = "classification"

    protocol: Literal["finetune", "linear_probe", "attentive_probe", "linear_sweep", "knn"] = Field(
        "finetune",
        description="What is trained, if anything: all weights; a linear layer; a pooling query and a linear layer; linear "
        "layers with many hyper-parameters, on features that are computed once; nothing.",
    )
    backbone: str | None = Field(None, description="Backbone file. None: random weights.")
    model: ClassifierConfig = ClassifierConfig()
    curriculum: ClassifyCurriculumConfig = ClassifyCurriculumConfig()
    batch: ClassifyBatchConfig = ClassifyBatchConfig()
    optimizer: ClassifyOptimizerConfig = ClassifyOptimizerConfig()
    regularization: RegularizationConfig = RegularizationConfig()
    knn: KnnConfig = KnnConfig()
    sweep: SweepConfig = SweepConfig()
    labels: LabelsConfig = LabelsConfig()
    eval_interval: Positive | None = Field(
        None, description="Steps between accuracies on data.val. None: after each tenth of the run."
    )

    @property
    def is_trained(self) -> bool:
        """Whether the protocol trains step by step; the others compute the features once."""
        return self.protocol in ("finetune", "linear_probe", "attentive_probe")

    @classmethod
    def other_kind(cls, values: Mapping[str, Any]) -> str | None:
        if message := _supervised(values):
            return message
        model = values.get("model")
        if "protocol" in values or not isinstance(model, Mapping):
            return None
        theirs = sorted((set(ModelConfig.model_fields) - set(ClassifierConfig.model_fields)) & set(model))
        if not theirs:
            return None
        return (
            f"this is a pre-training config (it has {', '.join(f'model.{key}' for key in theirs)}): run it with "
            "`mae-et pretrain`, and evaluate its backbone with a classification config"
        )

    @check
    def _validation_images(self) -> Iterator[str]:
        if self.data.val is None:
            yield "data.val is missing: accuracies are measured on it"

    @check
    def _even_batches(self) -> Iterator[str]:
        mixes = self.protocol == "finetune" and (self.regularization.mixup or self.regularization.cutmix)
        batches = (self.batch.global_batch_size, self.batch.micro_batch_size or 2, *self.batch.micro_batch_sizes)
        if mixes and any(batch % 2 for batch in batches):
            yield "mixup and cutmix mix pairs of images, so batch sizes must be even"

    @check
    def _labels_of_sources(self) -> Iterator[str]:
        if not self.labels.are_all:
            yield from unused(self.data, ["train_weights"], "a part of the labels", "data.")

    @check
    def _optimizer_of_protocol(self) -> Iterator[str]:
        if self.optimizer.name == "lars" and self.protocol == "finetune":
            yield 'optimizer.name = "lars" is for the probes; fine-tune with "adamw"'

    @check
    def _full_size_only(self) -> Iterator[str]:
        stages, preset = self.curriculum.stages, self.curriculum.preset
        full = min(self.data.image_size)
        shrinks = preset not in ("constant", "custom") or any(stage.bandwidth != full for stage in stages)
        if self.is_trained and shrinks:
            yield (
                f"curriculum.preset = {preset!r} shows smaller images, but a classifier's position embedding is learned at "
                'data.image_size: use preset = "constant"'
            )

    @check
    def _unused(self) -> Iterator[str]:
        reason = f"protocol = {self.protocol!r}"
        for protocol, section in (("knn", "knn"), ("linear_sweep", "sweep")):
            if self.protocol != protocol:
                yield from unused(self, [section], reason)
        if self.is_trained:
            yield from unused(self.labels, ["num_draws"], reason, "labels.")
        else:
            training = ["curriculum", "batch", "optimizer", "replay", "eval_interval"]
            yield from unused(self, training, reason)
            yield from unused(self.data, ["train_weights"], reason, "data.")
            loop = [name for name in RunConfig.model_fields if name not in ("seed", "precision")]
            yield from unused(self.run, loop, reason, "run.")
        if self.protocol != "finetune":
            yield from unused(self, ["regularization"], reason)
            yield from unused(self.model, ["drop_path_rate", "head_init_std"], reason, "model.")
        if self.protocol in ("linear_probe", "attentive_probe"):
            yield from unused(self.optimizer, ["layer_decay"], reason, "optimizer.")
            yield from unused(self.run, ["activation_checkpointing", "parallel"], reason, "run.")
        if self.protocol == "attentive_probe":
            yield from unused(self.model, ["pool"], reason, "model.")


def _supervised(values: Mapping[str, Any]) -> str | None:
    """Returns a message if the values are of a supervised config, which names its model."""
    model = values.get("model")
    if isinstance(model, Mapping) and "name" in model:
        return f"this is a supervised config (it has model.name = {model['name']!r}): run it with `mae-et supervised`"
    return None


# Keys that may change between a run and its resumption: they change how the work is done, not what is learned.
# data.train may move; that it holds the same images is checked apart from its path.
RESUME_FREE = frozenset(
    {
        "data.train", "data.val", "data.val_filters", "backbone",
        "eval_interval", "data.num_images", "data.num_workers", "data.max_bad_fraction",
        "data.max_shards",
        "data.max_unpack_ratio",
        "data.remote_cache_gib",
        "batch.micro_batch_size", "batch.micro_batch_sizes", "curriculum.baseline_equivalent_epochs", "model.init_from",
        "run.log_interval", "run.loggers", "run.save_interval", "run.keep_checkpoints", "run.max_skipped_steps",
        "run.picture_channels",
        "run.num_pictures", "run.picture_interval", "run.knn_interval", "run.label_free_interval", "run.knn_max_images",
        "run.compile", "run.activation_checkpointing", "run.parallel", "run.data_parallel_shard_degree",
    }
)  # fmt: skip
MICRO_BATCH = frozenset({"batch.micro_batch_size", "batch.micro_batch_sizes"})


def resume_free(kind: str) -> frozenset[str]:
    """Returns the config keys that cannot change the result of a run of this kind.

    The micro batch changes it outside pre-training: mixup, drop path and the linear probe's BatchNorm see it.
    """
    return RESUME_FREE if kind == "pretrain" else RESUME_FREE - MICRO_BATCH


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], free: frozenset[str] = RESUME_FREE) -> list[str]:
    """Lists what matters and differs between two configs (as from `to_dict`), one "key: old -> new" each."""
    flat_old, flat_new = dict(flat(old)), dict(flat(new))
    keys = [key for key in {**flat_old, **flat_new} if key not in free]
    return [
        f"{key}: {flat_old.get(key, 'absent')!r} -> {flat_new.get(key, 'absent')!r}"
        for key in keys
        if flat_old.get(key, "absent") != flat_new.get(key, "absent")
    ]
