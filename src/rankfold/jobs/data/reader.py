"""read: one function for every source of data that a job takes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankfold.errors import DataError, FileError, OptionError, UnknownName
from rankfold.jobs.data import stdlib
from rankfold.jobs.data.arrow import is_saved_dataset, read_parquet, read_saved
from rankfold.jobs.data.clean import clean
from rankfold.jobs.data.delimited import parse_delimited
from rankfold.jobs.data.encoding import decode
from rankfold.jobs.data.jsonlines import parse_json
from rankfold.jobs.data.limits import Limits
from rankfold.jobs.data.table import Table
from rankfold.jobs.data.tasks import wanted_columns
from rankfold.jobs.data.textfiles import parse_text, read_text_folder

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
    | folder of shards | tables of one format whose names differ in digits only, in the order of their names |
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
                return stdlib.load(str(path), split or "train", task=task)
            raise _missing(place)
        if place.is_dir() and is_saved_dataset(place):
            raw = read_saved(place, wanted, bounds, split)
        elif split is not None:
            raise OptionError(f"split={split!r}: {path} has no splits; saved data sets and built-in sets have")
        elif place.is_dir():
            raw = _read_folder(place, wanted, bounds, encoding, task)
        else:
            raw = _read_file(place, wanted, bounds, encoding, task)
    except OSError as cause:
        raise FileError(f"{path}: cannot be read: {cause.strerror or cause}") from cause
    bounds.check_rows(len(next(iter(raw.values()))), str(path))
    return clean(raw, str(path), classes)


def _read_file(path: Path, wanted: Mapping[str, str], limits: Limits, encoding: str | None, task: str) -> dict[str, list[Any]]:
    if not path.is_file():
        raise FileError(f"{path}: neither a file nor a folder")
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        hint = f"read here: {', '.join(SUFFIXES)}, folders of them, saved data sets"
        raise UnknownName.of(f"file format of {path}:", path.suffix or path.name, SUFFIXES, hint=hint)
    if kind == "parquet":
        return read_parquet(path, wanted, limits)
    text = decode(limits.load(path), str(path), encoding)
    if kind == "text":
        return parse_text(text, wanted, str(path), whole=task == "lm")
    if kind == "json":
        return parse_json(text, wanted, str(path))
    return parse_delimited(text, wanted, str(path), tabs=kind == "tsv")


def _read_folder(
    folder: Path, wanted: Mapping[str, str], limits: Limits, encoding: str | None, task: str
) -> dict[str, list[Any]]:
    shards = sorted(p for p in folder.iterdir() if SUFFIXES.get(p.suffix.lower(), "text") != "text" and p.is_file())
    if not shards:
        return read_text_folder(folder, wanted, limits, encoding)
    # train.csv beside test.csv must never be read as one set; shard-001 beside shard-002 is one.
    if len({re.sub(r"\d+", "", shard.name) for shard in shards}) > 1:
        listed = ", ".join(shard.name for shard in shards[:6]) + (", ..." if len(shards) > 6 else "")
        raise DataError(f"{folder}: holds several tables: {listed}\n  name one of them: {shards[0]}")
    limits.check_files(len(shards), str(folder))
    limits.check_size(sum(shard.stat().st_size for shard in shards), str(folder))
    parts = [_read_file(shard, wanted, limits, encoding, task) for shard in shards]
    return {role: [value for part in parts for value in part[role]] for role in wanted}


def _missing(path: Path) -> UnknownName:
    try:
        beside = [item.name for item in path.parent.iterdir() if not item.name.startswith(".")]
    except (OSError, ValueError):
        return UnknownName(f"no file or folder {str(path)!r}: its folder {str(path.parent)!r} does not exist")
    hint = f"built-in sets: {', '.join(stdlib.names())}"
    return UnknownName.of("file, folder or built-in set", path.name, [*beside, *stdlib.names()], hint=hint)
