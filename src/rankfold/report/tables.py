"""One description of a table, three forms: the console (rich), a page (HTML) and a document (markdown).

Rows are mappings; a Column says how its values are named, written and compared. A value may be an Interval of
`rankfold.measure`. The best value of a column is bold; where values have intervals, those that overlap the best one's are
marked too, since the data do not tell them apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UnknownName
from .values import bounds, clean, number, show

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.table import Table

__all__ = ["Cell", "Column", "cells", "console_table", "html_table", "markdown_table"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column: `key` finds the value in a row.

    Args:
        key: name of the value in a row; a row without it shows a dash.
        name: heading, the key by default.
        unit: written behind the heading.
        format: a format specification (".3f"), or `count` (147 k), `bytes` (1.5 GiB), `seconds` (1 min 23 s),
            `percent` (0.012 is 1.2 %), `code` (fixed-width text).
        align: numbers right and text left by default.
        better: which direction is better; None means that the column is not a contest.
    """

    key: str
    name: str = ""
    unit: str = ""
    format: str = ""
    align: Literal["left", "right"] | None = None
    better: Literal["higher", "lower"] | None = None

    @property
    def heading(self) -> str:
        return clean(f"{self.name or self.key} ({self.unit})" if self.unit else self.name or self.key)

    @property
    def arrow(self) -> str:
        return {"higher": "↑", "lower": "↓", None: ""}[self.better]


@dataclass(frozen=True)
class Cell:
    """A value as text, its interval as text, a key to sort by, and a mark: best, tied, bad (not finite) or none."""

    text: str
    interval: str
    sort: float | str | None
    mark: Literal["best", "tied", "bad", ""]


def cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[Cell]]:
    """The cells of a table, by row, before any form is given to them.

    >>> [[cell.text + cell.mark] for [cell] in cells([{"f1": 0.5}, {"f1": 0.75}], [Column("f1", format=".2f", better="higher")])]
    [['0.50'], ['0.75best']]

    Raises:
        UnknownName: a column that no row has.
    """
    known = {key for row in rows for key in row}
    for column in columns:
        if rows and column.key not in known:
            raise UnknownName.of("column", column.key, known)
    by_column = [_column_cells([row.get(column.key) for row in rows], column) for column in columns]
    return [list(row) for row in zip(*by_column)] if columns else []


def console_table(rows: Sequence[Row], columns: Sequence[Column], *, title: str = "") -> "Table":
    """A rich table: `rich.print(console_table(rows, columns))`. Names from users are printed as they are, never as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(clean(title)) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    grid = cells(rows, columns)
    for index, column in enumerate(columns):
        heading = Text(f"{column.heading} {column.arrow}".strip())
        table.add_column(heading, justify=_align(column, [row[index] for row in grid]), overflow="fold")
    styles = {"best": "bold", "tied": "underline", "bad": "bold red", "": ""}
    for row in grid:
        line = []
        for cell in row:
            text = Text(cell.text, style=styles[cell.mark])
            line.append(text.append(f" {cell.interval}", style="not bold not underline dim") if cell.interval else text)
        table.add_row(*line)
    return table


def html_table(rows: Sequence[Row], columns: Sequence[Column], *, caption: str = "") -> "Markup":
    """A <table> whose columns a page's script can sort; every text in it is escaped.

    >>> "&lt;b&gt;" in html_table([{"site": "<b>"}], [Column("site")])
    True
    """
    from markupsafe import Markup, escape

    grid = cells(rows, columns)
    sides: list[str] = [_align(column, [row[index] for row in grid]) for index, column in enumerate(columns)]
    # A first column of short names stays in sight when the table is scrolled sideways; long ones would hide the rest.
    if columns and max((len(row[0].text) for row in grid), default=0) <= 18:
        sides[0] += " pin"
    head, body = [], []
    for side, column in zip(sides, columns):
        spoken = f'<span class="arrow" title="{column.better} is better">{column.arrow}</span>' if column.better else ""
        head.append(f'<th scope="col" class="{side}">{escape(column.heading)}{spoken}</th>')
    for row in grid:
        line = []
        for index, (cell, column, side) in enumerate(zip(row, columns, sides)):
            tag = 'th scope="row"' if index == 0 else "td"
            side += " short" if len(cell.text) <= 24 else ""
            text: Any = escape(cell.text)
            text = f"<code>{text}</code>" if column.format == "code" else text
            text = f"<b>{text}</b>" if cell.mark == "best" else f"<u>{text}</u>" if cell.mark == "tied" else text
            meaning = {"best": "best", "tied": "interval overlaps the best one's", "bad": "not finite", "": ""}[cell.mark]
            extra = f'<span class="interval">{escape(cell.interval)}</span>' if cell.interval else ""
            key = "" if cell.sort is None else f' data-sort="{escape(cell.sort)}"'
            hint = f' title="{meaning}"' if meaning else ""
            line.append(f'<{tag} class="{f"{side} {cell.mark}".strip()}"{key}{hint}>{text}{extra}</{tag.split()[0]}>')
        body.append("<tr>" + "".join(line) + "</tr>")
    name = f"<caption>{escape(clean(caption))}</caption>" if caption else ""
    return Markup(f"<table>{name}<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(body)}</tbody></table>")


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A table for a document; bold is best, italic has an interval that overlaps the best one's.

    >>> print(markdown_table([{"m": "lora", "f1": 0.5}, {"m": "dora", "f1": 0.75}],
    ...                      [Column("m", "method"), Column("f1", "F1", format=".2f", better="higher")]))
    | method |     F1 ↑ |
    |:-------|---------:|
    | lora   |     0.50 |
    | dora   | **0.75** |
    """
    grid = cells(rows, columns)
    sides = [_align(column, [row[i] for row in grid]) for i, column in enumerate(columns)]
    wrap = {"best": "**{}**", "tied": "*{}*", "bad": "{}", "": "{}"}
    lines = [[_plain_markdown(f"{column.heading} {column.arrow}".strip()) for column in columns]]
    for row in grid:
        texts = []
        for cell, column in zip(row, columns):
            text = _code_markdown(cell.text) if column.format == "code" else _plain_markdown(cell.text)
            texts.append(wrap[cell.mark].format(text) + (f" {cell.interval}" if cell.interval else ""))
        lines.append(texts)
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    rule = ["-" * (w + 1) + ":" if side == "right" else ":" + "-" * (w + 1) for w, side in zip(widths, sides)]
    rows_out = []
    for line in lines:
        padded = [text.rjust(w) if side == "right" else text.ljust(w) for text, w, side in zip(line, widths, sides)]
        rows_out.append("| " + " | ".join(padded) + " |")
    return "\n".join([rows_out[0], "|" + "|".join(rule) + "|", *rows_out[1:]])


def _column_cells(values: list[Any], column: Column) -> list[Cell]:
    numbers = [number(value) for value in values]
    finite = [x for x in numbers if x is not None and math.isfinite(x)]
    best = None
    if column.better and len(set(finite)) > 1:  # one value alone, or all the same, has won nothing
        best = (max if column.better == "higher" else min)(finite)
    span = next((bounds(v) for v, x in zip(values, numbers) if best is not None and x == best), None)
    result = []
    for value, x in zip(values, numbers):
        mine = bounds(value)
        mark: Literal["best", "tied", "bad", ""] = ""
        if x is not None and not math.isfinite(x):
            mark = "bad"
        elif best is not None and x == best:
            mark = "best"
        elif mine and span and mine[0] <= span[1] and span[0] <= mine[1]:
            mark = "tied"
        interval = f"[{show(mine[0], column.format)}, {show(mine[1], column.format)}]" if mine else ""
        key = (x if math.isfinite(x) else None) if x is not None else None if value is None else show(value)
        result.append(Cell(show(value, column.format), interval, key, mark))
    return result


def _align(column: Column, column_cells: list[Cell]) -> Literal["left", "right"]:
    if column.align:
        return column.align
    return "left" if not column_cells or any(isinstance(cell.sort, str) for cell in column_cells) else "right"


def _plain_markdown(text: str) -> str:
    for special in "\\`*[]|":
        text = text.replace(special, "\\" + special)
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _code_markdown(text: str) -> str:
    # Nothing is special within a code span but its own fence and, in a table, the bar.
    fence = "``" if "`" in text else "`"
    gap = " " if "`" in text else ""
    return f"{fence}{gap}{text}{gap}{fence}".replace("|", "\\|")
