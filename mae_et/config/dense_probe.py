"""The config of a dense probe: patch features of a frozen backbone against masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mae_et.config.data import AsTuple, Count, ImageSize, Positive, PositiveFloat
from mae_et.config.probes import NonNegative, SweepConfig
from mae_et.config.schema import BackboneConfig
from mae_et.config.section import Section, check


class DenseDataConfig(Section):
    """Images with masks. The defaults are the layout of ADE20K."""

    root: str = Field(description="Folder of the data set. The other paths are relative to it.")
    train_images: str = Field("images/training", description="Folder of the training images.")
    train_masks: str = Field(
        "annotations/training",
        description="Folder of their masks (files of the same stems, a class value in each pixel), or a file of COCO instances "
        "(.json).",
    )
    val_images: str = Field("images/validation", description="Folder of the validation images.")
    val_masks: str = Field("annotations/validation", description="Their masks, likewise.")
    classes: str = Field(
        "classes.json",
        description="Names and mask values of the classes, as for segmentation: see docs/guides/transfer.md. COCO instances "
        "bring their own; pixels without an object are the class background.",
    )
    image_size: ImageSize | None = Field(
        None,
        description="Size that images are resized to, px: the side of a square, or (height, width). None: that of the backbone "
        "file.",
    )
    mean: Annotated[tuple[float, ...] | None, AsTuple] = Field(
        None, description="Mean of each channel, pixels in [0, 1]. None: that of the backbone file, else ImageNet's."
    )
    std: Annotated[tuple[PositiveFloat, ...] | None, AsTuple] = Field(
        None, description="Standard deviation of each channel, likewise."
    )
    max_train_images: Positive = Field(1000, description="Training images that are used, evenly spread.")
    max_val_images: Positive = Field(500, description="Validation images that are used, evenly spread.")
    num_workers: Count | None = Field(None, description="Loader processes. None: chosen from the number of cores.")


class DenseSweepConfig(SweepConfig):
    """The linear heads on patches; the part that the pair is chosen on consists of whole images."""

    lrs: Annotated[tuple[PositiveFloat, ...], AsTuple] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0), description="Absolute learning rates."
    )
    weight_decays: Annotated[tuple[NonNegative, ...], AsTuple] = Field(
        (0.0,), description="Weight decays; not of the bias."
    )
    epochs: Positive = Field(10, description="Passes over the patches.")


class DenseKnnConfig(Section):
    """The nearest patches of the training images vote with their classes."""

    k: Positive = Field(30, description="Number of neighbours.")
    temperature: PositiveFloat = Field(0.07, description="Temperature of the neighbours' weights.")


class DenseRunConfig(Section):
    """How the probe is carried out."""

    seed: Count = Field(0, description="Seed of the patches that are kept, and of the order of training.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Autocast precision of the backbone."
    )


class DenseProbeConfig(Section):
    """A linear and a kNN probe of patch features."""

    folder: ClassVar[str] = "dense_probe"

    backbone: str | None = Field(None, description="Backbone file. None: random weights of `model`.")
    model: BackboneConfig = BackboneConfig()
    block: int | None = Field(
        None,
        description="Block whose raw output is probed, from 0; -1 is the last. None: the tokens after the final norm.",
    )
    data: DenseDataConfig
    max_patches: Positive = Field(
        100_000,
        description="Training patches that the heads learn from and that are neighbours; the same number of each image.",
    )
    sweep: DenseSweepConfig = DenseSweepConfig()
    knn: DenseKnnConfig = DenseKnnConfig()
    run: DenseRunConfig = DenseRunConfig()

    @check
    def _neighbours(self) -> Iterator[str]:
        if self.knn.k > self.max_patches:
            yield f"knn.k = {self.knn.k} exceeds max_patches = {self.max_patches}"
