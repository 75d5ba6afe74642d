"""The objects of the generated scenes.

Each shape lives in -1..1 and returns distance (negative inside), colour and light. Shapes: h, w of a patch in px.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mae_et.data.scenes.textures import Array, between, choose, hsv, mix, noise, unit, wave


@dataclass(frozen=True)
class Material:
    """Coordinates, colours and light for drawing one shape.

    Attributes:
        rng: the scene's generator.
        u, v: [h, w] local coordinates, v down.
        first, second, third: [3, 1, 1] colours.
        light: unit vector towards the light in the local frame (x right, y down, z to the viewer).
        detail: texels of noise for one unit.
    """

    rng: np.random.Generator
    u: Array
    v: Array
    first: Array
    second: Array
    third: Array
    light: tuple[float, float, float]
    detail: float

    def lit(self, nx: Array | float, ny: Array | float, nz: Array | float) -> Array:
        """Returns the brightness of a surface with this normal, 0..1."""
        return np.maximum(nx * self.light[0] + ny * self.light[1] + nz * self.light[2], 0.0)

    def noise(self, kind: str, x: Array, y: Array) -> Array:
        """Returns noise at the local coordinates x, y."""
        return noise(self.rng, kind, x * self.detail, y * self.detail)


Drawn = tuple[Array, Array, Array]


def _ellipse(u: Array, v: Array, x: float, y: float, rx: float, ry: float) -> Array:
    """Approximates the distance to an ellipse; exact where it is 0."""
    return (np.sqrt(((u - x) / rx) ** 2 + ((v - y) / ry) ** 2) - 1.0) * min(rx, ry)


def _round_column(u: Array, half_width: Array | float) -> tuple[Array, Array]:
    """Returns sine and cosine of the angle around an upright round body."""
    sine = np.minimum(np.maximum(u / half_width, -1.0), 1.0)
    return sine, np.sqrt(1.0 - sine * sine)


def _draw_ball(m: Material) -> Drawn:
    """Draws a sphere with parallel stripes."""
    radius = np.sqrt(m.u * m.u + m.v * m.v)
    nz = np.sqrt(np.maximum(1.0 - radius * radius, 0.0))
    yaw, pitch = between(m.rng, 0, 2 * math.pi), between(m.rng, -0.7, 0.7)
    axis = (math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), math.sin(pitch))
    latitude = np.arcsin(np.clip(m.u * axis[0] + m.v * axis[1] + nz * axis[2], -1.0, 1.0))
    stripes = wave(latitude * between(m.rng, 7.0, 11.0) + between(m.rng, 0, 6), 4.0)
    light = m.lit(m.u, m.v, nz)
    return radius - 1.0, mix(m.first, m.second, stripes) + 0.5 * unit(6.0 * light - 5.2), light


def _draw_box(m: Material) -> Drawn:
    """Draws a cube seen from above, with rows of dots on its faces."""
    yaw, pitch = between(m.rng, 0.35, 1.2), between(m.rng, 0.35, 0.7)
    size, dots = 0.66, 2 + choose(m.rng, 2)
    cos_yaw, sin_yaw, cos_pitch, sin_pitch = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    # The three visible axes on the screen (x, y down, towards the viewer).
    axes = (
        (cos_yaw, sin_yaw * sin_pitch, sin_yaw * cos_pitch),
        (-sin_yaw, cos_yaw * sin_pitch, cos_yaw * cos_pitch),
        (0.0, -cos_pitch, sin_pitch),
    )
    distance = np.full_like(m.u, 9.0)
    spot, light = np.zeros_like(m.u), np.zeros_like(m.u)
    for normal, right, down in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        (rx, ry), (dx, dy) = axes[right][:2], axes[down][:2]
        determinant = rx * dy - ry * dx
        u, v = m.u - axes[normal][0] * size, m.v - axes[normal][1] * size
        a = (u * dy - v * dx) / (determinant * size)
        b = (v * rx - u * ry) / (determinant * size)
        scale = abs(determinant) * size
        face = np.maximum(
            (np.abs(a) - 1.0) * (scale / math.hypot(dx, dy)), (np.abs(b) - 1.0) * (scale / math.hypot(rx, ry))
        )
        here = face < distance
        cell_a, cell_b = (a * 0.5 + 0.5) * dots, (b * 0.5 + 0.5) * dots
        cell_a, cell_b = cell_a - np.floor(cell_a) - 0.5, cell_b - np.floor(cell_b) - 0.5
        dot = unit((0.085 - (cell_a * cell_a + cell_b * cell_b)) * 24.0)
        edge = unit((np.maximum(np.abs(a), np.abs(b)) - 0.9) * 10.0)
        spot = np.where(here, dot, spot)
        light = np.where(here, m.lit(*axes[normal]) * (0.95 - 0.1 * b) + 0.1 - 0.15 * edge, light)
        distance = np.where(here, face, distance)
    return distance, mix(m.first, m.second, spot), light


def _draw_cone(m: Material) -> Drawn:
    """Draws a checkered cone on a round foot."""
    rise = (m.v + 1.0) / 1.75
    sine, cosine = _round_column(m.u, np.maximum(rise * 0.78, 1e-3))
    side = np.maximum((np.abs(m.u) - rise * 0.78) * 0.91, m.v - 0.75)
    distance = np.minimum(side, _ellipse(m.u, m.v, 0.0, 0.75, 0.78, 0.2))
    ring = rise - 0.12 * cosine * rise
    around = np.sin(np.arcsin(sine) * between(m.rng, 4.5, 6.5) + between(m.rng, 0, 6))
    checks = unit(0.5 + 6.0 * around * np.sin(ring * between(m.rng, 14, 20)))
    return distance, mix(m.first, m.second, checks), m.lit(0.9 * sine, -0.35, 0.85 * cosine)


def _draw_tower(m: Material) -> Drawn:
    """Draws a round tower of bricks with battlements and windows."""
    half_width = 0.5 + 0.07 * m.v
    sine, cosine = _round_column(m.u, half_width)
    angle = np.arcsin(sine)
    merlons = np.where(np.sin(angle * 6.0 + 1.57) > 0, 0.0, 0.17)
    distance = np.maximum(np.abs(m.u) - half_width, np.maximum(-0.95 + merlons - m.v, m.v - 0.88 - 0.1 * cosine))
    course = (m.v - 0.1 * cosine) * between(m.rng, 4.5, 6.0)
    row = np.floor(course)
    brick = angle * 2.1 + 0.5 * np.mod(row, 2.0)
    column = np.floor(brick)
    joint = np.maximum(np.abs(course - row - 0.5), np.abs(brick - column - 0.5) * 1.03)
    tone = 0.5 + 0.28 * noise(m.rng, "grain", column * 13.0, row * 7.0)
    colour = mix(mix(m.first, m.second, 0.45 * unit(tone)), m.third * 0.5, unit((joint - 0.4) * 14.0))
    opening = _ellipse(m.u, m.v, 0.0, between(m.rng, -0.45, 0.0), 0.11, 0.2)
    return distance, colour * (1.0 - 0.85 * unit(-opening * 18.0)), m.lit(sine, -0.1, cosine)


def _draw_tree(m: Material) -> Drawn:
    """Draws a leafy crown on a trunk."""
    leaves = m.noise("relief", m.u * 0.8, m.v * 0.8)
    crown, light = np.full_like(m.u, 9.0), np.zeros_like(m.u)
    for clump in range(6):
        angle = 1.257 * clump + between(m.rng, -0.4, 0.4)
        away = 0.42 if clump < 5 else 0.1
        x, y, size = away * math.cos(angle), -0.32 + 0.8 * away * math.sin(angle), between(m.rng, 0.3, 0.44)
        du, dv = m.u - x, m.v - y
        distance = np.sqrt(du * du + dv * dv) - size
        nearer = distance < crown
        crown = np.where(nearer, distance, crown)
        light = np.where(nearer, m.lit(du / size, dv / size, 0.55), light)
    crown = crown + 0.035 * m.noise("rough", m.u * 2.0, m.v * 2.0) + 0.03 * leaves
    trunk = np.maximum(
        np.abs(m.u + 0.04 * np.sin(m.v * 5.0)) - 0.1 - 0.1 * np.maximum(m.v - 0.6, 0.0), np.abs(m.v - 0.5) - 0.5
    )
    bark = wave(m.u * 60.0 + 3.0 * leaves, 0.5)
    in_crown = crown < 0.02
    green = mix(m.first * 0.3, mix(m.first, m.third, 0.25) * 1.15, unit(0.5 + 0.38 * leaves))
    wood = mix(hsv(0.08, 0.45, 0.22), hsv(0.08, 0.35, 0.5), bark)
    sine, cosine = _round_column(m.u, 0.14)
    light = np.where(in_crown, 0.25 + 0.75 * light, m.lit(sine, 0.0, cosine))
    return np.minimum(crown, trunk), np.where(in_crown, green, wood), light


def _draw_star(m: Material) -> Drawn:
    """Draws a five-pointed star with bevelled arms and a wood grain."""
    sector = 2 * math.pi / 5
    angle = np.arctan2(m.u, -m.v)
    arm = np.floor(angle / sector + 0.5) * sector
    folded = angle - arm
    radius = np.sqrt(m.u * m.u + m.v * m.v)
    along, off = radius * np.cos(folded), radius * np.abs(np.sin(folded))
    inner = between(m.rng, 0.42, 0.52)
    ex, ey = inner * math.cos(sector / 2) - 1.0, inner * math.sin(sector / 2)
    length = math.hypot(ex, ey)
    distance = ((along - 1.0) * ey - off * ex) / length
    facing = arm + np.sign(folded) * 1.1
    light = m.lit(0.55 * np.sin(facing), -0.55 * np.cos(facing), 0.75)
    turn = between(m.rng, 0, math.pi)
    across = m.u * math.cos(turn) + m.v * math.sin(turn)
    grain = m.noise("cloud", m.u * 0.8, m.v * 0.8)
    lines = 0.5 + 0.5 * np.sin(across * between(m.rng, 22, 30) + 2.2 * grain)
    return distance, mix(m.first, m.first * 0.45 + 0.12 * m.second, lines), light


def _draw_ring(m: Material) -> Drawn:
    """Draws a ring twisted like a rope."""
    radius = np.sqrt(m.u * m.u + m.v * m.v) + 1e-4
    thickness = between(m.rng, 0.22, 0.29)
    across = (radius - 1.0 + thickness) / thickness
    q = np.minimum(np.maximum(across, -1.0), 1.0)
    strands = 12 + choose(m.rng, 7)
    twist = np.arctan2(m.v, m.u) * strands + 2.4 * np.arcsin(q)
    colour = mix(m.first, m.second, 0.8 * wave(twist - 0.8, 2.5))
    light = m.lit(m.u / radius * q, m.v / radius * q, np.sqrt(1.0 - q * q)) * (0.72 + 0.28 * np.sin(twist))
    return (np.abs(across) - 1.0) * thickness, colour, light


def _draw_cup(m: Material) -> Drawn:
    """Draws a mug with zigzag bands, seen a little from above."""
    half_width = 0.6 - between(m.rng, 0.0, 0.16) * (m.v + 0.65)
    u = m.u + 0.16
    sine, cosine = _round_column(u, half_width)
    curved = m.v - 0.14 * cosine
    body = np.maximum(np.abs(u) - half_width, np.maximum(-0.65 - m.v, curved - 0.72))
    mouth = _ellipse(u, m.v, 0.0, -0.65, 0.6, 0.17)
    handle = np.abs(np.sqrt((u - 0.56) ** 2 + (m.v * 0.9) ** 2) - 0.34) - 0.09
    zigzag = np.abs(np.mod(np.arcsin(sine) * between(m.rng, 1.2, 1.9), 1.0) - 0.5)
    bands = wave((curved + 0.36 * zigzag) * between(m.rng, 10, 14), 4.0)
    bands = bands * unit((0.5 - np.abs(curved - 0.05)) * 12.0)
    light = m.lit(sine, 0.0, cosine)
    colour = mix(m.first, m.second, bands) + 0.4 * unit(6.0 * light - 5.2)
    inside = mouth + 0.045 < 0
    on_handle = (handle < 0) & (body > 0) & (mouth > 0)
    colour = np.where(inside, m.first * 0.45, np.where(on_handle, m.first, colour))
    light = np.where(on_handle, 0.55 - 0.4 * handle / 0.09 * m.light[1], light)
    light = np.where(inside, 0.3 + 0.4 * m.lit(-sine, 0.0, 0.4), light)
    return np.minimum(np.minimum(body, mouth), handle), colour, light


def _draw_fish(m: Material) -> Drawn:
    """Draws a scaled body with a tail, fins and an eye."""
    tall = between(m.rng, 0.4, 0.52)
    body = _ellipse(m.u, m.v, -0.18, 0.0, 0.8, tall)
    spread = np.abs(m.v) - (m.u - 0.38) * 0.95
    tail = np.maximum(spread, np.maximum(m.u - 0.82 - 0.5 * np.abs(m.v), 0.35 - m.u))
    fin = np.maximum(_ellipse(m.u, m.v, 0.02, -tall * 0.75, 0.36, 0.36), m.u - 0.3)
    belly = _ellipse(m.u, m.v, 0.05, tall * 0.8, 0.2, 0.28)
    fins = np.minimum(np.minimum(tail, fin), belly)
    rate = between(m.rng, 5.5, 7.5)
    column = np.floor(m.u * rate)
    x = m.u * rate - column
    y = m.v * rate * 0.9 + 0.5 * np.mod(column, 2.0)
    y = y - np.floor(y) - 0.5
    scales = unit(1.25 - 0.9 * np.sqrt((x - 0.95) ** 2 + 1.6 * y * y))
    colour = mix(m.first * 0.45, m.first, scales)
    colour = mix(colour, m.third, 0.75 * unit(m.v / tall + 0.1))
    streaks = wave(np.arctan2(m.v, m.u - 0.25) * 26.0, 0.6)
    colour = np.where(body < 0, colour, mix(m.second, m.second * 0.55, streaks))
    head = unit((-0.52 - m.u - 0.25 * m.v * m.v) * 14.0)
    colour = mix(colour, m.second * 0.85, head * (body < 0))
    eye = np.sqrt((m.u + 0.7) ** 2 + (m.v + 0.1) ** 2)
    colour = mix(colour, hsv(0.12, 0.1, 0.95), unit((0.11 - eye) * 25.0))
    colour = mix(colour, hsv(0.0, 0.0, 0.05), unit((0.06 - eye) * 25.0))
    round_v = np.minimum(np.maximum(m.v / tall, -1.0), 1.0)
    light = np.where(body < 0, m.lit(0.3 * (m.u + 0.2), round_v * 0.9, 0.9 - 0.5 * round_v**2), 0.6)
    return np.minimum(body, fins), colour, light


def _draw_flower(m: Material) -> Drawn:
    """Draws streaked petals around a grainy middle."""
    petals = 5 + choose(m.rng, 5)
    angle, radius = np.arctan2(m.v, m.u), np.sqrt(m.u * m.u + m.v * m.v)
    lobe = np.abs(np.cos(angle * (petals / 2)))
    depth = between(m.rng, 0.35, 0.55)
    distance = (radius - (1.0 - depth) - depth * np.sqrt(lobe)) * 0.6
    streaks = m.noise("rough", angle * 1.3, radius * 0.12)
    fold = unit(lobe * 1.5)
    colour = mix(m.first, m.third, unit((radius - 0.35) * 0.9)) * (0.85 + 0.17 * streaks) * (0.55 + 0.45 * fold)
    middle = between(m.rng, 0.24, 0.34)
    seeds = unit(0.5 + np.sin(m.u * 38.0 + m.v * 12.0) * np.sin(m.v * 38.0 - m.u * 12.0))
    in_middle = unit((middle - radius) * 18.0)
    colour = mix(colour * (1.0 - 0.45 * unit(1.5 - radius * 2.6)), mix(m.second * 0.5, m.second, seeds), in_middle)
    bulge = np.where(radius < middle, radius / middle, 0.25 - 0.5 * radius)
    safe = radius + 1e-4
    return distance, colour, m.lit(m.u / safe * bulge, m.v / safe * bulge, 0.85)


def _draw_stone(m: Material) -> Drawn:
    """Draws clutter: a rough grey stone."""
    bumps = m.noise("relief", m.u, m.v)
    radius = np.sqrt(m.u * m.u + (m.v * 1.35) ** 2)
    distance = radius - 0.85 + 0.06 * bumps
    nz = np.sqrt(np.maximum(1.0 - radius * radius, 0.0))
    colour = mix(m.third, hsv(0.1, 0.08, 0.5), 0.75) * (1.0 + 0.15 * bumps)
    return distance, colour, m.lit(m.u, m.v, nz)


def _draw_leaf(m: Material) -> Drawn:
    """Draws clutter: a fallen leaf with a rib."""
    distance = (np.abs(m.v) - 0.42 * (1.0 - m.u * m.u)) * 0.8
    rib = unit(1.0 - np.abs(m.v) * 16.0)
    veins = wave((m.u + np.abs(m.v)) * 18.0, 0.5)
    return distance, mix(m.first * (0.75 + 0.2 * veins), m.third, 0.5 * rib), 0.65 + 0.25 * np.sign(m.v) * m.light[1]


def _draw_twig(m: Material) -> Drawn:
    """Draws clutter: a bent twig."""
    off = m.v - 0.12 * np.sin(m.u * 4.0)
    distance = np.maximum(np.abs(off) - 0.055, np.abs(m.u) - 0.97)
    return distance, hsv(0.08, 0.4, 0.42) + 0 * off, m.lit(0.0, np.clip(off / 0.07, -1, 1), 0.5)


Painter = Callable[[Material], Drawn]

# In the order of the class indices.
OBJECT_PAINTERS: dict[str, Painter] = {
    "ball": _draw_ball,
    "box": _draw_box,
    "cone": _draw_cone,
    "tower": _draw_tower,
    "tree": _draw_tree,
    "star": _draw_star,
    "ring": _draw_ring,
    "cup": _draw_cup,
    "fish": _draw_fish,
    "flower": _draw_flower,
}
CLUTTER_PAINTERS: tuple[Painter, ...] = (_draw_stone, _draw_leaf, _draw_twig)
# These stand on the ground and lean slightly; the others have any rotation.
UPRIGHT = frozenset({"box", "cone", "tower", "tree", "cup"})
