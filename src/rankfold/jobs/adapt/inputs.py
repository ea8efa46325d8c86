"""The tables of a run: what trains, what is looked at on the way, and what gives the final figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rankfold.errors import DataError, OptionError, UnknownName
from rankfold.jobs.data import Table, label_names, names, read, split
from rankfold.linalg.random import Random

from .settings import AdaptSettings

__all__ = ["Inputs", "read_inputs"]


@dataclass(frozen=True)
class Inputs:
    """Rows by their use; labels of "classify" in the order of the outputs."""

    train: Table
    valid: Table | None
    test: Table | None
    labels: tuple[str, ...] | None

    def describe(self) -> list[str]:
        """One line a table."""
        lines = [self.train.describe()]
        lines += [f"valid: {len(self.valid):,} rows"] if self.valid is not None else []
        lines += [f"test: {self.test.describe()}"] if self.test is not None else []
        return lines


def read_inputs(settings: AdaptSettings) -> Inputs:
    """Read the files that the settings name; hold a share of the training rows out where no file for `valid` is given.

    A built-in set brings its own test part.

    Raises:
        UnknownName, FileError, DataError: as `rankfold.jobs.data.read`.
    """
    s = settings
    test_source = s.test if s.test is not None else s.data if _built_in(s.data) else None
    whole = read(s.data, s.task, s.columns, encoding=s.encoding)
    if s.limit is not None and s.limit < len(whole):
        whole = whole.take(Random(s.seed, "limit").choice(len(whole), s.limit).tolist())
    labels = label_names(whole) if s.task == "classify" else None
    if labels is not None and len(labels) < 2:
        raise DataError(f"{whole.source}: all {len(whole)} rows that --limit {s.limit} takes are {labels[0]!r}; take more rows")
    train, valid = whole, None
    if isinstance(s.valid, str):
        valid = _other(s.valid, s, "train")
    elif s.valid >= 1:
        raise OptionError(f"--valid: got {s.valid:g}; a share of the training rows lies from 0 to below 1, or name a file")
    elif s.valid > 0:
        train, valid = _held_out(whole, s)
    return Inputs(train, valid, None if test_source is None else _other(test_source, s, "test"), labels)


def _held_out(whole: Table, s: AdaptSettings) -> tuple[Table, Table | None]:
    """(rest, part); few running texts are cut each near its end. Data too small to part trains whole, unless asked otherwise."""
    assert isinstance(s.valid, float)
    if s.task == "lm" and len(whole) < 10:
        cuts = [_line_near(text, 1 - s.valid) for text in whole["text"]]
        heads = tuple(text[:cut] for text, cut in zip(whole["text"], cuts))
        tails = tuple(text[cut:] for text, cut in zip(whole["text"], cuts))
        return replace(whole, columns={"text": heads}), replace(whole, columns={"text": tails}, dropped={})
    try:
        return split(whole, s.valid, s.seed, stratify="label" if s.task == "classify" else None)
    except DataError:
        if "valid" in s.model_fields_set:
            raise
        return whole, None


def _line_near(text: str, share: float) -> int:
    """The place after the first line break at or after a share of the text; else that share itself."""
    at = int(share * len(text))
    return text.find("\n", at) + 1 or at


def _built_in(name: str) -> bool:
    return not Path(name).exists() and name in names()


def _other(name: str, s: AdaptSettings, part: str) -> Table:
    wanted = part if _built_in(name) else None
    try:
        return read(name, s.task, s.columns, encoding=s.encoding, split=wanted, classes=1)
    except UnknownName as error:
        raise UnknownName(f"{part if part == 'test' else 'valid'} data: {error}") from None
