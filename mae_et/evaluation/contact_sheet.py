"""A page of small pictures in one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from mae_et.storage.atomic import atomic_path

THUMBNAIL = 180  # px

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } .note { color: #555; max-width: 75ch; }
section { display: flex; flex-wrap: wrap; gap: 10px; padding: 14px 0; border-top: 1px solid #ddd; }
figure { margin: 0; width: {{ size }}px; } figure.first { margin-right: 14px; }
.frame { height: {{ size }}px; background: #f2f2f2; }
img { width: 100%; height: 100%; object-fit: contain; } .first .frame { outline: 3px solid #1f77b4; outline-offset: -3px; }
section.group { display: inline-flex; margin-right: 28px; }
figcaption { margin-top: 4px; font-size: 12px; overflow-wrap: anywhere; } figcaption b { font-size: 13px; }
</style>
<h1>{{ title }}</h1><p class="note">{{ note }}</p>
{% for row in rows %}<section{% if not mark_first %} class="group"{% endif %}>
{% for cell in row %}<figure{% if loop.first and mark_first %} class="first"{% endif %}><div class="frame">
{% if cell.source %}<img src="{{ cell.source }}" alt="{{ cell.name }}">{% endif %}
</div><figcaption title="{{ cell.name }}"><b>{{ cell.caption }}</b><br>{{ cell.short }}</figcaption></figure>
{% endfor %}</section>
{% endfor %}</html>
"""


@dataclass(frozen=True)
class Cell:
    """One picture of a contact sheet."""

    name: str  # of the image
    caption: str
    source: str  # data URL of a JPEG; empty: no picture

    @property
    def short(self) -> str:
        """The last folder and the name of the file."""
        return "/".join(Path(self.name).parts[-2:])


def thumbnail(image: Image.Image) -> str:
    """Returns a small JPEG of an image as a data URL."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_sheet(path: Path, title: str, note: str, rows: Sequence[Sequence[Cell]], mark_first: bool = False) -> None:
    """Writes a contact sheet that needs no other file.

    Args:
        path: of the HTML file.
        title, note: text above the pictures.
        rows: of cells.
        mark_first: whether the first cell of a row is drawn as the one that the others belong to, each row on its own line.
    """
    template = Environment(autoescape=True).from_string(PAGE)
    text = template.render(title=title, note=note, rows=rows, size=THUMBNAIL, mark_first=mark_first)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
