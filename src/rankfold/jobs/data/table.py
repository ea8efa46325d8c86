"""Table: the rows of a job as columns of equal length, with where they came from and what was left out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rankfold.errors import DataError, UnknownName, nearest

__all__ = ["Table", "label_ids", "label_names"]


@dataclass(frozen=True)
class Table:
    """Columns of equal length under the names that the task uses, whatever they were called in the file.

    Args:
        columns: name to values; texts and labels are `str`.
        source: the file, folder or built-in set, for messages.
        dropped: reason to number of rows that were read and left out.

    Raises DataError when the columns differ in length.

    >>> table = Table({"text": ("good", "bad"), "label": ("1", "0")}, source="films.csv", dropped={"empty text": 3})
    >>> len(table), table["label"], table.row(0)
    (2, ('1', '0'), {'text': 'good', 'label': '1'})
    >>> table.describe()
    'films.csv: 2 rows; 3 left out (3 empty text)'
    """

    columns: Mapping[str, tuple[Any, ...]]
    source: str
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{self.source}: columns differ in length: {lengths}")

    def __len__(self) -> int:
        return next((len(values) for values in self.columns.values()), 0)

    def __getitem__(self, name: str) -> tuple[Any, ...]:
        if name not in self.columns:
            raise UnknownName.of(f"column of {self.source}", name, self.columns)
        return self.columns[name]

    def row(self, index: int) -> dict[str, Any]:
        """One row as a dict."""
        return {name: values[index] for name, values in self.columns.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows as dicts, in order."""
        return (self.row(index) for index in range(len(self)))

    def take(self, indices: Iterable[int]) -> "Table":
        """The rows at `indices`, in that order; `dropped` still tells what the reader left out."""
        chosen = list(indices)
        return replace(self, columns={name: tuple(values[i] for i in chosen) for name, values in self.columns.items()})

    def describe(self) -> str:
        """One line for the screen: source, rows, and what was left out and why."""
        text = f"{self.source}: {len(self):,} rows"
        if total := sum(self.dropped.values()):
            text += f"; {total:,} left out ({', '.join(f'{n:,} {reason}' for reason, n in self.dropped.items())})"
        return text


def label_names(labels: Table | Iterable[str]) -> tuple[str, ...]:
    """The distinct labels in a fixed order: as numbers where all are whole numbers, else as text.

    Takes the labels, or a table that has a column `label`.

    >>> label_names(["10", "9", "10"]), label_names(["b", "9", "a"])
    (('9', '10'), ('9', 'a', 'b'))
    """
    distinct = set(labels["label"] if isinstance(labels, Table) else labels)
    try:
        return tuple(sorted(distinct, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(distinct))


def label_ids(labels: Table | Iterable[str], names: Sequence[str]) -> list[int]:
    """Each label's place in `names`.

    Raises DataError for a label that `names` lacks, for instance one that only the test file has.

    >>> label_ids(["b", "a", "b"], ("a", "b"))
    [1, 0, 1]
    """
    source = labels.source if isinstance(labels, Table) else "labels"
    place = {name: index for index, name in enumerate(names)}
    values = labels["label"] if isinstance(labels, Table) else tuple(labels)
    unknown = sorted({label for label in values if label not in place})
    if unknown:
        close = ", ".join(nearest(unknown[0], place))
        raise DataError(
            f"{source}: {len(unknown)} labels that training does not know, the first {unknown[0]!r}; nearest known: {close}"
        )
    return [place[label] for label in values]
