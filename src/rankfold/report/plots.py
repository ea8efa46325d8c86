"""Lines and points: learning curves, learning-rate sweeps, spectra, quality against parameters.

Every line carries its name and last value at its end, in its colour: there is no legend to look up. Values that are not
finite are never joined by a line; they are said in the label and in the alternative text.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .palette import SERIES, placeholder
from .svg import SIZE, SMALL, WIDE, Plot, new_figure, panel, render, shorten, text_width
from .values import bounds, brief, clean, count, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Better", "Point", "learning_curves", "lr_curves", "quality_vs_parameters", "spectrum"]

Better = Literal["higher", "lower"] | None

DASHES: list[Any] = ["solid", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2))]  # the next one after each round of colours
LINE = 17.0  # pixels from one label to the next
SMOOTH_ABOVE = 150  # a curve with more values is drawn thin, its running mean thick


class Point(NamedTuple):
    """One method of `quality_vs_parameters`; `value` may have an interval. No parameters means a reference line."""

    name: str
    parameters: float
    value: Any


@dataclass(frozen=True)
class _Line:
    name: str
    x: list[float]
    y: list[float]  # NaN where there is no value
    low: list[float]
    high: list[float]
    raw: list[float] | None = None  # the values themselves, where y is their running mean

    @property
    def finite(self) -> list[int]:
        return [i for i, y in enumerate(self.y) if math.isfinite(y)]


def learning_curves(
    histories: Mapping[str, Sequence[tuple[float, Any]]],
    *,
    metric: str = "loss",
    better: Better = None,
    references: Mapping[str, float] | None = None,
    x: str = "step",
) -> Plot:
    """A metric over training, one line a run; `references` (the frozen model) are dashed horizontals.

    A curve of more than 150 values is drawn, labelled and described by its running mean over 1/40 of its length, with the
    values themselves thin behind it; the alternative text says so.

    >>> plot = learning_curves({"lora": [(0, 0.34), (100, 0.39), (200, 0.40)]}, metric="MRR", better="higher")
    >>> plot.alt
    'MRR against step. lora: from 0.340 to 0.400, best 0.400 at step 200.'
    """
    lines = [_smoothed(_line(name, values)) for name, values in histories.items()]
    return _line_plot(lines, metric=metric, x=x, better=better, references=references or {})


def lr_curves(sweeps: Mapping[str, Sequence[tuple[float, Any]]], *, metric: str = "loss", better: Better = "lower") -> Plot:
    """The result of a sweep over learning rates, one line a method, the best rate of each marked; values may have intervals.

    >>> lr_curves({"lora": [(1e-4, 2.0), (1e-3, 1.5), (1e-2, float("nan"))]}).alt
    'loss against learning rate. lora: best 1.50 at 0.001; 1 of 3 values not finite.'
    """
    lines = [_line(name, values) for name, values in sweeps.items()]
    return _line_plot(lines, metric=metric, x="learning rate", better=better, log_x=True, sweep=True)


def spectrum(values: Mapping[str, Sequence[float]] | Sequence[float], *, rank: int | None = None, what: str = "σ") -> Plot:
    """Singular values on a logarithmic scale, largest first; `rank` marks a cut and says how much energy Σσ² it keeps.

    >>> spectrum([4.0, 2.0, 1.0, 0.5], rank=2).alt
    'Singular values. From 4.00 to 0.500, 4 values; the first 2 keep 94.1 % of the energy.'
    """
    named = values if isinstance(values, Mapping) else {"": values}
    lines, words = [], []
    for name, raw in named.items():
        sigma = sorted((s for s in map(float, raw) if math.isfinite(s) and s >= 0), reverse=True)
        positive = [s for s in sigma if s > 0]  # a logarithm has no zero
        energy = sum(s * s for s in sigma)
        if not positive:
            continue
        kept = f"{100 * sum(s * s for s in sigma[:rank]) / energy:.3g} %" if rank else ""
        label = " ".join(part for part in (clean(name), f"{kept} kept" if kept and name else "") if part)
        lines.append(_line(label, list(enumerate(positive, 1))))
        text = f"{clean(name)}: from" if name else "From"
        text += f" {brief(positive[0])} to {brief(positive[-1])}, {len(sigma)} values"
        words.append(text + (f"; the first {rank} keep {kept} of the energy" if kept else ""))
    alt = "Singular values. " + ". ".join(words) + "." if lines else "No singular values."
    mark = (rank, f"rank {rank}" + (f", {kept} of the energy" if len(lines) == 1 else "")) if rank and lines else None
    return _line_plot(lines, metric=what, x="index", log_y=True, alt=alt, mark=mark, last_value=False)


def quality_vs_parameters(points: Sequence[Point], *, metric: str = "quality", better: Better = "higher") -> Plot:
    """Quality against trained parameters (logarithmic), with intervals; a method that trains nothing is a dashed reference.

    >>> quality_vs_parameters([Point("frozen", 0, 0.336), Point("lora", 147_456, 0.402)], metric="MRR").alt
    'MRR against trained parameters. frozen: 0.336 with no trained parameters. lora: 0.402 with 147 k.'
    """
    points = [Point(clean(p.name), float(p.parameters or 0), p.value) for p in points]
    points = [p for p in points if math.isfinite(_float(p.value)) and math.isfinite(p.parameters)]
    if not points:
        return Plot("", "", f"No values of {metric}.")
    words = [
        f"{p.name}: {_spoken(p.value)} with {count(p.parameters) if p.parameters else 'no trained parameters'}" for p in points
    ]
    alt = f"{metric} against trained parameters. " + ". ".join(words) + "."
    return render(lambda width: _draw_points(points, width, metric, better), alt)


def _line(name: str, values: Sequence[tuple[float, Any]]) -> _Line:
    pairs = sorted(((float(x), v) for x, v in values), key=lambda pair: pair[0])
    spans = [bounds(v) or (math.nan, math.nan) for _, v in pairs]
    y = [_float(v) for _, v in pairs]
    return _Line(clean(name), [x for x, _ in pairs], y, [s[0] for s in spans], [s[1] for s in spans])


def _smoothed(line: _Line) -> _Line:
    if len(line.finite) <= SMOOTH_ABOVE:
        return line
    return replace(line, y=_running_mean(line.y, len(line.y) // 40), raw=line.y)


def _float(value: Any) -> float:
    as_number = number(value)
    return as_number if as_number is not None and math.isfinite(as_number) else math.nan


def _spoken(value: Any) -> str:
    span = bounds(value)
    return brief(_float(value)) + (f" (interval {brief(span[0])} to {brief(span[1])})" if span else "")


def _best(line: _Line, better: Better) -> int | None:
    if better is None or not line.finite:
        return None
    return (max if better == "higher" else min)(line.finite, key=lambda i: line.y[i])


def _say(line: _Line, better: Better, x: str, sweep: bool) -> str:
    missing = len(line.y) - len(line.finite)
    tail = f"{missing} of {len(line.y)} values not finite" if missing else ""
    if not line.finite:
        return f"{line.name}: no finite value"
    best = _best(line, better)
    parts = [] if sweep else [f"from {brief(line.y[line.finite[0]])} to {brief(line.y[line.finite[-1]])}"]
    if best is not None:
        parts.append(f"best {brief(line.y[best])} at {'' if sweep else x + ' '}{line.x[best]:g}")
    mean = "running mean" if line.raw else ""
    return f"{line.name}: " + "; ".join(p for p in (", ".join(parts), mean, tail) if p)


def _line_plot(
    lines: list[_Line],
    *,
    metric: str,
    x: str,
    better: Better = None,
    references: Mapping[str, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    sweep: bool = False,
    alt: str = "",
    mark: tuple[float, str] | None = None,
    last_value: bool = True,
) -> Plot:
    references = {clean(name): _float(value) for name, value in (references or {}).items()}
    alt = alt or f"{metric} against {x}. " + ". ".join(_say(line, better, x, sweep) for line in lines) + "."
    fixed = [f"{name}: {brief(value)} throughout" for name, value in references.items()]
    alt = " ".join([alt, *(f"{text}." for text in fixed)])
    drawn = [line for line in lines if line.finite]
    if not drawn:
        return Plot("", "", f"No finite values of {metric}.")

    positive = [y for line in drawn for y in line.y if y > 0]
    wide_y = log_y and max(positive) > 10 * min(positive)  # within one decade a linear scale has the better ticks

    def draw(width: int) -> "Figure":
        from matplotlib.ticker import MaxNLocator, NullLocator

        ends_in = [(line.name, _end_value(line, better, sweep, last_value)) for line in drawn]
        ends_in += [(name, brief(value)) for name, value in references.items() if math.isfinite(value)]
        labels = [f"{shorten(name, width * 0.42 - text_width(value))} {value}".strip() for name, value in ends_in]
        right = max((text_width(label) for label in labels if label), default=0.0) + 26
        plain = 330 if width == WIDE else 250
        height = max(plain, 90 + LINE * len(labels))
        figure = new_figure(width, height)
        low, high = _range(drawn, [v for v in references.values() if math.isfinite(v)], wide_y)
        left = 14 + max(text_width(text, SMALL) for text in _axis_texts(low, high, wide_y))
        axes = panel(figure, left, 48 if mark else 36, width - right, height - 44)
        axes.grid(axis="y")
        axes.set_ylim(low, high)
        xs = [value for line in drawn for value in line.x]
        if log_x:
            axes.set_xscale("log")
        first, last = min(xs), max(xs)
        if first == last:
            first, last = (first / 2, last * 2) if log_x else (first - 0.5, last + 0.5)
        axes.set_xlim(first, last)
        if wide_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(log_locator(low, high))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        for axis, log in ((axes.xaxis, log_x), (axes.yaxis, wide_y)):
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter((lambda value, position: log_tick(value)) if log else linear_formatter())
        if log_x:
            axes.xaxis.set_major_locator(log_locator(first, last))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6 if width == WIDE else 3, integer=all(v == int(v) for v in xs)))
        _titles(figure, axes, metric, better, x)

        ends = []
        for order, line in enumerate(drawn):
            colour, dash = placeholder(SERIES[order % len(SERIES)]), DASHES[order // len(SERIES) % len(DASHES)]
            ends.append((*_draw_line(axes, line, colour, dash, better, sweep), colour))
        for value in references.values():
            if math.isfinite(value):
                axes.axhline(value, color=placeholder("muted"), linewidth=1.5, linestyle=(0, (4, 3)))
                ends.append((last, value, placeholder("muted")))
        if mark:
            axes.axvline(mark[0], color=placeholder("muted"), linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(
                mark[1], (mark[0], 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
                va="bottom", fontsize=SMALL, color=placeholder("muted"),
            )  # fmt: skip
        _label_ends(axes, ends, labels, last)
        return figure

    return render(draw, alt)


def _draw_line(axes: "Axes", line: _Line, colour: str, dash: Any, better: Better, sweep: bool) -> tuple[float, float]:
    """Draws one line and returns the point that its label belongs to."""
    x, y = line.x, line.y
    if line.raw:
        axes.plot(x, line.raw, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(x, y, color=colour, linewidth=2.2, linestyle=dash, clip_on=False)
    spans = [i for i in range(len(x)) if math.isfinite(line.low[i])]
    if spans:
        axes.fill_between(x, line.low, line.high, color=colour, alpha=0.13, linewidth=0)
    lonely = [i for i in line.finite if not ({i - 1, i + 1} & set(line.finite))]  # a line needs two neighbours to be seen
    if sweep or len(x) <= 12:
        axes.plot([x[i] for i in line.finite], [y[i] for i in line.finite], "o", color=colour, markersize=4, clip_on=False)
    elif lonely:
        axes.plot([x[i] for i in lonely], [y[i] for i in lonely], "o", color=colour, markersize=3, clip_on=False)
    best = _best(line, better)
    if best is not None and sweep:
        axes.plot(x[best], y[best], "o", color=colour, markersize=9, clip_on=False, zorder=5)
    end = line.finite[-1]
    if end < len(y) - 1:  # it went on, but not to a finite value
        axes.plot(x[end], y[end], "X", color=colour, markersize=9, clip_on=False, zorder=5)
    return x[end], y[end]


def _end_value(line: _Line, better: Better, sweep: bool, last_value: bool) -> str:
    """What stands behind a line's name: the best value and its place, the last value, or where the values ended."""
    end = line.finite[-1]
    best = _best(line, better)
    if sweep and best is not None:
        return f"{brief(line.y[best])} at {log_tick(line.x[best])}"
    if end < len(line.y) - 1:
        return f"NaN after {line.x[end]:g}"
    return brief(line.y[end]) if last_value else ""


def _label_ends(axes: "Axes", ends: list[tuple[float, float, str]], labels: list[str], last: float) -> None:
    """Names at the right edge, moved apart where they would touch, each tied to its point where it is not beside it."""
    points = axes.transData.transform([(x, y) for x, y, _ in ends])
    edge = axes.transData.transform((last, ends[0][1]))[0]
    box = axes.get_window_extent()
    for (x, y, colour), point, label, at in zip(ends, points, labels, _spread([p[1] for p in points], LINE, box.y0, box.y1)):
        away, lift = edge - point[0] + 14, at - point[1]
        if label and (away > 20 or abs(lift) > 4):
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.6, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", (x, y), (away - 3, lift), textcoords="offset points", arrowprops=line, annotation_clip=False)
        axes.annotate(
            label, (x, y), (away, lift), textcoords="offset points", va="center", color=colour, annotation_clip=False,
            fontsize=SIZE,
        )  # fmt: skip


def _spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart, in order, close to those wanted and inside [low, high] where there is room.

    >>> _spread([10, 11, 50], 10, 0, 100)
    [5.5, 15.5, 50.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[float]] = []  # [centre, members]; neighbours that touch are united and centred on their mean
    for i in order:
        groups.append([float(wanted[i]), 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (centre, members), (before, others) = groups.pop(), groups.pop()
            half = gap * (members + others) / 2
            united = (centre * members + before * others) / (members + others)
            lowest, highest = low - gap / 2 + half, high + gap / 2 - half
            groups.append([min(max(united, lowest), highest) if lowest <= highest else united, members + others])
    placed = [centre + gap * (k - (members - 1) / 2) for centre, members in groups for k in range(int(members))]
    result = [0.0] * len(wanted)
    for i, at in zip(order, placed):
        result[i] = at
    return result


def _running_mean(values: list[float], width: int) -> list[float]:
    """The mean of the finite values within `width` around each; NaN stays NaN."""
    half = max(1, width // 2)
    result = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        result.append(sum(near) / len(near) if math.isfinite(value) else math.nan)
    return result


def _range(lines: list[_Line], extra: list[float], log: bool) -> tuple[float, float]:
    ys = [
        v for line in lines for v in (*(line.raw or line.y), *line.low, *line.high) if math.isfinite(v) and (v > 0 or not log)
    ] + extra
    low, high = min(ys), max(ys)
    if log:
        return (low / 2, high * 2) if low == high else (low * (low / high) ** 0.04, high * (high / low) ** 0.04)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _axis_texts(low: float, high: float, log: bool) -> list[str]:
    from matplotlib.ticker import MaxNLocator

    ticks = (log_locator(low, high) if log else MaxNLocator(5)).tick_values(low, high)
    shown = [float(t) for t in ticks if low <= t <= high]
    return [log_tick(t) for t in shown] if log else linear_ticks(shown or [0.0])


def log_locator(low: float, high: float) -> Any:
    """Powers of ten; where few of them are in sight 3, 30, 300 are marked as well."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 3.0) if high < 300 * low else (1.0,), numticks=9)


def log_tick(value: float) -> str:
    """A short number for a wide range.

    >>> [log_tick(x) for x in (3.16e-5, 0.001, 300, 2e6)]
    ['3.2e−5', '0.001', '300', '2e6']
    """
    text = f"{value:.3g}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.1e}".replace(".0e", "e")
    return re.sub(r"e([+-])0*", lambda m: "e−" if m[1] == "-" else "e", text)


def linear_ticks(values: Sequence[float]) -> list[str]:
    """The ticks of one axis, with equally many decimals.

    >>> linear_ticks([0.36, 0.4, 0.44]), linear_ticks([0, 50, 100]), linear_ticks([0, 1e-5, 2e-5])
    (['0.36', '0.40', '0.44'], ['0', '50', '100'], ['0', '1e−5', '2e−5'])
    """
    largest = max((abs(v) for v in values), default=0.0)
    if largest >= 1e6 or 0 < largest < 1e-3:
        return [log_tick(v) if v else "0" for v in values]
    decimals = next(d for d in range(8) if d == 7 or all(abs(round(v, d) - v) < 1e-9 * max(largest, 1e-9) for v in values))
    return [f"{v:.{decimals}f}".replace("-", "−") if v else "0" for v in values]


def linear_formatter() -> Any:
    """matplotlib's form of `linear_ticks`; it sees all ticks of the axis at once."""
    from matplotlib.ticker import Formatter

    class Linear(Formatter):
        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return linear_ticks([float(v) for v in values])

        def __call__(self, x: float, pos: int | None = None) -> str:
            return linear_ticks([float(x)])[0]

    return Linear()


def _titles(figure: "Figure", axes: "Axes", metric: str, better: Better, x: str) -> None:
    """What goes up stands above the axis, read from left to right, not along it."""
    _, height = figure.get_size_inches() * 72
    text = clean(metric) + (f", {better} is better" if better else "")
    figure.text(0, 1 - 8 / height, text, va="top", ha="left", fontsize=SIZE, color=placeholder("ink"))
    axes.set_xlabel(clean(x), fontsize=SMALL, labelpad=8)


def _draw_points(points: list[Point], width: int, metric: str, better: Better) -> "Figure":
    from matplotlib.ticker import MaxNLocator, NullLocator

    height = 360 if width == WIDE else 290
    spans = [bounds(p.value) or (_float(p.value),) * 2 for p in points]
    low, high = min(s[0] for s in spans), max(s[1] for s in spans)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    figure = new_figure(width, height)
    left = 14 + max(text_width(text, SMALL) for text in _axis_texts(low, high, False))
    axes = panel(figure, left, 36, width - 12, height - 44)
    axes.grid(axis="y")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(linear_formatter())
    axes.set_xscale("log")
    trained = [p.parameters for p in points if p.parameters > 0] or [1.0]
    axes.set_xlim(min(trained) / 3, max(trained) * 3)
    axes.xaxis.set_major_locator(log_locator(*axes.get_xlim()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, position: re.sub(r"\.0+(?=\s|$)", "", count(value)))
    _titles(figure, axes, metric, better, "trained parameters")

    taken: list[tuple[float, float, float, float]] = []  # boxes in pixels that labels keep clear of
    wanted: list[tuple[float, float, str, str]] = []
    moving = [p for p in points if p.parameters > 0]
    for point, span in zip(points, spans):
        y, text = _float(point.value), f"{shorten(point.name, width * 0.4)} {brief(_float(point.value))}"
        if point.parameters <= 0:
            axes.axhline(y, color=placeholder("muted"), linewidth=1.5, linestyle=(0, (4, 3)))
            if span[0] < span[1]:
                axes.axhspan(*span, color=placeholder("muted"), alpha=0.1, linewidth=0)
            at = axes.transData.transform((min(trained), y))[1]
            edge = axes.get_window_extent().x0 + 6
            axes.annotate(text, (edge, at + 10), xycoords="figure pixels", va="center", color=placeholder("muted"))
            taken += [(edge, at + 2, edge + text_width(text), at + 18), (0.0, at - 2, float(width), at + 2)]
            continue
        colour = placeholder(SERIES[moving.index(point) % len(SERIES)])
        if span[0] < span[1]:
            axes.plot([point.parameters] * 2, span, color=colour, linewidth=2.2, alpha=0.55)
        axes.plot(point.parameters, y, "o", color=colour, markersize=9)
        px, py = axes.transData.transform((point.parameters, y))
        bottom, top = (axes.transData.transform((point.parameters, edge))[1] for edge in span)
        taken += [(px - 7, py - 7, px + 7, py + 7), (px - 2, bottom, px + 2, top)]
        wanted.append((px, py, text, colour))
    for px, py, text, colour in wanted:
        x, y = _free_place(px, py, text_width(text), taken, axes.get_window_extent().extents)
        taken.append((x, y - 8, x + text_width(text), y + 8))
        axes.annotate(text, (x, y), xycoords="figure pixels", va="center", ha="left", color=colour)
    return figure


def _free_place(
    px: float, py: float, wide: float, taken: list[tuple[float, float, float, float]], inside: Sequence[float]
) -> tuple[float, float]:
    """The left middle of a label beside (px, py) that covers least of what is there and stays inside the axes."""

    def cost(place: tuple[float, float]) -> float:
        x, y = place
        box = (x, y - 9, x + wide, y + 9)
        covered = sum(
            max(0.0, min(box[2], b[2]) - max(box[0], b[0])) * max(0.0, min(box[3], b[3]) - max(box[1], b[1])) for b in taken
        )
        outside = max(0.0, inside[0] - box[0]) + max(0.0, box[2] - inside[2]) + max(0.0, inside[1] - box[1])
        return covered + 100 * (outside + max(0.0, box[3] - inside[3]))

    places = [(px + 11 if side else px - 11 - wide, py + lift) for lift in (0, 14, -14, 28, -28) for side in (True, False)]
    places += [(px - wide / 2, py + lift) for lift in (20, -20, 34, -34)]
    return min(places, key=cost)
