"""What a run says: what was changed, what it costs, where the result lies, what to do next."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from typing import Any

__all__ = ["Screen", "megabytes"]

WIDTH = 9


class Screen:
    """Lines of a label and a text on standard output, or nothing.

    >>> Screen(quiet=False).say("sites", "36 of 37")
    sites    36 of 37
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def say(self, label: str, text: str) -> None:
        """One line, or several under one label."""
        if not self.quiet:
            lines = text.splitlines() or [""]
            print(f"{label:<{WIDTH}}{lines[0]}")
            print(textwrap.indent("\n".join(lines[1:]), " " * WIDTH) + "\n" if lines[1:] else "", end="")
            sys.stdout.flush()

    def table(self, table: Any) -> None:
        """A rich table."""
        if not self.quiet:
            from rich.console import Console

            console = Console(highlight=False)
            if not console.is_terminal:
                console = Console(highlight=False, width=140)  # a file or a pipe has no width to keep to
            console.print(table)


def megabytes(count: Iterable[int] | int) -> str:
    """Bytes in decimal megabytes or gigabytes, as file managers and vendors count.

    >>> megabytes(1_234_567), megabytes([3_000_000_000, 1])
    ('1.23 MB', '3.00 GB')
    """
    size = count if isinstance(count, int) else sum(count)
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
