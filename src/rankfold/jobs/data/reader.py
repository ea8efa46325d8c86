"""read: one function for every source of data that a job takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankfold.errors import DataError, FileError, OptionError, UnknownName
from rankfold.jobs.data import arrow, stdlib, textfiles
from rankfold.jobs.data.clean import clean
from rankfold.jobs.data.delimited import parse_delimited
from rankfold.jobs.data.encoding import decode
from rankfold.jobs.data.jsonlines import parse_json
from rankfold.jobs.data.limits import Limits
from rankfold.jobs.data.table import Table
from rankfold.jobs.data.tasks import wanted_columns

__all__ = ["SUFFIXES", "read"]

SUFFIXES: Mapping[str, str] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
"""File suffix to format."""


def read(
    path: str | Path,
    task: str,
    columns: str | Sequence[str] | Mapping[str, str] | None = None,
    *,
    only: Sequence[str] | None = None,
    encoding: str | None = None,
    split: str | None = None,
    classes: int = 2,
    limits: Limits | None = None,
) -> Table:
    """The rows of a file, a folder or a built-in set, under the column names of the task.

    | source | rows |
    |---|---|
    | `.csv`, `.tsv` | lines under a header; quotes as in RFC 4180 |
    | `.jsonl`, `.json` | one object a line, or one array of objects |
    | `.parquet` | its rows |
    | `.txt` | `lm`: one document; `classify`: lines of `label text`, or of texts where only the text is wanted |
    | folder of `.txt` | one document a file; for `classify` one sub-folder per class |
    | folder of one of the tables above | all its files, by name |
    | folder written by `save_to_disk` | a `datasets` data set, read without running anything |
    | a name of `rankfold.jobs.data.names()` | what every Python has |

    Args:
        path: file, folder or name.
        task: "classify", "sft", "embed" or "lm"; its columns are `text, label`, `prompt, completion`, `query, document`, `text`.
        columns: other names in the file: `{"label": "category"}` or `"label=category"`, or all by order: `"text,category"`.
        only: the columns that are needed; None means all of the task.
        encoding: of text files; None means UTF-8 with or without a byte order mark.
        split: part of a saved DatasetDict or of a built-in set; None means `train`.
        classes: least number of distinct labels; 1 for a test file.
        limits: sizes above which a file is refused.

    Raises UnknownName (file, format, column, encoding, split: with the nearest), FileError (too large, not readable, unsafe),
    DataError (empty, malformed, one class only, other encoding: with line or offset).

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "intents.csv")
    >>> _ = path.write_text("text,category\\nwhere is my card,arrival\\nit is lost,loss\\n,loss\\n")
    >>> table = read(path, "classify", "label=category")
    >>> table["label"], dict(table.dropped)
    (('arrival', 'loss'), {'empty text': 1})
    >>> read(path, "classify")
    Traceback (most recent call last):
    ...
    rankfold.errors.UnknownName: unknown column of intents.csv 'label'; ...
    """
    wanted = wanted_columns(task, columns, only)
    bounds = limits or Limits()
    place = Path(path)
    try:
        if not place.exists():
            if str(path) in stdlib.names():
                return stdlib.load(str(path), split or "train", task=task).select(tuple(wanted))
            raise _missing(place)
        if place.is_dir():
            raw = _read_folder(place, wanted, bounds, encoding, split, task)
        else:
            raw = _read_file(place, wanted, bounds, encoding, task)
    except OSError as cause:
        raise FileError(f"{path}: cannot be read: {cause.strerror or cause}") from cause
    except ValueError as cause:
        if "null" in str(cause) and "\0" in str(path):
            raise FileError(f"{str(path)!r}: a path cannot hold a null character") from cause
        raise
    return clean(raw, place.name or str(path), classes)
