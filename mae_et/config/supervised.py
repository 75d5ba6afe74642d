"""The config of supervised training: any timm classifier under the curriculum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mae_et.config.data import AsTuple, AugmentationConfig, Positive, PositiveFloat, UnitInterval
from mae_et.config.filters import FilteredDataConfig
from mae_et.config.schema import BatchConfig, NetworkConfig, OptimizerConfig, RegularizationConfig
from mae_et.config.section import check, unused
from mae_et.config.training import CurriculumConfig, TrainConfig

# Arguments of timm.create_model that other keys of the config set.
OWN_OPTIONS = {
    "model_name": "model.name",
    "drop_path_rate": "model.drop_path_rate",
    "in_chans": "model.in_chans",
    "num_classes": "the classes of data.train",
    "img_size": "data.image_size",
    "pretrained": "model.init_from",
    "pretrained_cfg": "model.name",
    "pretrained_cfg_overlay": "model.name",
    "checkpoint_path": "model.init_from",
    "features_only": "the task, which trains a classifier",
    "device": "--device",
    "dtype": "run.precision",
}


class TimmModelConfig(NetworkConfig):
    """A classifier of timm, or CSWin or PVT v1 of this package."""

    name: str = Field(
        "resnet50", description='Name of the model, e.g. "resnet50", "deit_small_patch16_224", "cswin_tiny_224".'
    )
    options: dict[str, Any] = Field(
        {}, description='Further arguments of timm.create_model, e.g. {"patch_size": 8} or {"drop_rate": 0.4}.'
    )
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Stochastic depth of the last block.")
    drop_path_epochs: PositiveFloat | None = Field(
        None,
        description="Equivalent epochs that drop_path_rate is meant for. Another budget scales it in proportion. None: not "
        "scaled.",
    )
    init_from: str | None = Field(
        None,
        description="Backbone or classifier file to start from. A head of other classes is matched by class names.",
    )

    @property
    def size_multiple(self) -> int:
        """Any size is accepted here: only the model knows its sizes. They are checked when the plan is made."""
        return 1

    @check
    def _own_options(self) -> Iterator[str]:
        for key in sorted(OWN_OPTIONS.keys() & self.options.keys()):
            yield f"options has {key!r}, which follows from {OWN_OPTIONS[key]}: remove it"


class SupervisedAugmentationConfig(AugmentationConfig):
    """RandomResizedCrop, flip and a RandAugment whose magnitude follows the strength."""

    ramp: Literal["none", "crop_scale", "randaugment"] = Field(
        "randaugment", description=AugmentationConfig.model_fields["ramp"].description
    )
    min_scale: UnitInterval = Field(0.08, description=AugmentationConfig.model_fields["min_scale"].description)
    color_jitter: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description=AugmentationConfig.model_fields["color_jitter"].description
    )


class SupervisedDataConfig(FilteredDataConfig):
    """Labelled images."""

    classes: str | None = Field(
        None,
        description='Order of the classes: a text file with one name per line, or a list of timm such as "imagenet-22k". '
        "Classes without images keep their numbers; others than those of the list are refused. None: the sorted subfolders.",
    )
    num_classes: Positive | None = Field(
        None, description="Number of classes that the data must have. None: any number."
    )
    augmentation: SupervisedAugmentationConfig = SupervisedAugmentationConfig()


class SupervisedCurriculumConfig(CurriculumConfig):
    """The curriculum of a supervised run. Defaults: the released EfficientTrain++ recipe at 200 of 300 epochs."""

    equivalent_epochs: PositiveFloat = Field(200.0, description="Compute budget, in epochs at full image size.")
    baseline_equivalent_epochs: PositiveFloat = Field(
        300.0, description="Budget of the run that this one is compared with."
    )
    warmup_equivalent_epochs: Annotated[float, Field(ge=0)] = Field(
        3.67, description="Length of the linear warm-up of the learning rate, in equivalent epochs."
    )
    published_speedup: PositiveFloat | None = Field(
        None,
        description="Speed-up by compute that the authors publish for this model and budget. `mae-et plan` prints it beside "
        "its own count.",
    )


class SupervisedOptimizerConfig(OptimizerConfig):
    """AdamW or LAMB. The defaults are those of the released EfficientTrain++ recipe."""

    name: Literal["adamw", "lamb"] = Field("adamw", description="The optimizer.")
    base_lr: PositiveFloat = Field(2.5e-4, description=OptimizerConfig.model_fields["base_lr"].description)
    min_lr: Annotated[float, Field(ge=0)] = Field(1e-6, description=OptimizerConfig.model_fields["min_lr"].description)
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], AsTuple
    ] = Field((0.9, 0.999), description=OptimizerConfig.model_fields["betas"].description)  # fmt: skip
    layer_decay: UnitInterval = Field(1.0, description="Factor of the lr from each layer to the one before.")


class SupervisedConfig(TrainConfig):
    """A supervised training."""

    folder: ClassVar[str] = "supervised"

    data: SupervisedDataConfig
    model: TimmModelConfig = TimmModelConfig()
    curriculum: SupervisedCurriculumConfig = SupervisedCurriculumConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: SupervisedOptimizerConfig = SupervisedOptimizerConfig()
    regularization: RegularizationConfig = RegularizationConfig()
    eval_interval: Positive | None = Field(
        None, description="Steps between accuracies on data.val. None: after each tenth of the run."
    )

    @check
    def _even_batches(self) -> Iterator[str]:
        mixes = self.regularization.mixup or self.regularization.cutmix
        batches = (self.batch.global_batch_size, self.batch.micro_batch_size or 2, *self.batch.micro_batch_sizes)
        if mixes and any(batch % 2 for batch in batches):
            yield "mixup and cutmix mix pairs of images, so batch sizes must be even"

    @check
    def _drop_path(self) -> Iterator[str]:
        rate = self.scaled_drop_path_rate
        if rate >= 1:
            yield (
                f"model.drop_path_rate = {self.model.drop_path_rate:g} for {self.model.drop_path_epochs:g} epochs "
                f"(model.drop_path_epochs) becomes {rate:.3g} at curriculum.equivalent_epochs = "
                f"{self.curriculum.equivalent_epochs:g}, but must stay below 1: lower it, or set model.drop_path_epochs=None"
            )

    @property
    def scaled_drop_path_rate(self) -> float:
        """The stochastic depth of the last block, scaled with the budget if the config says so.

        Source: released code of EfficientTrain++ (arXiv 2405.08768), whose rates are given for 200 equivalent epochs.
        """
        rate, epochs = self.model.drop_path_rate, self.model.drop_path_epochs
        return rate if epochs is None else rate * self.curriculum.equivalent_epochs / epochs

    @check
    def _unused(self) -> Iterator[str]:
        if not self.model.drop_path_rate:
            yield from unused(self.model, ["drop_path_epochs"], "model.drop_path_rate = 0", "model.")
        if self.data.val is None:
            yield from unused(self, ["eval_interval"], "data.val = None")
