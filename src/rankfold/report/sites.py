"""Figures with one row a site: how much each site changed, and how its rank moved.

Names split at their first number (`encoder.layer.3.attention.self.query` is `attention.self.query` of `encoder.layer 3`);
with many sites each block becomes one small panel, all panels on one scale.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .palette import placeholder
from .plots import _float, _titles, linear_formatter, linear_ticks
from .svg import SMALL, WIDE, Plot, new_figure, panel, render, shorten, text_width
from .values import brief, clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["change_per_site", "rank_trajectories"]

ROW = 17.0  # pixels per site
LIST_UP_TO = 24  # more sites are grouped by block, where their names have blocks
DRAWN_UP_TO = 240  # a longer list keeps its largest sites, and says so

Bar = tuple[str, float]


def change_per_site(changes: Mapping[str, Any], *, what: str = "relative change ‖ΔW‖ / ‖W‖") -> Plot:
    """Horizontal bars, one a site, in the model's order. A zero is written out: a site that did not move is news.

    >>> change_per_site({"layer.0.query": 0.02, "layer.0.key": 0.0}).alt
    'relative change ‖ΔW‖ / ‖W‖ of 2 sites: median 0.0100, largest 0.0200 at layer.0.query, zero at 1.'
    """
    bars = [(clean(name), _float(value)) for name, value in changes.items()]
    finite = sorted(value for _, value in bars if math.isfinite(value))
    if not finite:
        return Plot("", "", f"No values of {what}.")
    half = len(finite) // 2
    median = finite[half] if len(finite) % 2 else (finite[half - 1] + finite[half]) / 2
    widest = max((bar for bar in bars if math.isfinite(bar[1])), key=lambda bar: bar[1])
    alt = f"{what} of {len(bars)} sites: median {brief(median)}, largest {brief(widest[1])} at {widest[0]}"
    alt += f", zero at {finite.count(0.0)}" if 0.0 in finite else ""
    alt += f", not finite at {len(bars) - len(finite)}" if len(bars) > len(finite) else ""
    title, limit = what, max(finite[-1], 0.0)
    if len(bars) > DRAWN_UP_TO:
        kept = sorted(bars, key=lambda bar: bar[1] if math.isfinite(bar[1]) else math.inf, reverse=True)[:DRAWN_UP_TO]
        names = {name for name, _ in kept}
        title += f", the {DRAWN_UP_TO} largest of {len(bars)} sites"
        bars = [bar for bar in bars if bar[0] in names]
    blocks = _blocks(bars)
    inner = {name for block in blocks.values() for name, _ in block}
    if len(bars) > LIST_UP_TO and len(bars) >= 2 * len(blocks) and len(inner) <= LIST_UP_TO:
        return render(lambda width: _draw_blocks(blocks, width, title, limit), alt + ".")
    return render(lambda width: _draw_list(bars, width, title, limit), alt + ".")


def rank_trajectories(trajectories: Mapping[str, Sequence[tuple[float, int]]]) -> Plot:
    """The rank of each site over training: one strip a site, the darker the higher; the last rank stands at its end.

    >>> rank_trajectories({"layer.0.query": [(0, 8), (100, 5)], "layer.0.key": [(0, 8), (100, 8)]}).alt
    'Rank of 2 sites over training: total from 16 to 13; lowest at the end 5 at layer.0.query, highest 8 at layer.0.key.'
    """
    strips = {clean(name): sorted((float(x), int(rank)) for x, rank in moves) for name, moves in trajectories.items()}
    strips = {name: moves for name, moves in strips.items() if moves}
    if not strips:
        return Plot("", "", "No ranks were recorded.")
    last = {name: moves[-1][1] for name, moves in strips.items()}
    low, high = min(last, key=lambda k: last[k]), max(last, key=lambda k: last[k])
    alt = (
        f"Rank of {len(strips)} sites over training: total from {sum(m[0][1] for m in strips.values())} to {sum(last.values())}; "
        f"lowest at the end {last[low]} at {low}, highest {last[high]} at {high}."
    )
    return render(lambda width: _draw_strips(strips, width), alt)


def _blocks(bars: list[Bar]) -> dict[str, list[Bar]]:
    """Sites by block, in order of appearance; what has no number in its name comes under the empty block."""
    split = [re.match(r"(.*?)\.?(\d+)\.(.+)$", name) for name, _ in bars]
    stems = {match[1] for match in split if match}
    blocks: dict[str, list[Bar]] = {}
    for (name, value), match in zip(bars, split):
        stem = "" if match is None else match[1] if len(stems) > 1 else match[1].rsplit(".", 1)[-1]
        block = "" if match is None else f"{re.sub(r'(?<=[^s])s$', '', stem)} {match[2]}".strip()
        blocks.setdefault(block, []).append((name if match is None else match[3], value))
    return blocks


def _draw_list(bars: list[Bar], width: int, title: str, limit: float) -> "Figure":
    """One bar a row. On a phone the name stands above its bar, since beside it there is no room."""
    beside = width == WIDE
    row = 22.0 if beside else 34.0
    names = [shorten(name, width * (0.45 if beside else 0.95), SMALL) for name, _ in bars]
    left = max(text_width(name, SMALL) for name in names) + 12 if beside else 0.0
    height = 40 + row * len(bars) + 34
    figure = new_figure(width, height)
    axes = panel(figure, left, 36, width - 58, 36 + row * len(bars))
    drop = 0.0 if beside else 0.22
    places = [i + drop for i in range(len(bars))]
    _bars(axes, [value for _, value in bars], places, 0.62 if beside else 0.34, limit, foot=beside)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_yticks([])
    for i, ((_, value), name) in enumerate(zip(bars, names)):
        if beside:
            axes.annotate(name, (0, i), (-10, 0), textcoords="offset points", ha="right", va="center", fontsize=SMALL)
        else:
            axes.annotate(name, (0, i - 0.24), va="center", fontsize=SMALL)
        if value > 0:
            axes.annotate(
                brief(value), (value, places[i]), (5, 0), textcoords="offset points", va="center", fontsize=SMALL,
                color=placeholder("muted"), annotation_clip=False,
            )  # fmt: skip
    _titles(figure, axes, title, None, "")
    return figure


def _draw_blocks(blocks: dict[str, list[Bar]], width: int, title: str, limit: float) -> "Figure":
    """One panel a block; rows mean the same in all panels, so names stand only at the left. Sites without a block come last."""
    numbered = {block: bars for block, bars in blocks.items() if block}
    rows = list(dict.fromkeys(name for bars in numbered.values() for name, _ in bars))
    loose = blocks.get("", [])
    left = min(
        max(text_width(name, SMALL) for name in [*rows, *(n for n, _ in loose)]) + 12, width * (0.3 if width == WIDE else 0.42)
    )
    columns = max(1, min(len(numbered), int((width - left) // (125 if width == WIDE else 92))))
    pitch = (width - left) / columns
    tall = ROW * len(rows)
    deep = -(-len(numbered) // columns)
    bottom = 36 + deep * (tall + 32)
    height = bottom + (ROW * len(loose) + 44 if loose else 0) + 20
    figure = new_figure(width, height)
    for index, (block, bars) in enumerate(numbered.items()):
        down, across = divmod(index, columns)
        top, start = 36 + 22 + down * (tall + 32), left + across * pitch
        axes = panel(figure, start, top, start + pitch - 14, top + tall)
        values = dict(bars)
        _bars(axes, [values.get(name) for name in rows], list(range(len(rows))), 0.66, limit)
        _frame(axes, len(rows), limit, ticks=index + columns >= len(numbered))
        axes.annotate(
            shorten(block, pitch - 16, SMALL),
            (0, 1),
            (0, 4),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=SMALL,
        )
        if across == 0:
            _names(axes, rows, left)
    if loose:
        top = bottom + 36
        axes = panel(figure, left, top, left + pitch - 14, top + ROW * len(loose))
        _bars(axes, [value for _, value in loose], list(range(len(loose))), 0.66, limit)
        _frame(axes, len(loose), limit, ticks=True)
        axes.annotate("outside the blocks", (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=SMALL)
        _names(axes, [name for name, _ in loose], left)
    _titles(figure, axes, title, None, "")
    return figure


def _draw_strips(strips: dict[str, list[tuple[float, int]]], width: int) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    names = list(strips)
    left = min(max(text_width(name, SMALL) for name in names) + 12, width * 0.42)
    top, height = 62.0, 62 + ROW * len(names) + 44
    figure = new_figure(width, height)
    axes = panel(figure, left, top, width - 64, top + ROW * len(names))
    xs = [x for moves in strips.values() for x, _ in moves]
    first, last = min(xs), max(xs)
    last = last if last > first else first + 1
    highest = max(rank for moves in strips.values() for _, rank in moves) or 1
    for row, moves in enumerate(strips.values()):
        for start, end, rank in _runs(moves, last):
            axes.broken_barh(
                [(start, end - start)],
                (row - 0.4, 0.8),
                facecolor=placeholder("accent"),
                alpha=_shade(rank, highest),
                linewidth=0,
            )
        begin, final = moves[0][1], moves[-1][1]
        text = str(final) if begin == final else f"{begin} → {final}"
        axes.annotate(text, (last, row), (8, 0), textcoords="offset points", va="center", fontsize=SMALL, annotation_clip=False)
    axes.set_xlim(first, last)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(5 if width == WIDE else 3))
    axes.xaxis.set_major_formatter(linear_formatter())
    _names(axes, names, left)
    _titles(figure, axes, "rank per site", None, "step")
    levels = sorted({round(highest * k / 4) for k in range(5)})
    for k, rank in enumerate(levels):
        x = (left + k * 34) / width
        figure.add_artist(_swatch(x, 1 - 50 / height, 12 / width, 12 / height, _shade(rank, highest)))
        figure.text(x + 16 / width, 1 - 44 / height, str(rank), fontsize=SMALL, va="center", color=placeholder("muted"))
    return figure


def _bars(
    axes: Any, values: Sequence[float | None], places: Sequence[float], thick: float, limit: float, foot: bool = True
) -> None:
    shown = [(place, value) for place, value in zip(places, values) if value is not None]
    solid = [(place, value) for place, value in shown if math.isfinite(value) and value > 0]
    axes.barh([p for p, _ in solid], [v for _, v in solid], height=thick, color=placeholder("accent"), linewidth=0)
    axes.set_xlim(0, limit or 1.0)
    axes.spines["bottom"].set_visible(False)
    if foot:
        axes.axvline(0, color=placeholder("muted"), linewidth=1, clip_on=False)
    axes.set_xticks([])
    for place, value in shown:
        if not (math.isfinite(value) and value > 0):
            axes.annotate(
                "0" if value == 0 else brief(value), (0, place), (5, 0), textcoords="offset points", va="center",
                fontsize=SMALL, color=placeholder("bad"),
            )  # fmt: skip


def _frame(axes: Any, rows: int, limit: float, ticks: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks([])
    marks = [
        float(mark)
        for mark in MaxNLocator(max(1, int(axes.get_window_extent().width // 40))).tick_values(0, limit or 1.0)
        if 0 <= mark <= (limit or 1.0)
    ]
    axes.set_xticks(marks, linear_ticks(marks) if ticks else [""] * len(marks))
    axes.grid(axis="x")


def _names(axes: Any, names: Sequence[str], room: float) -> None:
    for row, name in enumerate(names):
        axes.annotate(
            shorten(name, room - 12, SMALL), (0, row), (-10, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="center", fontsize=SMALL,
        )  # fmt: skip


def _runs(moves: list[tuple[float, int]], last: float) -> list[tuple[float, float, int]]:
    """(start, end, rank) with equal neighbours united.

    >>> _runs([(0, 8), (10, 8), (20, 5)], 30)
    [(0, 20, 8), (20, 30, 5)]
    """
    runs: list[tuple[float, float, int]] = []
    for (start, rank), end in zip(moves, [*(x for x, _ in moves[1:]), last]):
        if runs and runs[-1][2] == rank:
            runs[-1] = (runs[-1][0], end, rank)
        else:
            runs.append((start, end, rank))
    return [run for run in runs if run[1] > run[0]]


def _shade(rank: int, highest: int) -> float:
    return 0.0 if rank <= 0 else 0.15 + 0.85 * rank / highest


def _swatch(x: float, y: float, wide: float, high: float, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    colour = placeholder("accent")
    return Rectangle((x, y), wide, high, facecolor=(*_rgb(colour), alpha), edgecolor=colour, linewidth=0.8)


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)
