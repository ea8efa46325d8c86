"""Where the commands write: tables for a terminal, wide enough for a file or a pipe."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["console", "table"]

WIDE = 160


def console() -> "Console":
    """A console of the terminal's width; 160 columns where there is no terminal."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
    return Console(width=wide, highlight=False, markup=False, emoji=False)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], numbers: str = "", wrapped: str = "") -> "Table":
    """A table without lines. `numbers` and `wrapped` name the headings, comma-separated, that stand right, and that may wrap."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        right = heading in numbers.split(",")
        made.add_column(heading, justify="right" if right else "left", no_wrap=heading not in wrapped.split(","), overflow="fold")
    for row in rows:
        made.add_row(*(Text("" if value is None else str(value)) for value in row))
    return made
