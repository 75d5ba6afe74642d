"""The low-frequency crop against the plain FFT and bicubic resizing."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from benches.measuring import Comparison, Variants, check_equal, compare, measure
from torch import Tensor

from mae_et.lowfreq import crop_and_normalize, low_frequency_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fft_crop(images: Tensor, bandwidth: int) -> Tensor:
    """The definition: DFT, keep the centred block, scale, inverse DFT, real part."""
    height, width = images.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    top, left = height // 2 - bandwidth // 2, width // 2 - bandwidth // 2
    block = torch.fft.ifftshift(spectrum[..., top : top + bandwidth, left : left + bandwidth], dim=(-2, -1))
    return torch.fft.ifft2(block * (bandwidth**2 / (height * width))).real


def bench_lowfreq(rounds: int) -> list[Comparison]:
    pixels = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = pixels.float().div(255).sub(mean).div(std)
    rows = []
    for bandwidth, goal, bicubic_goal in ((96, 7.5, 1.0), (128, None, 1.0), (160, 5.0, None), (192, 3.7, None)):
        variants: Variants = {
            "published": partial(low_frequency_crop, images, bandwidth),
            "centered": partial(low_frequency_crop, images, bandwidth, centered=True),
            "fft": partial(fft_crop, images, bandwidth),
            "bicubic": partial(F.interpolate, images, (bandwidth, bandwidth), mode="bicubic", antialias=True),
        }
        check_equal(f"crop to {bandwidth}", variants["published"](), variants["fft"](), 1e-5)
        times = measure(variants, rounds)
        for ours in ("published", "centered"):
            rows.append(compare(f"224 -> {bandwidth}, {ours}, against FFT", times, ours, "fft", goal))
            rows.append(compare(f"224 -> {bandwidth}, {ours}, against bicubic", times, ours, "bicubic", bicubic_goal))
    decoded = pixels.permute(0, 2, 3, 1).contiguous()  # rows of RGB pixels, as decoders give them
    for layout, batch, goal in (("HWC", decoded.permute(0, 3, 1, 2), 10.0), ("CHW", pixels, None)):
        variants = {
            "published": partial(crop_and_normalize, batch, 96, MEAN, STD),
            "centered": partial(crop_and_normalize, batch, 96, MEAN, STD, centered=True),
            "fft": partial(normalize_then_fft, batch, mean, std),
        }
        check_equal("fused crop", variants["published"](), variants["fft"](), 1e-5)
        times = measure(variants, rounds)
        for ours in ("published", "centered"):
            title = f"uint8 {layout} -> normalised 96, {ours}, against normalise + FFT"
            rows.append(compare(title, times, ours, "fft", goal))
    return rows


def normalize_then_fft(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """What ToTensor and Normalize do to each image, then the crop of the batch."""
    images = [image.contiguous().float().div(255).sub(mean).div(std) for image in pixels]
    return fft_crop(torch.stack(images), 96)
