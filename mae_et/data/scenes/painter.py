"""Generated demo scenes: textured objects on textured ground, with labels, boxes, masks and semantic maps.

They are a data set without a download: (seed, index) determines every picture. Classes differ in shape and texture. Colours
are drawn independently of the class, so the mean colour carries no information about it.

Shape legend: H, W image height and width in px; h, w those of a patch; K labelled objects. Colour is planar, [3, h, w]
float32 in 0..1, until the very end.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from mae_et.data.scenes.backgrounds import BACKGROUND_PAINTERS, CLUTTER, Canvas, draw_background
from mae_et.data.scenes.objects import CLUTTER_PAINTERS, OBJECT_PAINTERS, UPRIGHT, Material, Painter
from mae_et.data.scenes.textures import Array, between, choose, hsv, mix, noise, unit
from mae_et.errors import UserError

SCENE_CLASSES: tuple[str, ...] = tuple(OBJECT_PAINTERS)  # ball, box, cone, ...
STUFF_CLASSES: tuple[str, ...] = tuple(BACKGROUND_PAINTERS)  # sky, mountain, ...
MIN_SIDE = 32
MIN_VISIBLE_PIXELS = 16
MIN_MAIN_VISIBLE = 0.75
_PAINTERS = tuple(OBJECT_PAINTERS.values())


@dataclass(frozen=True)
class Scene:
    """One picture with its annotations; K objects, the main one first.

    Attributes:
        image: [H, W, 3] uint8.
        label: class of the main object, an index into SCENE_CLASSES.
        boxes: [K, 4] float32, x0, y0, x1, y1 in px around the visible mask; right and bottom are exclusive.
        classes: [K] int64, indices into SCENE_CLASSES.
        masks: [K, H, W] bool, the visible parts; no two overlap.
        semantic_map: [H, W] uint8: 0 is unlabelled clutter, then SCENE_CLASSES from 1 on, then STUFF_CLASSES.
    """

    image: np.ndarray
    label: int
    boxes: np.ndarray
    classes: np.ndarray
    masks: np.ndarray
    semantic_map: np.ndarray


def _pad(values: Array, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
    """Pads [h, w] with zeros (before, after). np.pad would take a sixth of the time of a scene of 64 px."""
    height, width = values.shape
    padded = np.zeros((height + sum(rows), width + sum(columns)), values.dtype)
    padded[rows[0] : rows[0] + height, columns[0] : columns[0] + width] = values
    return padded


def _blur(values: Array, size: int) -> Array:
    """Applies two box blurs of the given width; [h, w] -> [h, w], zero outside."""
    if size < 2:
        return values
    for _ in range(2):
        total = _pad(values, (size // 2 + 1, size - size // 2 - 1), (size // 2 + 1, size - size // 2 - 1))
        np.cumsum(total, 0, out=total)
        np.cumsum(total, 1, out=total)
        values = (total[size:, size:] - total[size:, :-size] - total[:-size, size:] + total[:-size, :-size]) / size**2
    return values


@functools.lru_cache(maxsize=256)
def _fade(num_rows: int) -> Array:
    """Returns the darkness of a shadow on the ground, [num_rows, 1] from far to near."""
    return np.linspace(0.55, 1.0, num_rows, dtype=np.float32)[:, None]


def _random_colours(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Draws three colours of any hue that differ in lightness, so that every texture is visible."""
    hue = rng.random()
    bright = hsv(hue, between(rng, 0.15, 0.75), between(rng, 0.7, 0.95))
    dark = hsv(hue + between(rng, 0.15, 0.85), between(rng, 0.3, 0.75), between(rng, 0.2, 0.5))
    pale = hsv(rng.random(), between(rng, 0.1, 0.4), between(rng, 0.7, 0.95))
    return (bright, dark, pale) if rng.random() < 0.5 else (mix(dark, bright, 0.3), bright, pale)


class _Stage:
    """Draws objects under one light and keeps the main one visible."""

    def __init__(self, rng: np.random.Generator, canvas: Canvas, from_above: bool) -> None:
        self.rng, self.canvas, self.from_above = rng, canvas, from_above
        across, up, front = between(rng, -0.75, 0.75), -between(rng, 0.35, 0.8), between(rng, 0.45, 0.8)
        length = math.sqrt(across**2 + up**2 + front**2)
        self.light = (across / length, up / length, front / length)
        self.ambient = between(rng, 0.38, 0.55)
        self.shadow = between(rng, 0.35, 0.65)
        self.main_owner, self.main_area = 0, 0

    def place(self, draw: Painter, x: float, y: float, radius: float, angle: float, owner: int) -> bool:
        """Draws one shape around (x, y) px. If it would hide the main object, draws nothing and returns False."""
        rng, canvas = self.rng, self.canvas
        reach = math.ceil(radius * 1.22) + 1
        left, top = int(x) - reach, int(y) - reach
        offset = np.arange(2 * reach + 1, dtype=np.float32) - reach
        dx, dy = offset[None, :] - (x - int(x)), offset[:, None] - (y - int(y))
        cos, sin, stretch = math.cos(angle), math.sin(angle), between(rng, 0.85, 1.1)
        light = (
            self.light[0] * cos + self.light[1] * sin,
            self.light[1] * cos - self.light[0] * sin,
            self.light[2],
        )
        u, v = dx * (cos / radius / stretch) + dy * (sin / radius / stretch), dy * (cos / radius) - dx * (sin / radius)
        material = Material(rng, u, v, *_random_colours(rng), light, max(1.2 * radius, 18.0))
        distance, colour, lit = draw(material)
        alpha = unit(0.5 - distance * radius)
        inside, part = canvas.clip(top, left, alpha.shape)
        solid = alpha[part] > 0.5
        if self.main_owner:
            hidden = np.count_nonzero(canvas.owner[inside][solid] == self.main_owner)
            left_over = np.count_nonzero(canvas.owner == self.main_owner) - hidden
            if left_over < MIN_MAIN_VISIBLE * self.main_area:
                return False
        self._cast_shadow(alpha, top, left, radius)
        wear = material.noise("rough", u, v) * between(rng, 0.05, 0.12)
        edge = 1.0 - 0.3 * unit(1.0 + distance * 9.0)
        shade = (self.ambient + (1.12 - self.ambient) * lit) * edge * (1.0 + wear)
        canvas.paste(colour * shade, alpha, top, left, owner)
        return True

    def _cast_shadow(self, alpha: Array, top: int, left: int, radius: float) -> None:
        soft = max(1, int(radius * 0.14))
        if self.from_above:
            shift_x, shift_y = -self.light[0] * 0.28 * radius, (0.12 - self.light[1] * 0.2) * radius
            shadow = _blur(_pad(alpha, (soft, soft), (soft, soft)), soft)
            self.canvas.darken(self.shadow * shadow, top - soft + int(shift_y), left - soft + int(shift_x))
            return
        # The shadow lies on the ground behind the object: its silhouette, flattened and sheared away from the light.
        rows = np.flatnonzero(alpha.max(1) > 0.5)
        if not len(rows):
            return
        foot = int(rows[-1])
        flat = alpha[foot % 4 : foot + 1 : 4]
        count = len(flat)
        margin = int(1.2 * count) + soft
        wide = _pad(flat, (0, 0), (margin, margin))
        lean = (np.arange(count)[::-1] * (self.light[0] * 1.6)).astype(np.int64)[:, None]
        columns = np.minimum(np.maximum(np.arange(wide.shape[1])[None, :] + lean, 0), wide.shape[1] - 1)
        shadow = _blur(_pad(wide[np.arange(count)[:, None], columns], (soft, soft), (0, 0)), soft)
        drop = max(1, int(0.06 * radius))
        self.canvas.darken(
            self.shadow * _fade(len(shadow)) * shadow, top + foot - len(shadow) + soft + drop, left - margin
        )


def _check_size(image_size: tuple[int, int]) -> tuple[int, int]:
    height, width = (int(side) for side in image_size)
    if min(height, width) < MIN_SIDE:
        raise UserError(f"image size is {height} x {width}; set both sides to at least {MIN_SIDE} px")
    return height, width


def _check_number(index: int, seed: int) -> None:
    if index < 0 or seed < 0:
        raise UserError(f"index is {index} and seed is {seed}; set both to 0 or more")


@functools.lru_cache(maxsize=1024)
def _class_order(block: int, seed: int) -> tuple[int, ...]:
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, block, 1])))
    return tuple(np.argsort(order.random(len(SCENE_CLASSES))).tolist())


def scene_label(index: int, seed: int = 0) -> int:
    """Returns the class of a scene's main object without drawing the scene.

    Args:
        index: number of the scene, >= 0. Each ten scenes from a multiple of ten hold every class once, in random order.
        seed: see make_scene.
    Returns:
        an index into SCENE_CLASSES, equal to make_scene(index, seed=seed).label.
    Raises:
        UserError: if index or seed is negative.
    """
    _check_number(index, seed)
    block, place = divmod(index, len(SCENE_CLASSES))
    return _class_order(block, seed)[place]


def make_scene(index: int, image_size: tuple[int, int] = (96, 96), seed: int = 0) -> Scene:
    """Draws one scene.

    The main object is the largest one and lies near the middle; at least three quarters of it stay visible. Other
    objects with fewer than 16 visible pixels are not listed.

    Args:
        index: number of the scene, >= 0.
        image_size: (H, W) in px, each >= 32.
        seed: >= 0; another seed gives another data set.
    Returns:
        the scene; the same arguments give the same scene.
    Raises:
        UserError: if the size is too small, or if index or seed is negative.
    """
    height, width = _check_size(image_size)
    _check_number(index, seed)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    canvas = Canvas(height, width)
    side = canvas.side
    label = scene_label(index, seed)
    stage = _Stage(rng, canvas, from_above=draw_background(rng, canvas))

    def angle_of(kind: int) -> float:
        return between(rng, -0.22, 0.22) if SCENE_CLASSES[kind] in UPRIGHT else between(rng, -math.pi, math.pi)

    radius = side * between(rng, 0.27, 0.39)
    main_x = width / 2 + side * between(rng, -0.1, 0.1)
    main_y = height / 2 + side * between(rng, -0.04, 0.1)
    classes = [label]
    num_others = min(choose(rng, 6), 4)
    num_behind = choose(rng, num_others + 1)

    def draw_other(behind: bool) -> None:
        kind = choose(rng, len(SCENE_CLASSES))
        size = radius * between(rng, 0.26, 0.5)
        x = width * between(rng, 0.06, 0.94)
        low, high = (0.4, 0.75) if behind else (0.6, 0.95)
        y = height * (between(rng, 0.08, 0.92) if stage.from_above else between(rng, low, high)) - 0.4 * size
        if stage.place(_PAINTERS[kind], x, y, size, angle_of(kind), len(classes) + 1):
            classes.append(kind)

    def draw_clutter(count: int) -> None:
        for _ in range(count):
            draw = CLUTTER_PAINTERS[choose(rng, len(CLUTTER_PAINTERS))]
            x, y = width * rng.random(), height * between(rng, 0.0 if stage.from_above else 0.62, 1.0)
            stage.place(draw, x, y, side * between(rng, 0.025, 0.075), between(rng, -math.pi, math.pi), CLUTTER)

    draw_clutter(choose(rng, 3))
    for _ in range(num_behind):
        draw_other(behind=True)
    stage.place(_PAINTERS[label], main_x, main_y, radius, angle_of(label), 1)
    stage.main_owner, stage.main_area = 1, int(np.count_nonzero(canvas.owner == 1))
    for _ in range(num_others - num_behind):
        draw_other(behind=False)
    draw_clutter(1 + choose(rng, 4))
    return _finish(rng, canvas, classes)


def _finish(rng: np.random.Generator, canvas: Canvas, classes: list[int]) -> Scene:
    """Adds effects of a camera (uneven light, tint, sensor noise) and takes the labels from the canvas."""
    height, width = canvas.height, canvas.width
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    angle, strength = between(rng, 0, 2 * math.pi), between(rng, 0.03, 0.16)
    light = between(rng, 1.0, 1.22) + strength * (math.cos(angle) * x + math.sin(angle) * y)
    light = light - between(rng, 0.03, 0.12) * (x * x + y * y)
    warmth = between(rng, -0.06, 0.06)
    tint = np.array([1 + warmth, 1.0, 1 - warmth], np.float32).reshape(3, 1, 1)
    sensor = noise(rng, "grain", x * width * 1.5, y * height * 1.5) * between(rng, 0.003, 0.012)
    picture = canvas.colour * (tint * light) + sensor
    image = (np.clip(picture, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8).transpose(1, 2, 0)

    semantic = np.where(canvas.owner == 0, canvas.stuff + np.uint8(1 + len(SCENE_CLASSES)), np.uint8(0))
    kept, boxes, masks = [], [], []
    for number, kind in enumerate(classes, 1):
        mask = canvas.owner == number
        if number > 1 and np.count_nonzero(mask) < MIN_VISIBLE_PIXELS:
            # Too few pixels for an object, so it counts as clutter.
            continue
        semantic[mask] = 1 + kind
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        kept.append(kind)
        masks.append(mask)
    return Scene(
        image=np.ascontiguousarray(image),
        label=classes[0],
        boxes=np.array(boxes, np.float32),
        classes=np.array(kept, np.int64),
        masks=np.stack(masks),
        semantic_map=semantic,
    )
