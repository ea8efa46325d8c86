"""Comma- and tab-separated tables with a header line."""

import csv
import io
from collections.abc import Mapping

from rankfold.errors import DataError
from rankfold.jobs.data.tasks import find_columns

__all__ = ["parse_delimited"]

_LONGEST_FIELD = 2**31 - 1  # documents are longer than the csv module's default of 131,072 characters


def parse_delimited(text: str, wanted: Mapping[str, str], source: str, tabs: bool = False) -> dict[str, list[str]]:
    """Role to values, of a csv text (`,`; or `;`, tab, `|` when only that finds the columns) or a tsv text.

    Quotes are read strictly, so that a quote that is never closed is an error and does not swallow the file. A tsv text
    that does not parse so is read with its quotes as plain characters, since many tsv files know no quoting.

    Raises UnknownName for a missing column, DataError for bad quoting or a row with more or fewer fields than the header.

    >>> parse_delimited('text,label\\n"well, fine",1\\n', {"text": "text", "label": "label"}, "films.csv")
    {'text': ['well, fine'], 'label': ['1']}
    """
    if tabs:
        try:
            return _parse(text, wanted, source, "\t", csv.QUOTE_MINIMAL)
        except DataError as quoted:
            try:
                return _parse(text, wanted, source, "\t", csv.QUOTE_NONE)
            except DataError:
                raise quoted from None
    return _parse(text, wanted, source, _delimiter(text, wanted), csv.QUOTE_MINIMAL)


def _delimiter(text: str, wanted: Mapping[str, str]) -> str:
    first = text.lstrip("\r\n").partition("\n")[0].rstrip("\r")
    for delimiter in ",;\t|":
        names = {name.strip().strip('"').strip() for name in first.split(delimiter)}
        if set(wanted.values()) <= names:
            return delimiter
    return ","


def _parse(text: str, wanted: Mapping[str, str], source: str, delimiter: str, quoting: int) -> dict[str, list[str]]:
    # The limit is the csv module's own global; it is put back, whatever happens.
    before = csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    try:
        rows = (row for row in reader if row)
        header = next(rows, None)
        if header is None:
            raise DataError(f"{source}: empty file; expected a header line and rows")
        place = find_columns(wanted, header, source)
        columns: dict[str, list[str]] = {role: [] for role in wanted}
        for row in rows:
            if len(row) != len(header):
                raise DataError(
                    f"{source}: line {reader.line_num:,} has {len(row)} fields, the header has {len(header)}\n"
                    f"  a field that holds the separator {delimiter!r} must stand in double quotes"
                )
            for role, index in place.items():
                columns[role].append(row[index])
    except csv.Error as cause:
        raise DataError(
            f"{source}: line {reader.line_num:,}: {cause}\n  a quote inside a quoted field is written twice"
        ) from None
    finally:
        csv.field_size_limit(before)
    return columns
