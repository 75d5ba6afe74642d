"""Augmentation of a decoded image to a uint8 tensor [C, H, W].

Shape legend: C channels (3 for mode RGB, 1 for L), H x W image_size. Normalisation comes later, on the device.
All randomness is drawn from the global generators of torch, `random` and numpy; `sample_rng` pins them for one sample.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.transforms import str_to_pil_interp
from torch.nn.functional import interpolate
from torchvision.transforms import ColorJitter, InterpolationMode
from torchvision.transforms import functional as F

from mae_et.config.schema import DataConfig
from mae_et.data.decoding import MAX_IMAGE_PIXELS
from mae_et.data.jpeg import decode_box, read_header
from mae_et.models.sizes import Size, as_size, size_text

Box = tuple[int, int, int, int]  # top, left, height and width, px
Ramp = Literal["none", "crop_scale", "randaugment"]
RAMPS: tuple[Ramp, ...] = ("none", "crop_scale", "randaugment")
_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
_TENSOR_INTERPOLATIONS = (InterpolationMode.BICUBIC, InterpolationMode.BILINEAR)  # torch's, with filtering
_RATIO = (3 / 4, 4 / 3)
_LOG_RATIO = tuple(torch.log(torch.tensor(_RATIO)).tolist())
# The colour of what RandAugment's shifts and rotations uncover: the ImageNet mean, as in timm; for grey, its luma.
_FILL = {"RGB": (124, 116, 104), "L": 117}
_LONGEST_ASPECT = 16


class TrainTransform:
    """Applies MAE's augmentation, with a choice of what grows over the curriculum.

    The base is RandomResizedCrop (aspect 3/4 to 4/3 times that of the result) and a horizontal flip with probability 1/2.
    `ramp` adds to it:

    - none: the strength has no effect (MAE's own augmentation; the control).
    - crop_scale: the smallest crop, as a share of the image's area, goes from `start_min_scale` at strength 0 linearly
      to `min_scale` at strength 1.
    - randaugment: adds timm's RandAugment of magnitude round(strength * max_magnitude), then a colour jitter of
      strength * color_jitter. As in the authors' supervised curriculum, magnitude 0 is NOT the identity: AutoContrast,
      Equalize, Invert and Posterize still act, and the magnitude has noise. Grey images skip what needs colour.

    Args:
        image_size: px, the side of a square or (H, W).
        ramp: what grows with the strength.
        min_scale: smallest share of the image's area that a crop covers, in (0, 1].
        start_min_scale: the same at strength 0, for ramp crop_scale.
        interpolation: bicubic, bilinear, lanczos or nearest; Pillow's, which filter when they reduce.
        flip: whether to flip.
        max_magnitude: RandAugment's magnitude at strength 1, in 0..10.
        color_jitter: change of brightness, contrast and saturation at strength 1, as a factor of 1 +- this; in 0..1.
    Raises:
        ValueError: if an argument is out of range.
    Source: MAE (arXiv 2111.06377) for the crop and flip; EfficientTrain++ (arXiv 2405.08768) for the magnitude's ramp.
    """

    def __init__(
        self,
        image_size: int | Size,
        ramp: Ramp = "none",
        min_scale: float = 0.2,
        start_min_scale: float = 0.67,
        interpolation: str = "bicubic",
        flip: bool = True,
        max_magnitude: float = 9.0,
        color_jitter: float = 0.4,
    ) -> None:
        image_size = _checked_size(image_size)
        if ramp not in RAMPS:
            raise ValueError(f"ramp is {ramp!r}; choose one of {', '.join(RAMPS)}")
        for name, scale in (("min_scale", min_scale), ("start_min_scale", start_min_scale)):
            if not 0 < scale <= 1:
                raise ValueError(
                    f"{name} is {scale}; it is a share of the image's area, so set it above 0 and at most 1"
                )
        if not 0 <= max_magnitude <= 10:
            raise ValueError(f"max_magnitude is {max_magnitude}; RandAugment's magnitudes are 0 to 10")
        if not 0 <= color_jitter <= 1:
            raise ValueError(f"color_jitter is {color_jitter}; set it in 0..1")
        self.image_size = image_size
        self.ramp = ramp
        self.min_scale = min_scale
        self.start_min_scale = start_min_scale
        self.interpolation = _interpolation_mode(interpolation)
        self.flip = flip
        self.max_magnitude = max_magnitude
        self.color_jitter = color_jitter
        self._rand_augments: dict[tuple[int, str], RandAugment] = {}

    def __call__(self, image: Image.Image, strength: float, size: Size | None = None) -> torch.Tensor:
        """Augments one image.

        Args:
            image: mode RGB or L.
            strength: of the ramp, in 0..1.
            size: of the result, px, with the aspect of H x W up to rounding; None: (H, W).
        Returns:
            [C, *size] uint8.
        Raises:
            ValueError: if the strength is out of range.
        """
        box, flip = self.draw_crop(image.height, image.width, strength)
        image = F.resized_crop(image, *box, list(size or self.image_size), self.interpolation)
        if flip:
            image = F.hflip(image)
        return F.pil_to_tensor(self._rand_augmented(image, strength))

    def from_jpeg(
        self, content: bytes, strength: float, size: Size | None = None, max_pixels: int = MAX_IMAGE_PIXELS
    ) -> torch.Tensor | None:
        """Augments an ordinary JPEG file faster than `__call__`: it decodes nothing below the crop and resizes tensors.

        The same random numbers give the same crop and flip. Resizing rounds some pixels to another level than `__call__`:
        70 dB or more.

        Args:
            content: of an image file.
            strength, size: as for `__call__`.
            max_pixels: larger images are left to `decode_image`.
        Returns:
            [3, *size] uint8, or None if the file is not an ordinary JPEG (see jpeg.py): decode it with `decode_image`.
        """
        header = read_header(content, max_pixels)
        if header is None or not self.resizes_tensors:
            return None
        box, flip = self.draw_crop(header.height, header.width, strength)
        region = decode_box(content, header, box)
        if region is None:
            return None
        return self._resized(region, size, flip, strength)

    def from_region(
        self, read: Callable[[Box, Size], np.ndarray], crop: tuple[Box, bool], strength: float, size: Size | None = None
    ) -> torch.Tensor:
        """Augments an image of which a part can be read.

        Args:
            read: called with the box and the size that it will be resized to; returns [h, w, C] uint8.
            crop: as from `draw_crop`; the next random numbers are those of RandAugment, if the ramp has it.
            strength, size: as for `__call__`.
        Returns:
            [C, *size] uint8, equal to `from_jpeg` of the same pixels.
        """
        box, flip = crop
        return self._resized(read(box, size or self.image_size), size, flip, strength)

    @property
    def resizes_tensors(self) -> bool:
        """Whether `from_jpeg` and `from_region` can resize: torch has no filter for the other interpolations."""
        return self.interpolation in _TENSOR_INTERPOLATIONS

    def _resized(self, region: np.ndarray, size: Size | None, flip: bool, strength: float) -> torch.Tensor:
        """Resizes [h, w, C] uint8 to [C, *size], and applies what follows the crop."""
        pixels = torch.from_numpy(region).permute(2, 0, 1)[None]
        pixels = interpolate(pixels, size or self.image_size, mode=self.interpolation.value, antialias=True)[0]
        if flip:
            pixels = pixels.flip(-1)
        if self.ramp == "randaugment":
            pixels = F.pil_to_tensor(self._rand_augmented(F.to_pil_image(pixels), strength))
        return pixels

    def draw_crop(self, height: int, width: int, strength: float) -> tuple[Box, bool]:
        """Draws the crop of an image and whether to flip it: the first random numbers of each way to augment."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; set it in 0..1")
        smallest = self.min_scale
        if self.ramp == "crop_scale":
            smallest = self.start_min_scale + strength * (self.min_scale - self.start_min_scale)
        box = draw_box(height, width, smallest, self.image_size[1] / self.image_size[0])
        return box, self.flip and torch.rand(1).item() < 0.5

    def _rand_augmented(self, image: Image.Image, strength: float) -> Image.Image:
        """Applies RandAugment and colour jitter, with ramp randaugment."""
        if self.ramp == "randaugment":
            image = self._rand_augment(round(strength * self.max_magnitude), image.mode)(image)
            amount = strength * self.color_jitter
            if amount:
                image = ColorJitter(amount, amount, amount if image.mode == "RGB" else 0)(image)
        return image

    @property
    def draws_from_torch_alone(self) -> bool:
        """Whether all random numbers come from torch, so that `sample_rng` need not seed the others."""
        return self.ramp != "randaugment"

    def _rand_augment(self, magnitude: int, mode: str) -> RandAugment:
        key = (magnitude, mode)
        if key not in self._rand_augments:
            # timm's colour operation does not change grey images, so both modes have the same list.
            hparams = {"img_mean": _FILL[mode], "interpolation": str_to_pil_interp(self.interpolation.value)}
            augment = rand_augment_transform(f"rand-m{magnitude}-mstd0.5-inc1", hparams)
            for operation in augment.ops:
                if operation.aug_fn is auto_augment.posterize:
                    operation.aug_fn = posterize
            self._rand_augments[key] = augment
        return self._rand_augments[key]


def draw_box(height: int, width: int, smallest: float, aspect: float = 1.0) -> Box:
    """Draws the crop that `RandomResizedCrop.get_params` draws from the same state of torch's generator, in less than
    half of its time: beside reading and resizing stored pixels, that counts.

    The aspect of the crop is that of the result times 3/4 to 4/3, so a rectangle is distorted no more than a square.

    Args:
        height, width: of the image, px.
        smallest: share of its area that a crop covers at least.
        aspect: width over height of the result.
    """
    narrowest, widest = (bound * aspect for bound in _RATIO)
    log_ratio = [bound + math.log(aspect) for bound in _LOG_RATIO]
    number = torch.empty(1)
    for _ in range(10):
        area = height * width * number.uniform_(smallest, 1.0).item()
        drawn = number.uniform_(*log_ratio).exp_().item()
        w, h = round(math.sqrt(area * drawn)), round(math.sqrt(area / drawn))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(torch.randint(0, end, (1,)).item()) for end in (height - h + 1, width - w + 1))
            return top, left, h, w
    w, h = width, height  # the largest central crop of an allowed aspect
    if width / height < narrowest:
        h = round(width / narrowest)
    elif width / height > widest:
        w = round(height * widest)
    return (height - h) // 2, (width - w) // 2, h, w


def posterize(image: Image.Image, bits_to_keep: int, **unused: object) -> Image.Image:
    """Keeps the highest bits of each channel, 0 (black) to 8. timm asks Pillow for 0 bits, an error since Pillow 13."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep)


def make_train_transform(data: DataConfig) -> TrainTransform:
    """Builds the training augmentation of a config."""
    options = data.augmentation
    return TrainTransform(
        data.image_size,
        ramp=options.ramp,
        min_scale=options.min_scale,
        start_min_scale=options.start_min_scale,
        flip=options.flip,
        max_magnitude=options.max_magnitude,
        color_jitter=options.color_jitter,
    )


class EvalTransform:
    """Resizes the image until it just covers image_size / crop_ratio (rounded down), and takes the centre; nothing is random.

    The aspect of the image is kept. For a square, its shorter side is resized to S / crop_ratio.

    Args:
        image_size: px, the side S of a square or (H, W).
        crop_ratio: share of the covering side that is kept, in (0, 1].
        interpolation: as for TrainTransform.
    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, image_size: int | Size, crop_ratio: float = 0.875, interpolation: str = "bicubic") -> None:
        height, width = _checked_size(image_size)
        if not 0 < crop_ratio <= 1:
            raise ValueError(f"crop_ratio is {crop_ratio}; set it above 0 and at most 1")
        self.image_size = (height, width)
        self.covered = (int(height / crop_ratio + 1e-6), int(width / crop_ratio + 1e-6))
        self.longest_aspect = _LONGEST_ASPECT * max(height / width, width / height)
        self.interpolation = _interpolation_mode(interpolation)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Mode RGB or L of any size -> [C, H, W] uint8."""
        # An enlarged image of 1 x 10000 px would take gigabytes. Its far ends are cut off later anyway.
        shorter, longer = min(image.size), max(image.size)
        margin = int(max(0, longer - self.longest_aspect * shorter)) // 2
        if margin:
            width, height = image.size
            x, y = (margin, 0) if width > height else (0, margin)
            image = image.crop((x, y, width - x, height - y))
        image = F.resize(image, self._resized_size(image.height, image.width), self.interpolation)
        return F.pil_to_tensor(F.center_crop(image, list(self.image_size)))

    def _resized_size(self, height: int, width: int) -> list[int]:
        """Returns the height and width of a resized image, px."""
        covered_height, covered_width = self.covered
        if covered_height * width >= covered_width * height:  # the height decides
            return [covered_height, max(covered_width, int(covered_height * width / height))]
        return [max(covered_height, int(covered_width * height / width)), covered_width]


@contextlib.contextmanager
def sample_rng(seed: int, torch_alone: bool = False) -> Iterator[None]:
    """Seeds the global generators of torch (CPU), `random` and numpy, and restores their states on exit.

    Args:
        seed: taken modulo 2**64. It is mixed first: neighbouring seeds have unrelated streams, and all its bits reach the
            three generators, although torch's uses only 32 bits.
        torch_alone: does not touch `random` and numpy. Takes a hundredth of the time and gives the same numbers of torch.
    """
    for_random, for_numpy = (_mix(seed + i * _GOLDEN) for i in (2, 3))
    torch_state = torch.default_generator.get_state()
    other_states = None if torch_alone else (random.getstate(), np.random.get_state())
    try:
        seed_torch(seed)
        if not torch_alone:
            random.seed(for_random)
            np.random.seed([for_numpy & 0xFFFFFFFF, for_numpy >> 32])
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        if other_states is not None:
            random.setstate(other_states[0])
            np.random.set_state(other_states[1])


def seed_torch(seed: int) -> None:
    """Seeds the global generator of torch as `sample_rng` does, and leaves it so."""
    torch.default_generator.manual_seed(_mix(seed + _GOLDEN))


_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """Applies the finaliser of SplitMix64, a bijection of 64 bits: each bit of the input affects all of the output."""
    value &= (1 << 64) - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return value ^ (value >> 31)


def _checked_size(image_size: int | Size) -> Size:
    size = as_size(image_size)
    if min(size) < 1:
        raise ValueError(f"image_size is {size_text(size)}; it is a number of pixels, so set it to 1 or more")
    return size


def _interpolation_mode(name: str) -> InterpolationMode:
    if name not in _INTERPOLATIONS:
        raise ValueError(f"interpolation is {name!r}; choose one of {', '.join(_INTERPOLATIONS)}")
    return InterpolationMode(name)
