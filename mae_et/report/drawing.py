"""Draws SVGs with matplotlib whose colours follow the page's light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's colours, distinct for colour-blind readers, adjusted for contrast: (on white, on black).
PALETTE = (
    ("#0072b2", "#58b4f0"),
    ("#d55e00", "#ff9147"),
    ("#008f68", "#35d0a4"),
    ("#b8578a", "#f0a1cb"),
    ("#8a6d00", "#f0d24a"),
    ("#3f3f3f", "#d0d0d0"),
    ("#5b4fb0", "#b3a8ff"),
    ("#2f93c8", "#a8ddff"),
)
INK, FAINT = "#1b1f24", "#c9ced6"
MARKERS, GLYPHS = "os^DvPX*", "●■▲◆▼✚✖★"
DASHES = ("-", "--", ":", "-.")
SIZE = (5.4, 3.3)  # inches


@dataclass(frozen=True)
class Series:
    """A line of a legend."""

    index: int
    label: str

    @property
    def color(self) -> int:
        return self.index % len(PALETTE)

    @property
    def glyph(self) -> str:
        return GLYPHS[self.index % len(GLYPHS)]

    @property
    def dash(self) -> str:
        return DASHES[self.index // len(PALETTE) % len(DASHES)]


def draw(salt: str, paint: Callable[[Axes], None], xlabel: str, ylabel: str) -> str:
    """Returns an SVG whose colours are the page's: `var(--ink)`, `var(--faint)`, `var(--s0)` to `var(--s7)`.

    Args:
        salt: makes the ids unique within the page.
        paint: draws into axes.
        xlabel, ylabel: never text of a run.
    """
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 12,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(settings):
        canvas = Canvas(figsize=SIZE)
        axes = canvas.add_subplot()
        canvas.subplots_adjust(left=0.17, right=0.975, top=0.965, bottom=0.17)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.grid(True)
        axes.set_axisbelow(True)
        paint(axes)
        axes.set_xlabel(xlabel, parse_math=False)
        axes.set_ylabel(ylabel, parse_math=False)
        axes.yaxis.set_label_coords(-0.145, 0.5)
        canvas.patch.set_visible(False)
        axes.patch.set_visible(False)
        stream = io.StringIO()
        FigureCanvasSVG(canvas).print_svg(stream, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        rf'<g id="(?!{re.escape(salt)})[a-zA-Z]+_?\d*(_\d+)*">', "<g>", svg
    )  # these ids would repeat in every figure
    said = escape(f"{ylabel} over {xlabel}").replace("\\", "&#92;")
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', f'role="img" aria-label="{said}" ', svg, count=1)
    for color, variable in _variables().items():
        svg = svg.replace(color, f"var({variable})")
    return svg.strip()


def standalone(svg: str) -> str:
    """Returns the SVG as a file that works without the page: with the light colours."""
    for color, variable in _variables().items():
        svg = svg.replace(f"var({variable})", PALETTE[int(variable[-1])][0] if variable.startswith("--s") else color)
    return svg.replace("<svg ", '<svg style="background: #fff; font-family: sans-serif" ', 1)


def color_of(one: Series) -> str:
    return f"#fe00{one.color:02x}"  # a placeholder for the page's colour of that number


def _variables() -> dict[str, str]:
    return {INK: "--ink", FAINT: "--faint", **{f"#fe00{i:02x}": f"--s{i}" for i in range(len(PALETTE))}}
