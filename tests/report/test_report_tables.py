"""Tables: what is best, what the data cannot tell apart, what is missing, in three forms from one description."""

import io

import pytest

from rankfold.errors import UnknownName
from rankfold.measure import Interval
from rankfold.report import Column, console_table, html_table, markdown_table
from rankfold.report.tables import cells

NAN = float("nan")


def interval(estimate, low, high):
    return Interval(estimate, low, high, level=0.95)


def marks(values, better="higher"):
    return [cell.mark for [cell] in cells([{"v": value} for value in values], [Column("v", better=better)])]


@pytest.mark.parametrize(
    ("values", "better", "expected"),
    [
        ([1, 3, 2], "higher", ["", "best", ""]),
        ([1, 3, 2], "lower", ["best", "", ""]),
        ([1, 3, 3], "higher", ["", "best", "best"]),
        ([1, 3, 2], None, ["", "", ""]),
        ([2, 2], "higher", ["", ""]),  # nothing was won
        ([None, 5], "higher", ["", ""]),
        ([NAN, 1, 2], "higher", ["bad", "", "best"]),
        ([float("inf"), 1, 2], "higher", ["bad", "", "best"]),
        ([NAN, NAN], "lower", ["bad", "bad"]),
        ([interval(5, 4, 6), interval(4, 3, 4.5), interval(3, 2, 3.9)], "higher", ["best", "tied", ""]),
        ([interval(1, 0.5, 2), interval(3, 2, 4), interval(5, 4.5, 6)], "lower", ["best", "tied", ""]),
        ([interval(5, NAN, 6), interval(4, 3, 4.5)], "higher", ["best", ""]),
        (["a", "b"], "higher", ["", ""]),
        ([True, False], "higher", ["", ""]),
    ],
)
def test_marks(values, better, expected):
    assert marks(values, better) == expected


def test_an_unknown_column_is_named_and_a_missing_value_is_a_dash():
    with pytest.raises(UnknownName, match=r"mmr.*nearest: mrr"):
        cells([{"mrr": 1.0}], [Column("mmr")])
    assert [c.text for [c] in cells([{"mrr": 1.0}, {}], [Column("mrr", format=".1f")])] == ["1.0", "–"]


def test_html_sorts_by_the_number_not_by_what_is_shown():
    html = html_table([{"p": 950}, {"p": 22_713_216}, {"p": NAN}, {"p": None}], [Column("p", format="count")])
    assert 'data-sort="950.0"' in html
    assert 'data-sort="22713216.0">22.7 M<' in html
    assert html.count("data-sort") == 2


def test_html_escapes_attributes_too():
    html = html_table([{"s": '"><script>'}], [Column("s", '"><b>', unit="<i>", format="code")], caption="<u>")
    for raw in ('"><script>', "<b>", "<i>", "<u>"):
        assert raw not in html


def test_markdown_cells_cannot_leave_their_cell():
    text = markdown_table([{"s": "a|b\n<b>[x](y)", "c": "`|"}], [Column("s"), Column("c", format="code")])
    lines = text.splitlines()
    assert len(lines) == 3
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "&lt;b>" in text
    assert "\\[x\\]" in text


def test_markdown_of_nothing_is_still_a_table():
    assert markdown_table([], [Column("a"), Column("b")]).splitlines()[1] == "|:----|:----|"


def test_markdown_bold_and_italic():
    rows = [{"v": interval(0.4, 0.3, 0.5)}, {"v": interval(0.38, 0.3, 0.45)}, {"v": interval(0.1, 0.0, 0.2)}]
    text = markdown_table(rows, [Column("v", "MRR", format=".2f", better="higher")])
    assert "**0.40** [0.30, 0.50]" in text
    assert "*0.38* [0.30, 0.45]" in text
    assert "  0.10 [0.00, 0.20]" in text


def test_console_prints_names_as_they_are():
    from rich.console import Console

    rows = [{"site": "[red]x[/red]", "v": 0.25}, {"site": "b\x1b[31m", "v": 0.5}]
    console = Console(file=io.StringIO(), width=80)
    console.print(console_table(rows, [Column("site"), Column("v", format=".2f", better="higher")], title="[b]t[/b]"))
    text = console.file.getvalue()
    for expected in ("[red]x[/red]", "[b]t[/b]", "0.50"):
        assert expected in text
    assert "\x1b" not in text


def test_other_types_of_interval_are_understood():
    class Estimate:
        estimate, low, high = 0.5, 0.4, 0.6

    [[cell]] = cells([{"v": Estimate()}], [Column("v", format=".1f")])
    assert (cell.text, cell.interval, cell.sort) == ("0.5", "[0.4, 0.6]", 0.5)
