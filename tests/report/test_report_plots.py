"""Plots: what is not finite is said and never joined, labels do not touch, many sites stay legible, colours can be told apart."""

import itertools
import math
import re

import pytest

from rankfold.measure import Interval
from rankfold.report import (
    Point,
    change_per_site,
    learning_curves,
    lr_curves,
    quality_vs_parameters,
    rank_trajectories,
    spectrum,
)
from rankfold.report.palette import COLOURS, SERIES
from rankfold.report.plots import LINE, _running_mean, _spread
from rankfold.report.svg import NARROW, SMALL, WIDE, shorten, text_width

NAN = float("nan")


def interval(estimate, low, high):
    return Interval(estimate, low, high, level=0.95)


def texts(svg):
    """(x, y, text) of every label, in pixels from the top left corner."""
    found = []
    for tag, text in re.findall(r"<text([^>]*)>([^<]*)</text>", svg):
        place = re.search(r'translate\(([\d.-]+) ([\d.-]+)\)|x="([\d.-]+)" y="([\d.-]+)"', tag)
        x, y = (float(v) for v in place.groups() if v is not None)
        found.append((x, y, text))
    return found


def labels(svg):
    return [text for _, _, text in texts(svg)]


def polylines(svg, role):
    """The drawn lines of one colour, each as its number of separate pieces."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--{role}\)', svg)
    return [path.count("M") for path in found]


def test_a_line_is_broken_where_a_value_is_missing():
    whole = learning_curves({"a": [(i, float(i % 3)) for i in range(20)]}).wide
    broken = learning_curves({"a": [(i, NAN if i in (5, 6) else float(i % 3)) for i in range(20)]})
    assert polylines(whole, "series-1") == [1]
    assert polylines(broken.wide, "series-1") == [2]
    assert "2 of 20 values not finite" in broken.alt


def test_a_run_that_ends_in_nan_says_so_at_its_end():
    plot = learning_curves({"lora": [(0, 1.0), (10, 0.9), (20, NAN), (30, math.inf)]})
    assert "lora NaN after 10" in labels(plot.wide)
    assert "2 of 4 values not finite" in plot.alt


def test_a_run_without_values_is_named_in_words_and_not_drawn():
    plot = learning_curves({"lora": [(0, 1.0), (1, 0.5)], "dead": [(0, NAN)], "none": []}, metric="loss")
    assert not [text for text in labels(plot.wide) if "dead" in text or "none" in text]
    assert "dead: no finite value." in plot.alt
    assert "none: no finite value." in plot.alt


def test_values_arrive_unsorted_single_or_equal():
    assert learning_curves({"a": [(2, 3.0), (0, 1.0)]}).alt == "loss against step. a: from 1.00 to 3.00."
    for values in ([(0, 1.0)], [(0, 0.0), (1, 0.0)], [(0, 1e-12), (1, 2e-12)], [(0, -3e8), (1, 5e8)]):
        assert learning_curves({"a": values}).wide.startswith("<svg viewBox")


@pytest.mark.parametrize("width", ["wide", "narrow"])
def test_labels_at_line_ends_do_not_touch(width):
    svg = getattr(learning_curves({f"method{k:02d}": [(0, 1.0), (1, 1.0 + k / 1e4)] for k in range(14)}), width)
    heights = sorted(y for _, y, text in texts(svg) if text.startswith("method"))
    assert len(heights) == 14
    assert min(b - a for a, b in itertools.pairwise(heights)) > LINE - 0.1


@pytest.mark.parametrize(("width", "limit"), [("wide", WIDE), ("narrow", NARROW)])
def test_long_names_stay_inside_the_figure(width, limit):
    name = "a-method-with-a-name-that-no-phone-could-ever-show-in-one-line"
    plots = [
        learning_curves({name: [(0, 1.0), (1, 0.5)]}),
        lr_curves({name: [(1e-4, 1.0), (3.16e-3, 0.5)]}),
        change_per_site({f"{name}.{b}.{name}.{k}": 0.1 for b in range(9) for k in "abcd"}),
        change_per_site({name + str(k): 0.1 for k in range(3)}),
    ]
    for plot in plots:
        for x, _, text in texts(getattr(plot, width)):
            assert x <= limit
            assert text_width(text, SMALL) <= limit, text


def test_spread_keeps_order_gap_and_bounds():
    wanted = [5.0, 4.0, 90.0, 91.0, 92.0, 50.0]
    placed = _spread(wanted, 10, 0, 100)
    order = sorted(range(6), key=lambda i: wanted[i])
    ordered = [placed[i] for i in order]
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert min(placed) >= -1e-9
    assert max(placed) <= 100 + 1e-9
    assert placed[5] == 50.0


def test_long_curves_are_described_by_their_running_mean():
    plot = learning_curves({"a": [(i, 1.0 + (-1) ** i) for i in range(400)]})
    assert "running mean" in plot.alt
    last = float(re.search(r"to ([\d.]+)", plot.alt)[1])
    assert 0.7 < last < 1.3  # a single value is 0 or 2
    assert _running_mean([1.0, NAN, 3.0], 3)[0] == 1.0
    assert math.isnan(_running_mean([1.0, NAN, 3.0], 3)[1])


def test_sweep_marks_the_best_rate_of_each_direction():
    sweep = {"lora": [(1e-4, 0.3), (1e-3, interval(0.5, 0.4, 0.6)), (1e-2, 0.4)]}
    assert "lora: best 0.500 at 0.001" in lr_curves(sweep, metric="accuracy", better="higher").alt
    assert "lora: best 0.300 at 0.0001" in lr_curves(sweep, better="lower").alt


def test_spectrum_of_zeros_and_of_a_cut():
    assert spectrum([0.0, 0.0]).wide == ""
    plot = spectrum({"query": [3.0, 4.0, 0.0, NAN], "empty": []}, rank=1)
    assert "query: from 4.00 to 3.00, 3 values; the first 1 keep 64 % of the energy" in plot.alt
    assert "rank 1, 64 % of the energy" in labels(plot.wide)


def test_quality_against_parameters_shows_every_method_once():
    points = [
        Point("frozen", 0, interval(0.3, 0.28, 0.32)),
        Point("lora", 1e5, 0.4),
        Point("dora", 1.02e5, 0.401),
        Point("bad", 10, NAN),
    ]
    plot = quality_vs_parameters(points, metric="MRR")
    for svg in (plot.wide, plot.narrow):
        named = [text for text in labels(svg) if text.split()[0] in {"frozen", "lora", "dora", "bad"}]
        assert sorted(named) == ["dora 0.401", "frozen 0.300", "lora 0.400"]
    boxes = [(x, y, x + text_width(t)) for x, y, t in texts(plot.wide) if t.split()[0] in {"lora", "dora"}]
    (ax, ay, ar), (bx, by, br) = boxes
    assert abs(ay - by) > 12 or ar < bx or br < ax
    assert "frozen: 0.300 (interval 0.280 to 0.320) with no trained parameters" in plot.alt


@pytest.mark.parametrize("value", [NAN, 0.0])
def test_a_site_without_change_is_written_out(value):
    plot = change_per_site({"a.0.q": 0.1, "a.1.q": value})
    assert ("NaN" if math.isnan(value) else "0") in labels(plot.wide)
    assert ("not finite at 1" if math.isnan(value) else "zero at 1") in plot.alt


def test_two_hundred_sites_become_one_panel_a_block():
    inner = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    changes = {f"model.layers.{b}.{name}": 0.01 * (b + 1) for b in range(28) for name in inner} | {"lm_head": 0.5, "embed": 0.1}
    plot = change_per_site(changes)
    for svg in (plot.wide, plot.narrow):
        shown = labels(svg)
        assert [f"layer {b}" for b in range(28)] == [text for text in shown if text.startswith("layer ")]
        assert "lm_head" in shown
        assert svg.count("var(--accent)") == len(changes)
    height = float(re.search(r'viewBox="0 0 \S+ ([\d.]+)', plot.wide)[1])
    assert height < 1600  # a list would need 4,400


def test_names_without_blocks_and_too_many_of_them_are_cut_and_said():
    plot = change_per_site({f"weight{k}": float(k) for k in range(500)})
    assert "the 240 largest of 500 sites" in "".join(labels(plot.wide))
    assert "of 500 sites" in plot.alt


def test_rank_strips_unite_equal_neighbours():
    plot = rank_trajectories({"q": [(0, 8), (1, 8), (2, 8), (3, 4), (4, 4)], "k": [(0, 8)]})
    assert "8 → 4" in labels(plot.wide)
    assert "total from 16 to 12" in plot.alt


def test_dollars_and_foreign_letters_are_letters():
    plot = learning_curves({"$x^2$": [(0, 1.0), (1, 2.0)], "模型": [(0, 1.0), (1, 3.0)]})
    assert "$x^2$ 2.00" in labels(plot.wide)
    assert "模型 3.00" in labels(plot.wide)


def test_a_label_that_looks_like_markup_is_not_changed():
    name = 'a id="b" style="#0a0b02" url(#c)'
    svg = quality_vs_parameters([Point(name, 10, 1.0), Point("x", 20, 2.0)]).wide
    assert f"{name} 1.00" in labels(svg)


def test_shorten_keeps_both_ends():
    short = shorten("encoder.layer.11.attention.self.query", 120)
    assert text_width(short) <= 120
    assert short.startswith("enc")
    assert short.endswith("query")
    assert shorten("query", 120) == "query"
    assert shorten("query", 1) == "…"


def test_saved_svg_is_a_file_of_its_own(tmp_path):
    from xml.etree import ElementTree

    path = learning_curves({"a<b": [(0, 1.0), (1, 2.0)]}).save(tmp_path / "plot.svg")
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "loss against step. a<b" in root[0].text
    assert "prefers-color-scheme" in path.read_text(encoding="utf-8")


def linear(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def luminance(colour):
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(colour)))


def lab(rgb):
    """CIE Lab of linear RGB, D65."""
    matrix = [(0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041)]
    xyz = [sum(m * c for m, c in zip(row, rgb)) / white for row, white in zip(matrix, (0.95047, 1.0, 1.08883))]
    x, y, z = (t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


# Severity 1.0 of Machado, Oliveira and Fernandes, 2009.
VISION = {
    "normal": [(1, 0, 0), (0, 1, 0), (0, 0, 1)],
    "protanopia": [(0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)],
    "deuteranopia": [(0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)],
}


@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_of_text_can_be_read(dark):
    for background in ("paper", "panel"):
        paper = luminance(COLOURS[background][dark])
        for role in ("ink", "muted", "accent", "good", "bad", *SERIES):
            light, low = sorted((luminance(COLOURS[role][dark]), paper), reverse=True)
            assert (light + 0.05) / (low + 0.05) >= 4.5, (role, background)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("dark", [False, True])
def test_all_series_can_be_told_apart(vision, dark):
    # 2.3 is a just noticeable difference; thin lines need several times that.
    def seen(role):
        rgb = linear(COLOURS[role][dark])
        return lab([min(1.0, max(0.0, sum(m * c for m, c in zip(row, rgb)))) for row in VISION[vision]])

    for one, other in itertools.combinations(SERIES, 2):
        assert math.dist(seen(one), seen(other)) > 12, (one, other, math.dist(seen(one), seen(other)))
