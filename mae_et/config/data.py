"""The data section of all training configs, and the types of values that the sections share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from mae_et.config.section import Section, check, unused
from mae_et.config.source_list import join_sources, split_sources
from mae_et.models.sizes import Size, as_size, plain_size, size_text

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
UnitInterval = Annotated[float, Field(gt=0, le=1)]
Source = Annotated[str, BeforeValidator(join_sources)]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


def as_sides(value: object) -> object:
    """Turns the side of a square into (height, width). Other values are left to the check of the type."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return as_size(value)
    return tuple(value) if isinstance(value, list) else value


_SIDE = {"type": "integer", "minimum": 1}
# An int in a file, for a square, is (height, width) in the config, and is written as an int again.
ImageSize = Annotated[
    tuple[Positive, Positive],
    BeforeValidator(as_sides),
    PlainSerializer(plain_size, when_used="json"),
    WithJsonSchema({"type": "array", "prefixItems": [_SIDE, _SIDE], "or_integer": True}),
]


def shorter_side(image_size: Size) -> str:
    """Names the limit of bandwidths in messages."""
    shown = f"data.image_size = {size_text(image_size)}"
    return shown if image_size[0] == image_size[1] else f"{min(image_size)}, the shorter side of {shown}"


class AugmentationConfig(Section):
    """RandomResizedCrop and flip, and how they grow with the strength (0 to 1) that the curriculum gives."""

    ramp: Literal["none", "crop_scale", "randaugment"] = Field("none", description="What the strength acts on.")
    min_scale: UnitInterval = Field(0.2, description="Smallest fraction of the area that a crop keeps.")
    start_min_scale: UnitInterval = Field(0.67, description='min_scale at strength 0, with ramp = "crop_scale".')
    flip: bool = Field(True, description="Flips half of the images horizontally.")
    max_magnitude: Annotated[float, Field(ge=0, le=10)] = Field(
        9.0, description='Magnitude of RandAugment at strength 1, with ramp = "randaugment".'
    )
    color_jitter: Fraction = Field(0.4, description='Colour jitter at strength 1, with ramp = "randaugment".')

    @check
    def _scales(self) -> Iterator[str]:
        if self.ramp == "crop_scale" and self.start_min_scale < self.min_scale:
            yield f"start_min_scale = {self.start_min_scale} must not be below min_scale = {self.min_scale}"

    @check
    def _unused(self) -> Iterator[str]:
        reason = f"ramp = {self.ramp!r}"
        if self.ramp != "crop_scale":
            yield from unused(self, ["start_min_scale"], reason)
        if self.ramp != "randaugment":
            yield from unused(self, ["max_magnitude", "color_jitter"], reason)


class DataConfig(Section):
    """Where the images are and how they are read."""

    train: Source = Field(
        description='Training images: a folder, a list file or table ("train.txt", "train.csv"), tar shards '
        '("train-{000..099}.tar"), raw shards ("train.raw.json"), "datasets:FOLDER", "scenes:NUM@SIZE", or a list of these; '
        "see docs/guides/data.md."
    )
    train_weights: Annotated[tuple[PositiveFloat, ...], AsTuple] = Field(
        (),
        description="Sampling weight of each source of a list in `train`, on any scale. (): every image is shown equally often.",
    )
    val: Source | None = Field(
        None, description="Labelled images for validation: accuracies, of kNN during pre-training. None: no accuracies."
    )
    image_size: ImageSize = Field(
        (224, 224),
        description="Size of the images, px: the side of a square, or (height, width); the size of the last stage.",
    )
    num_images: Positive | None = Field(
        None, description="Number of images that `train` should hold. `mae-et plan` plans with it."
    )
    mean: Annotated[tuple[float, ...], AsTuple] = Field(
        (0.485, 0.456, 0.406),
        description="Mean of each channel, pixels in [0, 1]. `mae-et stats` measures it.",
    )
    std: Annotated[tuple[PositiveFloat, ...], AsTuple] = Field(
        (0.229, 0.224, 0.225), description="Standard deviation of each channel, pixels in [0, 1]."
    )
    augmentation: AugmentationConfig = AugmentationConfig()
    num_repeats: Positive = Field(
        1,
        description="Repeated augmentation: times that each drawn image is shown in a row, each time augmented again.",
    )
    loading: Literal["exact", "fast", "direct"] = Field(
        "exact", description="How training images are decoded: see docs/guides/loading.md before changing it."
    )
    shuffle_block: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="Number of neighbouring images that stay together when the data set is shuffled, and are read ahead: 16 to "
        "64 for shared and spinning disks. It makes the images of a step alike: see docs/guides/large_sets.md.",
    )
    num_workers: Count | None = Field(
        None, description="Loader processes for each training process. None: chosen from the number of cores."
    )
    eval_crop_ratio: UnitInterval = Field(
        0.875, description="Fraction of the shorter side that the centre crop of evaluation keeps."
    )
    max_bad_fraction: Fraction = Field(
        0.01, description="The run stops if more than this fraction of the images is unreadable."
    )
    value_range: Annotated[tuple[float, float], AsTuple] | None = Field(
        None,
        description="Stored values (black, white) of images that are not 8-bit, e.g. (0, 4095): they become 0 and 1 in float32, "
        "and values outside are clipped. 8-bit images have (0, 255). None: all images are read with 8 bits.",
    )
    max_image_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = Field(
        67_108_864, description="Images with more pixels count as unreadable; a small file can unpack to gigabytes."
    )
    max_shards: Positive = Field(100_000, description="Limit for the number of shards that a pattern names.")
    max_unpack_ratio: Annotated[float, Field(gt=1)] = Field(
        30.0, description="Limit for the unpacked size of a gzip shard over the size of its file."
    )
    remote_cache_gib: Annotated[float, Field(ge=0)] = Field(
        100.0,
        description="Limit for what is kept of remote shards in the cache folder, GiB of all remote data sets together. A data "
        "set keeps the room that it had when it was first opened.",
    )

    @check
    def _value_range(self) -> Iterator[str]:
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            yield f"value_range = {list(self.value_range)} must be (black, white) with black < white"

    @check
    def _train_weights(self) -> Iterator[str]:
        num_weights, num_sources = len(self.train_weights), len(split_sources(self.train))
        if num_sources == 1:
            yield from unused(self, ["train_weights"], "one source in train")
        elif num_weights not in (0, num_sources):
            yield (
                f"train_weights has {num_weights} values, but train lists {num_sources} sources: give one weight for each, in "
                "their order"
            )
