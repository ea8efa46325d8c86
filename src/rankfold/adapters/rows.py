"""Rows of a parameter in the name of an extra tensor: "embed_tokens.weight[3,50:52]" holds rows 3, 50 and 51, in this order."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from rankfold.errors import OptionError

__all__ = ["rows_text", "split_rows"]

_ROWS = re.compile(r"^(?P<name>[^\[\]]+)\[(?P<rows>[\d:,]+)\]$")
_RANGE = re.compile(r"^(\d{1,18})(?::(\d{1,18}))?$")


def split_rows(name: str, size: int | None = None) -> tuple[str, tuple[int, ...] | None]:
    """(name without the brackets, the rows in rising order); None where it has no brackets.

    Args:
        size: rows that there are; None leaves the ranges unread, and gives () for the rows.

    Raises:
        OptionError: brackets that hold no rows, or rows beyond `size`.

    >>> split_rows("embed.weight[50:52,3]", size=52)
    ('embed.weight', (3, 50, 51))
    >>> split_rows("embed.weight", size=52)
    ('embed.weight', None)
    >>> split_rows("embed.weight[50:53]", size=52)
    Traceback (most recent call last):
    ...
    rankfold.errors.OptionError: embed.weight[50:53]: 50:53 is no range of its 52 rows; write [50], [50:52] or [3,50:52]
    """
    found = _ROWS.match(name)
    if found is None:
        return name, None
    if size is None:
        return found["name"], ()
    rows: set[int] = set()
    for part in found["rows"].split(","):
        ends = _RANGE.match(part)
        start = int(ends[1]) if ends else 0
        stop = int(ends[2]) if ends and ends[2] else start + 1
        if not ends or not start < stop <= size:
            raise OptionError(f"{name}: {part} is no range of its {size} rows; write [50], [50:52] or [3,50:52]")
        rows.update(range(start, stop))
    return found["name"], tuple(sorted(rows))


def rows_text(rows: Iterable[int]) -> str:
    """The brackets of rising rows.

    >>> rows_text([3, 50, 51])
    '[3,50:52]'
    """
    parts = []
    for _, run in itertools.groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0]):
        values = [row for _, row in run]
        parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}:{values[-1] + 1}")
    return f"[{','.join(parts)}]"
