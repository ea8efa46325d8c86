"""matplotlib in, clean SVG out: text stays text, colours become CSS variables, equal input gives equal bytes.

Each plot is drawn twice, for a page and for a phone, since a figure that is only scaled down cannot be read.
"""

import os
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.atomic import write_text

from .palette import css_variables, placeholder, role_of_placeholder
from .values import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NARROW", "SIZE", "SMALL", "WIDE", "Plot", "new_figure", "panel", "render", "shorten", "text_width"]

WIDE, NARROW = 760, 350  # widths in CSS pixels; one matplotlib point is one pixel, since dpi is 72
SIZE, SMALL = 14.0, 12.5  # text in pixels

SANS = "system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans','Liberation Sans',sans-serif"


@dataclass(frozen=True)
class Plot:
    """A drawn figure: `wide` and `narrow` are SVG elements, `alt` says in words what they show. Empty when nothing was finite."""

    wide: str
    narrow: str
    alt: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the wide form as an SVG file that follows the light or dark mode of whoever opens it."""
        style = (
            f"<style>svg{{{css_variables(dark=False)}--sans:{SANS};background:var(--paper)}}"
            f"@media(prefers-color-scheme:dark){{svg{{{css_variables(dark=True)}}}}}</style>"
        )
        head, body = (self.wide or f'<svg viewBox="0 0 {WIDE} 40" width="{WIDE}"></svg>').split(">", 1)
        title = f"<title>{escape(self.alt)}</title>"
        write_text(path, f'{head} xmlns="http://www.w3.org/2000/svg">{title}{style}{body}\n')
        return Path(path)


def render(draw: Callable[[int], "Figure"], alt: str) -> Plot:
    """Draws at both widths. `draw(width)` builds the figure with `new_figure`; colours are `palette.placeholder(role)`."""
    return Plot(_svg(draw, WIDE), _svg(draw, NARROW), clean(alt))


def new_figure(width: float, height: float) -> "Figure":
    """An empty transparent figure of that many pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    return figure


def panel(figure: "Figure", left: float, top: float, right: float, bottom: float) -> "Axes":
    """Axes between pixel positions counted from the top left corner: horizontal grid lines, no box."""
    width, height = (72 * size for size in figure.get_size_inches())
    axes = figure.add_axes((left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height))
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, pad=6)
    axes.set_axisbelow(True)
    return axes


@lru_cache(maxsize=4096)
def text_width(text: str, size: float = SIZE) -> float:
    """Width in pixels in DejaVu Sans, which is wider than the fonts of browsers: room that fits it fits them."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not text.strip():
        return 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        path = TextPath((0, 0), text.replace("$", "S"), size=size, prop=FontProperties(family="DejaVu Sans"))
    return float(path.get_extents().width)


def shorten(text: str, room: float, size: float = SIZE) -> str:
    """The text, with its middle left out where it is wider than `room` pixels; both ends of a site's name tell it apart.

    >>> shorten("encoder.layer.11.attention.self.query", 150)
    'encoder.l…self.query'
    """
    if text_width(text, size) <= room:
        return text

    def kept(letters: int) -> str:
        return f"{text[: letters // 2]}…{text[len(text) - (letters - letters // 2) :]}"

    too_wide = bisect_right(range(len(text)), room, key=lambda letters: text_width(kept(letters), size))
    return kept(max(0, too_wide - 1))


def _svg(draw: Callable[[int], "Figure"], width: int) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    ink, muted, rule = placeholder("ink"), placeholder("muted"), placeholder("rule")
    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text, not outlines: it can be selected, searched and read aloud
        "svg.hashsalt": "rankfold",
        "text.parse_math": False,  # names come from users: a dollar sign is a dollar sign
        "font.family": ["DejaVu Sans"],
        "font.size": SIZE,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": muted,
        "axes.linewidth": 1.0,
        "axes.unicode_minus": True,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
        "grid.color": rule,
        "grid.linewidth": 1.0,
        "lines.solid_capstyle": "round",
        "path.simplify": True,
    }
    target = StringIO()
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # a person's own matplotlibrc would change the bytes
        mpl.rcParams.update(style)
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has its own fonts
        figure = draw(width)
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(target, metadata=nothing)
    return _cleaned(target.getvalue())


def _cleaned(text: str) -> str:
    """The bare <svg> element: no prologue, no metadata, no foreign names, no unused ids, roles instead of colours."""
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.S)
    text = re.sub(r'<svg[^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>', _head, text, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))

    def tag(match: re.Match[str]) -> str:  # only tags are changed, never what a label says
        inside = match.group().replace("xlink:href", "href")
        inside = re.sub(r' id="([^"]*)"', lambda m: m.group() if m.group(1) in used else "", inside)
        return re.sub(r'style="[^"]*"', _themed, inside)

    return re.sub(r">\s+<", "><", re.sub(r"<[^<>]+>", tag, text))


def _head(match: re.Match[str]) -> str:
    width, height = (f"{float(size):g}" for size in match.groups())
    return f'<svg viewBox="0 0 {width} {height}" width="{width}">'


def _themed(match: re.Match[str]) -> str:
    style = re.sub(r"#0a0b[0-9a-f]{2}", lambda m: f"var(--{role_of_placeholder(m.group())})", match.group())
    return re.sub(r"'DejaVu Sans'", "var(--sans)", style)
