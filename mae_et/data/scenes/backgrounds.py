"""The canvas of a generated scene and its backgrounds: sky, walls and grounds.

Each painter fills a band of rows. Shapes: H, W of the image, h, w of a band of rows, in px.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mae_et.data.scenes.textures import Array, between, choose, hsv, mix, noise, unit, wave


@dataclass(frozen=True)
class _View:
    """Coordinates of a band of rows.

    Attributes:
        x: [1, w] px.
        y: [h, 1] px from the band's top.
        across: [h, w] or [1, w], position on the ground plane in image sides at the lower edge.
        depth: [h, 1], distance on the ground plane in the same unit.
        near: [h, 1], 1 close by, towards 0 at the horizon: how much fine detail is left.
        large: texels of the noise bank for one px in large forms, about 300 for the shorter image side.
        fine: the same in fine textures; close to 1, because sparser reading turns 1/f noise into white noise.
        unit: texels for one unit of across and depth, in fine textures.
    """

    x: Array
    y: Array
    across: Array
    depth: Array
    near: Array
    large: float
    fine: float
    unit: float


def _make_view(top: int, bottom: int, width: int, side: int, horizon: float | None, centre: float) -> _View:
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(bottom - top, dtype=np.float32)[:, None]
    if horizon is None:
        across, depth, near = (x - centre) / side * 1.3, -y / side * 1.3, np.ones_like(y)
    else:
        below = np.maximum((y + top - horizon) / max(bottom - horizon, 1.0), 0.0)
        depth = 1.0 / (below + 0.14)
        across = (x - centre) / side * depth
        near = 0.25 + 0.75 * below
    fine = max(160.0 / side, 1.0)
    return _View(x, y, across, depth, near, max(300.0 / side, 1.0), fine, fine * side)


def _paint_sky(rng: np.random.Generator, view: _View) -> Array:
    kind = choose(rng, 5)
    hue = (0.58, 0.56, 0.60, 0.66, 0.10)[kind] + between(rng, -0.03, 0.03)
    saturation = (0.62, 0.40, 0.10, 0.35, 0.30)[kind]
    low_hue = (hue, hue, hue, 0.06, 0.08)[kind]
    high = hsv(hue, saturation, between(rng, 0.55, 0.85))
    low = hsv(low_hue, saturation * (0.45 if kind < 3 else 1.2), between(rng, 0.85, 0.97))
    down = view.y / max(len(view.y), 1)
    clouds = noise(rng, "cloud", view.x * 0.7 * view.large, view.y * 1.5 * view.large)
    wisps = noise(rng, "rough", view.x * 0.8 * view.fine, view.y * 1.3 * view.fine)
    cover = unit(0.6 * clouds + 0.22 * wisps + between(rng, -0.5, 0.35)) * between(rng, 0.6, 1.0)
    cloud = hsv(low_hue, 0.05, 0.99) * (0.93 + 0.06 * np.minimum(clouds, 1.2) + 0.03 * wisps - 0.08 * down)
    return mix(mix(high, low, down), cloud, cover)


def _paint_mountain(rng: np.random.Generator, view: _View) -> Array:
    hue = (0.60, 0.30, 0.07, 0.68)[choose(rng, 4)] + between(rng, -0.04, 0.04)
    value, scale = between(rng, 0.4, 0.65), view.fine
    rock = noise(rng, "relief", view.x * scale * 0.8, view.y * scale)
    patches = noise(rng, "rough", view.x * scale, view.y * scale)
    tone = unit(0.45 + 0.2 * rock + 0.12 * patches)
    saturation = between(rng, 0.12, 0.4)
    ramp = mix(hsv(hue, saturation, value * 0.6), hsv(hue + 0.03, saturation * 0.6, value * 1.35), tone)
    return mix(ramp, hsv(0.6, 0.15, 0.85), 0.35 * between(rng, 0.2, 1.0) * view.y / max(len(view.y), 1))


def _paint_forest(rng: np.random.Generator, view: _View) -> Array:
    hue, scale = between(rng, 0.20, 0.42) if rng.random() < 0.7 else between(rng, 0.02, 0.14), view.fine
    crowns = noise(rng, "relief", view.x * scale * 0.7, view.y * scale * 0.8)
    leaves = noise(rng, "grain", view.x * scale * 0.8, view.y * scale * 0.8)
    tone = unit(0.4 + 0.22 * crowns + 0.08 * leaves)
    value = between(rng, 0.45, 0.7)
    return mix(hsv(hue + 0.05, 0.55, value * 0.25), hsv(hue - 0.02, between(rng, 0.3, 0.55), value), tone)


def _paint_grass(rng: np.random.Generator, view: _View) -> Array:
    hue, saturation = between(rng, 0.13, 0.33), between(rng, 0.32, 0.6)
    patches = noise(rng, "rough", view.across * 130, view.depth * 130)
    blades = noise(rng, "rough", view.across * 1.7 * view.unit, view.depth * 0.45 * view.unit)
    tone = unit(0.48 + 0.08 * patches + view.near * 0.21 * blades)
    value = between(rng, 0.55, 0.8)
    ramp = mix(hsv(hue + 0.06, saturation, value * 0.38), hsv(hue, saturation * 0.8, value * 1.15), tone)
    return ramp + (hsv(0.11, 0.5, 0.6) - ramp) * unit(0.1 * patches)


def _paint_sand(rng: np.random.Generator, view: _View) -> Array:
    hue, saturation, value = between(rng, 0.03, 0.14), between(rng, 0.12, 0.45), between(rng, 0.55, 0.85)
    drift = noise(rng, "cloud", view.across * 110, view.depth * 110)
    grain = noise(rng, "relief", view.across * view.unit, view.depth * view.unit)
    speckle = noise(rng, "grain", view.x * 1.4, view.y * 1.4)
    ripples = np.sin((between(rng, 14, 34) * view.depth + between(rng, -6, 6) * view.across) + 2.6 * drift)
    tone = 0.5 + 0.1 * drift + view.near * (0.14 * grain + between(rng, 0.0, 0.14) * ripples + 0.05 * speckle)
    return mix(hsv(hue, saturation * 1.3, value * 0.55), hsv(hue + 0.02, saturation * 0.8, value * 1.12), unit(tone))


def _paint_water(rng: np.random.Generator, view: _View) -> Array:
    hue, saturation, value = between(rng, 0.44, 0.64), between(rng, 0.25, 0.65), between(rng, 0.45, 0.75)
    swell = noise(rng, "cloud", view.across * 60, view.depth * 200)
    waves = noise(rng, "relief", view.across * 0.35 * view.unit, view.depth * view.unit)
    tone = 0.42 + 0.1 * swell + (0.3 + 0.7 * view.near) * 0.16 * waves
    ramp = mix(hsv(hue, saturation, value * 0.5), hsv(hue - 0.03, saturation * 0.55, value * 1.2), unit(tone))
    return ramp + between(rng, 0.05, 0.35) * view.near * unit(0.9 * waves - 1.2)


def _paint_wall(rng: np.random.Generator, view: _View) -> Array:
    hue, saturation, value = rng.random(), between(rng, 0.04, 0.38), between(rng, 0.5, 0.88)
    scale, style = view.fine, choose(rng, 3)
    plaster = noise(rng, "relief", view.x * scale, view.y * scale)
    stains = noise(rng, "rough", view.x * view.large, view.y * view.large * 0.7)
    tone = 0.55 + between(rng, 0.02, 0.08) * plaster + 0.07 * stains
    pitch = 2 * math.pi / (view.x.shape[1] * between(rng, 0.08, 0.18))
    if style == 1:  # wallpaper
        tone = tone + between(rng, 0.06, 0.16) * (wave(view.x * pitch + between(rng, 0, 6), 2.0) - 0.5)
    elif style == 2:  # boards: a dark joint and a grain that runs along
        tone = tone - 0.3 * unit(4.0 * np.cos(view.x * pitch + between(rng, 0, 6)) - 3.0)
        tone = tone + 0.11 * noise(rng, "rough", view.x * scale * 1.6, view.y * scale * 0.25)
    return mix(hsv(hue, saturation * 1.2, value * 0.6), hsv(hue + 0.02, saturation * 0.8, value * 1.12), unit(tone))


def _paint_floor(rng: np.random.Generator, view: _View) -> Array:
    hue, saturation, value = between(rng, 0.02, 0.12), between(rng, 0.2, 0.55), between(rng, 0.4, 0.75)
    along, count = view.depth, between(rng, 5.0, 9.0)
    lane = view.across * count
    row = np.floor(lane)
    if rng.random() < 0.5:  # planks
        grain = noise(rng, "rough", view.across * 1.6 * view.unit, view.depth * 0.25 * view.unit)
        tile = noise(rng, "grain", row * 7.0, np.floor(along * 0.9 + 0.37 * row) * 11.0)
    else:  # tiles
        hue, saturation = rng.random(), saturation * 0.5
        grain = noise(rng, "rough", view.across * view.unit, view.depth * view.unit)
        tile = 1.0 - 2.0 * np.mod(row + np.floor(along * count), 2.0) + 0 * grain
        tile = tile + 0.3 * noise(rng, "grain", row * 7.0, np.floor(along * count) * 11.0)
    joint = unit(np.abs(lane - row - 0.5) * 22.0 - 9.8)
    tone = 0.52 + (0.3 + 0.7 * view.near) * (0.12 * grain + 0.1 * tile - 0.35 * joint)
    return mix(hsv(hue, saturation, value * 0.5), hsv(hue + 0.02, saturation * 0.8, value * 1.2), unit(tone))


# In the order of the semantic values.
BACKGROUND_PAINTERS: dict[str, Callable[[np.random.Generator, _View], Array]] = {
    "sky": _paint_sky,
    "mountain": _paint_mountain,
    "forest": _paint_forest,
    "grass": _paint_grass,
    "sand": _paint_sand,
    "water": _paint_water,
    "wall": _paint_wall,
    "floor": _paint_floor,
}
_STUFF_ID = {name: number for number, name in enumerate(BACKGROUND_PAINTERS)}


CLUTTER = -1


class Canvas:
    """The picture during drawing, with the owner of each pixel.

    Attributes:
        colour: [3, H, W] float32.
        stuff: [H, W] uint8, the background: place in BACKGROUND_PAINTERS.
        owner: [H, W] int8: 0 background, k the k-th painted object, CLUTTER.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width, self.side = height, width, min(height, width)
        self.colour = np.zeros((3, height, width), np.float32)
        self.stuff = np.zeros((height, width), np.uint8)
        self.owner = np.zeros((height, width), np.int8)

    def fill_band(self, name: str, top: int, colour: Array, alpha: Array | None = None) -> None:
        """Blends colour [3, h, W] into the rows from top on by alpha [h, W]; fully by default."""
        rows = slice(top, top + colour.shape[1])
        if alpha is None:
            self.colour[:, rows] = colour
            self.stuff[rows] = _STUFF_ID[name]
        else:
            self.colour[:, rows] += (colour - self.colour[:, rows]) * alpha
            self.stuff[rows][alpha > 0.5] = _STUFF_ID[name]

    def clip(self, top: int, left: int, shape: tuple[int, ...]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Returns the part of a patch that lies inside: (slices of the picture, slices of the patch)."""
        y0, x0 = max(top, 0), max(left, 0)
        y1, x1 = min(top + shape[0], self.height), min(left + shape[1], self.width)
        y1, x1 = max(y0, y1), max(x0, x1)
        return (slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))

    def darken(self, alpha: Array, top: int, left: int) -> None:
        """Removes the fraction alpha [h, w] of the light."""
        inside, part = self.clip(top, left, alpha.shape)
        self.colour[:, inside[0], inside[1]] *= 1.0 - alpha[part]

    def paste(self, colour: Array, alpha: Array, top: int, left: int, owner: int) -> None:
        """Blends colour [3, h, w] into the picture by alpha [h, w]."""
        inside, part = self.clip(top, left, alpha.shape)
        target = self.colour[:, inside[0], inside[1]]
        target += (colour[:, part[0], part[1]] - target) * alpha[part]
        self.owner[inside][alpha[part] > 0.5] = owner


def _outline(rng: np.random.Generator, canvas: Canvas, kind: str, height: float, rate: float = 0.6) -> Array:
    """Draws a wavy line over the width, [W] float32 in px, about +-height around 0."""
    x = np.arange(canvas.width, dtype=np.float32) * max(300.0 / canvas.side, 1.0) * rate
    line = noise(rng, kind, x, np.zeros(1, np.float32))
    return (line - line.mean()) * np.float32(height / max(float(np.abs(line - line.mean()).max()), 1e-3))


def draw_background(rng: np.random.Generator, canvas: Canvas) -> bool:
    """Fills the canvas; returns whether the ground is seen vertically from above."""
    height, width, side = canvas.height, canvas.width, canvas.side
    centre = width * between(rng, 0.2, 0.8)
    layout = rng.random()
    y = np.arange(height, dtype=np.float32)[:, None]

    if layout < 0.2:  # from above: one ground, and often a second beyond a wavy border
        view = _make_view(0, height, width, side, None, centre)
        grounds = ("grass", "sand", "water", "floor")
        first = choose(rng, 4)
        canvas.fill_band(grounds[first], 0, BACKGROUND_PAINTERS[grounds[first]](rng, view))
        if rng.random() < 0.6:
            second = grounds[(first + 1 + choose(rng, 3)) % 4]
            angle = between(rng, 0, 2 * math.pi)
            slope = (view.x - width / 2) * math.cos(angle) + (y - height / 2) * math.sin(angle)
            wavy = noise(rng, "cloud", view.x * view.large * 0.5, y * view.large * 0.5)
            alpha = unit(slope + side * (0.05 * wavy - between(rng, 0.0, 0.25)))
            canvas.fill_band(second, 0, BACKGROUND_PAINTERS[second](rng, view), alpha)
        return True

    indoor = layout < 0.45
    horizon = height * (between(rng, 0.45, 0.68) if indoor else between(rng, 0.28, 0.55))
    tilt = (np.arange(width, dtype=np.float32) - width / 2) * between(rng, -0.04, 0.04)
    edge = horizon + tilt
    if not indoor:
        edge = edge + _outline(rng, canvas, "rough", side * 0.015)
    upper_rows = min(height, int(edge.max()) + 2)
    upper = _make_view(0, upper_rows, width, side, None, centre)
    name = "wall" if indoor else "sky"
    canvas.fill_band(name, 0, BACKGROUND_PAINTERS[name](rng, upper))

    if not indoor and rng.random() < 0.75:
        name = ("mountain", "forest")[choose(rng, 2)]
        if name == "mountain":
            rise = side * between(rng, 0.1, 0.25)
            crest = edge - rise + _outline(rng, canvas, "cloud", rise * 0.9, 0.35) + _outline(rng, canvas, "rough", 1.5)
        else:
            rise = side * between(rng, 0.05, 0.15)
            crest = edge - rise + _outline(rng, canvas, "rough", rise * 0.6)
        top = max(0, int(crest.min()))
        band = _make_view(top, upper_rows, width, side, None, centre)
        canvas.fill_band(name, top, BACKGROUND_PAINTERS[name](rng, band), unit(band.y + top - crest + 0.5))

    name = "floor" if indoor else ("grass", "sand", "water", "grass", "sand", "floor")[choose(rng, 6)]
    top = max(0, int(edge.min()) - 1)
    ground = _make_view(top, height, width, side, float(horizon), centre)
    alpha = unit(ground.y + top - edge + 0.5)
    canvas.fill_band(name, top, BACKGROUND_PAINTERS[name](rng, ground), alpha)
    if not indoor and rng.random() < 0.35:  # a shore or a path
        second = {"grass": "sand", "sand": "water", "water": "sand", "floor": "grass"}[name]
        wavy = noise(rng, "cloud", ground.x * ground.large * 0.3, ground.y * ground.large)
        across = (ground.across - between(rng, -0.3, 0.3)) * (1 if rng.random() < 0.5 else -1) + 0.12 * wavy - 0.15
        canvas.fill_band(second, top, BACKGROUND_PAINTERS[second](rng, ground), alpha * unit(across * side * 0.4))
    if indoor:  # skirting shadow where the wall meets the floor
        canvas.colour *= 1.0 - 0.35 * np.exp(-np.abs(y - edge) * (28.0 / side))
    return False
