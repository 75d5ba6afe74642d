"""Draws predictions onto images: text with bars, boxes and masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# The colours of matplotlib's "tab20": neighbours in the list differ.
COLORS = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (227, 119, 194),
    (127, 127, 127), (188, 189, 34), (23, 190, 207), (174, 199, 232), (255, 187, 120), (152, 223, 138), (255, 152, 150),
    (197, 176, 213), (196, 156, 148), (247, 182, 210), (199, 199, 199), (219, 219, 141), (158, 218, 229),
)  # fmt: skip
MAX_SIDE = 1024  # px of the longer side; larger images are reduced
MIN_WIDTH = 320  # px; smaller images are enlarged, so that names fit


def with_bars(image: Image.Image, names: Sequence[str], shares: Sequence[float]) -> Image.Image:
    """Returns an RGB image with a line of text and a bar for each name below it.

    Args:
        image: of any size; a large one is reduced.
        names: of the classes, most likely first.
        shares: in [0, 1], the lengths of the bars.
    """
    image = _fitted(image)
    width = max(image.width, MIN_WIDTH)
    font = _font(max(13, width // 36))
    line = round(1.7 * font.size)
    canvas = Image.new("RGB", (width, image.height + line * len(names) + line // 2), "white")
    canvas.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    gap, value_width = font.size // 2, round(font.getlength("100.0%"))
    for i, (name, share) in enumerate(zip(names, shares, strict=True)):
        top = image.height + line // 4 + i * line
        end = width - 2 * gap - value_width
        draw.rectangle((0, top + 2, round(end * share), top + line - 3), fill=(174, 199, 232))
        draw.text((gap, top + line / 2), _shortened(name, font, end - 2 * gap), "black", font, anchor="lm")
        draw.text((width - gap, top + line / 2), f"{share:.1%}", "black", font, anchor="rm")
    return canvas


def with_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    texts: Sequence[str],
) -> Image.Image:
    """Returns an RGB image with labelled boxes; the first box lies on top.

    Args:
        image: that the boxes belong to; a large one is reduced together with its boxes.
        boxes: (x1, y1, x2, y2), px.
        labels: decide the colours.
        texts: of the labels.
    """
    shown = _fitted(image)
    scale = shown.width / image.width
    draw = ImageDraw.Draw(shown)
    font = _font(max(11, max(shown.size) // 55))
    line = max(2, max(shown.size) // 300)
    for box, label, text in reversed(list(zip(boxes, labels, texts, strict=True))):
        x1, y1, x2, y2 = (round(value * scale) for value in box)
        color = COLORS[label % len(COLORS)]
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=line)
        x, y = min(x1, max(0, shown.width - round(font.getlength(text)) - 4)), max(0, y1 - round(1.35 * font.size))
        draw.rectangle((x, y, x + font.getlength(text) + 4, y + 1.35 * font.size), fill=color)
        bright = np.dot(color, (0.299, 0.587, 0.114)) > 140
        draw.text((x + 2, y + 0.67 * font.size), text, "black" if bright else "white", font, anchor="lm")
    return shown


def with_classes(image: Image.Image, classes: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Returns an RGB image under the half-transparent colours of its classes, with a legend of those that occur.

    Args:
        image: of any size.
        classes: [H, W] class index of each pixel of the image.
        names: of the classes.
    """
    palette = np.array([COLORS[i % len(COLORS)] for i in range(len(names))], np.uint8)
    mixed = Image.blend(image.convert("RGB"), Image.fromarray(palette[classes]), 0.5)
    shown = _fitted(mixed)
    counts = np.bincount(classes.ravel(), minlength=len(names))
    present = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]][:12]
    width = max(shown.width, MIN_WIDTH)
    font = _font(max(13, width // 45))
    line = round(1.6 * font.size)
    canvas = Image.new("RGB", (width, shown.height + line * len(present) + line // 2), "white")
    canvas.paste(shown, ((width - shown.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for i, label in enumerate(present):
        top = shown.height + line // 4 + i * line
        draw.rectangle((6, top + 3, 6 + font.size, top + line - 4), fill=COLORS[label % len(COLORS)])
        text = f"{names[label]}  {counts[label] / classes.size:.1%}"
        draw.text((14 + font.size, top + line / 2), _shortened(text, font, width - 30), "black", font, anchor="lm")
    return canvas


def _fitted(image: Image.Image) -> Image.Image:
    """Returns a copy of mode RGB whose longer side is MIN_WIDTH to MAX_SIDE px."""
    longer = max(image.size)
    scale = min(MAX_SIDE, max(MIN_WIDTH, longer)) / longer
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # That of matplotlib has more scripts than Pillow's own.
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
