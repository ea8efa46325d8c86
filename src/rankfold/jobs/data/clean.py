"""From raw values to a Table: labels become text, rows without content are left out and counted."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rankfold.errors import DataError
from rankfold.jobs.data.table import Table

__all__ = ["clean"]


def clean(columns: Mapping[str, Sequence[Any]], source: str, classes: int = 2) -> Table:
    """A Table of the rows that have content in every column.

    A missing value, an empty text and a text that UTF-8 cannot hold (half of a surrogate pair) leave the row out,
    with a count by reason. Labels may be text, whole numbers or booleans.

    Args:
        columns: role to raw values.
        source: for messages.
        classes: how many distinct labels there must be, where there is a column `label`.

    Raises DataError for a value of another kind, for no usable row, and for too few classes.

    >>> clean({"text": ["good", "", "bad"], "label": [1, 0, 0]}, "films.csv")
    Table(columns={'text': ('good', 'bad'), 'label': ('1', '0')}, source='films.csv', dropped={'empty text': 1})
    """
    dropped: Counter[str] = Counter()
    kept: dict[str, list[str]] = {role: [] for role in columns}
    total = 0
    for number, values in enumerate(zip(*columns.values()), start=1):
        total = number
        row = [_as_text(value, role, number, source) for role, value in zip(columns, values)]
        reason = next((why for role, text in zip(columns, row) if (why := _unusable(role, text))), None)
        if reason:
            dropped[reason] += 1
            continue
        for role, text in zip(columns, row):
            kept[role].append(text or "")
    table = Table({role: tuple(values) for role, values in kept.items()}, source, dict(dropped))
    if not len(table):
        if not total:
            raise DataError(f"{source}: no rows under the column names")
        why = f": {', '.join(f'{n:,} {reason}' for reason, n in dropped.items())}" if dropped else ""
        raise DataError(f"{source}: no usable rows among the {total:,} there{why}")
    _check_classes(table, classes)
    return table


def _as_text(value: Any, role: str, number: int, source: str) -> str | None:
    if isinstance(value, str):
        return value.strip() if role == "label" else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if role == "label" and isinstance(value, bool | int):
        return str(value)
    if role == "label" and isinstance(value, float) and value.is_integer():
        return str(int(value))  # whole numbers beside a missing one are often stored as floats
    kinds = "text, a whole number or true/false" if role == "label" else "text"
    raise DataError(f"{source}: row {number:,}: {role} is {type(value).__name__} {str(value)[:40]!r}; expected {kinds}")


def _unusable(role: str, text: str | None) -> str | None:
    if text is None:
        return f"missing {role}"
    if not text.strip():
        return f"empty {role}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{role} that is not valid Unicode"
    return None


def _check_classes(table: Table, classes: int) -> None:
    if "label" not in table.columns:
        return
    found = sorted(set(table["label"]))
    if len(found) < classes:
        raise DataError(
            f"{table.source}: {len(found)} class only ({', '.join(map(repr, found))}) in {len(table):,} rows; {classes} needed\n"
            "  if the label is another column: --columns label=NAME"
        )
