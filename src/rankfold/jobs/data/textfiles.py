"""Plain text: files, folders of files, class-named folders, and lines that start with their label."""

from collections.abc import Mapping
from pathlib import Path

from rankfold.errors import DataError
from rankfold.jobs.data.encoding import decode
from rankfold.jobs.data.limits import Limits

__all__ = ["parse_text", "read_text_folder"]


def parse_text(text: str, wanted: Mapping[str, str], source: str, whole: bool = False) -> dict[str, list[str]]:
    """The text of a .txt file: one document (`whole`), or one row a line, `label text` where a label is wanted, else the text.

    A line's label is its first word, and the text is what follows it. Empty lines are skipped.

    Raises DataError for a line that has a label only, and when other columns are wanted.

    >>> parse_text("1 a fine film\\n0 a waste of time\\n", {"text": "text", "label": "label"}, "films.txt")
    {'text': ['a fine film', 'a waste of time'], 'label': ['1', '0']}
    """
    _check_roles(wanted, source)
    if whole:
        return {"text": [text]}
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if "label" not in wanted:
        return {"text": [line for _, line in lines]}
    columns: dict[str, list[str]] = {role: [] for role in wanted}
    for number, line in lines:
        label, *rest = line.split(maxsplit=1)
        if not rest:
            raise DataError(f"{source}: line {number:,} is one word; expected a label, a space and the text: {line[:40]!r}")
        columns["label"].append(label)
        columns["text"].append(rest[0])
    return columns


def read_text_folder(
    folder: Path, wanted: Mapping[str, str], limits: Limits, encoding: str | None = None
) -> dict[str, list[str]]:
    """A folder of .txt files, one text each, in the order of their paths; the label is the name of the folder's own sub-folder.

    Raises DataError when there is no .txt file, or a label is wanted and the files lie directly in the folder.
    """
    _check_roles(wanted, str(folder))
    files = sorted(path for path in folder.rglob("*.txt") if path.is_file())
    limits.check_files(len(files), str(folder))
    limits.check_size(sum(path.stat().st_size for path in files), str(folder))
    if not files:
        raise DataError(
            f"{folder}: no .txt file in it\n  expected *.txt, or one sub-folder of *.txt per class, or a saved data set"
        )
    columns: dict[str, list[str]] = {role: [] for role in wanted}
    for path in files:
        parts = path.relative_to(folder).parts
        if "label" in wanted:
            if len(parts) == 1:
                raise DataError(
                    f"{path}: lies in no class folder\n  expected {folder / 'CLASS' / path.name}: one sub-folder per class"
                )
            columns["label"].append(parts[0])
        columns["text"].append(decode(limits.load(path), str(path), encoding))
    return columns


def _check_roles(wanted: Mapping[str, str], source: str) -> None:
    if "text" not in wanted:
        raise DataError(
            f"{source}: plain text has no columns {', '.join(wanted)}\n  use csv, tsv, jsonl, parquet or a saved data set"
        )
