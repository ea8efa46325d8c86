"""A fixed split of a table in two, from a hash of the rows: no generator, the same on every machine."""

import json
from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b

from rankfold.errors import DataError, OptionError
from rankfold.jobs.data.table import Table

__all__ = ["split", "stable_hash"]


def stable_hash(*parts: str | int) -> int:
    """A 64-bit hash that is the same in every process, machine and version (Python's own `hash` is not).

    >>> stable_hash("split", 0, "a") == stable_hash("split", 0, "a"), stable_hash("a", "bc") == stable_hash("ab", "c")
    (True, False)
    """
    text = json.dumps(parts, ensure_ascii=True)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def split(table: Table, fraction: float, seed: int = 0, stratify: str | None = None) -> tuple[Table, Table]:
    """(rest, part): `part` has about `fraction` of the rows; both keep the order of `table`.

    A row's side depends on its content and the seed, so a table in another order splits into the same rows. Rows that are
    equal in every column fall on the same side; `part` is larger than asked by such copies only.

    Args:
        fraction: in (0, 1).
        seed: another seed, another split.
        stratify: a column, usually `label`; each of its values is split apart, and one with a single distinct row
            stays in the rest.

    Raises OptionError for a fraction outside (0, 1), UnknownName for the column, DataError when a side would be empty.

    >>> table = Table({"text": tuple("abcdefgh"), "label": tuple("00001111")}, source="x")
    >>> rest, part = split(table, 0.25, stratify="label")
    >>> len(rest), len(part), sorted(part["label"])
    (6, 2, ['0', '1'])
    """
    if not 0 < fraction < 1:
        raise OptionError(f"fraction={fraction}: must lie between 0 and 1, both excluded")
    strata: dict[str, list[int]] = defaultdict(list)
    if stratify is None:
        strata[""] = list(range(len(table)))
    else:
        for index, value in enumerate(table[stratify]):
            strata[str(value)].append(index)
    part: set[int] = set()
    for indices in strata.values():
        part.update(_drawn(table, indices, fraction, seed))
    if not part or len(part) == len(table):
        raise DataError(f"{table.source}: {len(table):,} rows cannot be split at {fraction:g} so that both sides have some")
    return table.take(i for i in range(len(table)) if i not in part), table.take(sorted(part))


def _drawn(table: Table, indices: Sequence[int], fraction: float, seed: int) -> list[int]:
    copies: dict[int, list[int]] = defaultdict(list)
    for index in indices:
        copies[stable_hash("split", seed, *(str(value) for value in table.row(index).values()))].append(index)
    asked = round(fraction * len(indices))
    drawn: list[int] = []
    for key in sorted(copies)[:-1]:  # one distinct row always stays in the rest
        if len(drawn) >= asked:
            break
        drawn.extend(copies[key])
    return drawn
