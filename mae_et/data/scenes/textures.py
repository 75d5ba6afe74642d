"""Noise and colour of the generated scenes.

Shapes: h, w of a patch. Colour is planar, [3, h, w] float32 in 0..1, because numpy is slow on a last axis of length 3.
"""

import colorsys
import functools

import numpy as np

Array = np.ndarray

_BANK_SIDE = 512
# Exponent of 1/f in amplitude; natural images lie near 1.
_BANK_SLOPES = {"grain": 0.35, "rough": 1.0, "cloud": 1.6, "relief": 1.35}


@functools.cache
def _noise_bank(kind: str) -> Array:
    """Returns one period of tileable 1/f noise, [512 * 512] float32, mean 0, deviation 1.

    It is made once per process and read at random offsets: an FFT for every scene would take longer than the drawing.
    """
    side = _BANK_SIDE
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([side, list(_BANK_SLOPES).index(kind)])))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = 1.0
    spectrum = np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency ** _BANK_SLOPES[kind]
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=(side, side))
    if kind == "relief":  # a height field lit from the upper left
        field = field - np.roll(field, (2, 2), axis=(0, 1))
    field /= field.std()
    return np.clip(field, -3.0, 3.0).astype(np.float32).ravel()


def noise(rng: np.random.Generator, kind: str, x: Array, y: Array) -> Array:
    """Returns noise at the coordinates x, y (texels, broadcast against each other), from a random place of the bank."""
    offset_x, offset_y = (8192.0 + _BANK_SIDE * rng.random(2)).tolist()
    # intp, because take would convert any other integers.
    column = (x + np.float32(offset_x)).astype(np.intp) & (_BANK_SIDE - 1)
    row = ((y + np.float32(offset_y)).astype(np.intp) & (_BANK_SIDE - 1)) * _BANK_SIDE
    return _noise_bank(kind).take(row + column)


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """Draws a number from low to high."""
    return low + (high - low) * rng.random()


def choose(rng: np.random.Generator, count: int) -> int:
    """Draws an integer from 0 to count - 1."""
    # random() alone: its stream has been the same in every numpy since 1.17.
    return int(rng.random() * count)


def hsv(hue: float, saturation: float, value: float) -> Array:
    """Returns RGB [3, 1, 1]. A hue of 0 to 1 is once around the colour circle, and only its fraction counts."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32).reshape(3, 1, 1)


def mix(first: Array, second: Array, amount: Array | float) -> Array:
    """Interpolates from first (amount 0) to second (amount 1); colours [3, ...], amount [h, w]."""
    return first + (second - first) * amount


def unit(values: Array) -> Array:
    """Clips to 0..1."""
    values = np.maximum(values, 0.0)
    return np.minimum(values, 1.0, out=values)


def wave(phase: Array, sharpness: float = 3.0) -> Array:
    """Returns a square wave with soft edges, 0..1, of period 2 pi."""
    return unit(0.5 + sharpness * np.sin(phase))
