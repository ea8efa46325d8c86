"""`rankfold papers`: the 122 papers that rankfold covers, and how far each one is."""

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from rankfold.errors import FileError, UnknownName

from .screen import console

__all__ = ["FAMILIES", "STATES", "Paper", "find", "load", "papers", "select"]

STATES = ("planned", "begun", "done")
FAMILIES = (
    "adapt", "init", "rank", "update", "pretrain", "compress", "merge", "compose", "generate", "unlearn",
    "serve", "federate", "measure", "solve", "layer", "recipe",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One row of papers.toml.

    Args:
        number: 1 to 122.
        key: short name for the command line, in `[a-z0-9-]`.
        name: the name that the paper's method goes by.
        title: the paper's title.
        family: the job or axis of its main idea, one of FAMILIES.
        kind: "core" (low-rank learning itself) or "neighbour".
        headline: what the abstract states; never a result of ours.
        files: where its code lives, relative to the repository.
        difficulty: "S", "M" or "L".
        state: one of STATES; "done" means that the laws and oracles pass and the claim has been run,
            "begun" that the claim has been run and a part of the system is still to come.
        claim: the run that tests the headline's idea here, or empty.
        left: for a row that is begun, what is still to come.
    """

    number: int
    key: str
    name: str
    title: str
    family: str
    kind: str
    headline: str
    files: tuple[str, ...]
    difficulty: str
    state: str
    claim: str
    left: str = ""


def load() -> list[Paper]:
    """All rows, in the order of their numbers.

    Raises:
        FileError: a row of papers.toml lacks a field or has one that nobody knows.

    >>> len(load()), load()[2].title
    (122, 'LoRA-GA: Low-Rank Adaptation with Gradient Approximation')
    """
    return list(_load())


def find(query: str, rows: Iterable[Paper] | None = None) -> list[Paper]:
    """The rows that `query` means: a number, a key, else every row whose key, name or title contains it.

    Raises:
        UnknownName: nothing fits; the message lists the nearest keys.

    >>> [paper.name for paper in find("lora-ga")]
    ['LoRA-GA']
    >>> [paper.number for paper in find("dora")]
    [57]
    >>> find("lora-gaa")
    Traceback (most recent call last):
    ...
    rankfold.errors.UnknownName: unknown paper 'lora-gaa'; nearest: lora-ga, ...
    """
    everything = load() if rows is None else list(rows)
    wanted = query.strip().lower()
    exact = [p for p in everything if wanted in (str(p.number), p.key, p.name.lower())]
    partial = [p for p in everything if wanted and any(wanted in text.lower() for text in (p.key, p.name, p.title))]
    if not (exact or partial):
        numbers = f"numbers go from 1 to {len(everything)}; " if wanted.isdigit() else ""
        raise UnknownName.of("paper", query, [p.key for p in everything], f"{numbers}every paper: rankfold papers")
    return exact or partial


def select(rows: Iterable[Paper], state: str | None = None, family: str | None = None) -> list[Paper]:
    """The rows of one state, of one family, or of both.

    Raises:
        UnknownName: a state or family that is none of STATES or FAMILIES.

    >>> len(select(load(), family="adapt")), select(load(), family="serve")[0].key
    (17, 's-lora')
    """
    for what, value, known in (("state", state, STATES), ("family", family, FAMILIES)):
        if value is not None and value not in known:
            raise UnknownName.of(what, value, known, f"there are: {', '.join(known)}")
    return [p for p in rows if state in (None, p.state) and family in (None, p.family)]


def papers(
    query: Annotated[str | None, typer.Argument(help="Number, key or part of a name or title.", show_default=False)] = None,
    state: Annotated[str | None, typer.Option(help=f"One of: {', '.join(STATES)}.", show_default=False)] = None,
    family: Annotated[str | None, typer.Option(help=f"One of: {', '.join(FAMILIES)}.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """List the papers that rankfold covers, or show one in full."""
    rows = select(load() if query is None else find(query), state, family)
    if as_json:
        print(json.dumps([asdict(p) for p in rows], indent=2, ensure_ascii=False))
        return
    screen = console()
    if query is not None and len(rows) == 1:
        screen.print(_page(rows[0]))
        return
    screen.print(_table(rows, screen.width))
    screen.print(Text(_summary(rows)))


@cache
def _load() -> tuple[Paper, ...]:
    rows = tomllib.loads(files("rankfold").joinpath("papers.toml").read_text(encoding="utf-8"))["paper"]
    wanted = {field.name for field in fields(Paper)}
    for place, row in enumerate(rows, start=1):
        wrong = (row.keys() ^ wanted) - ({"left"} - row.keys())  # only rows that are begun say what is left
        if wrong:
            raise FileError(f"papers.toml, row {place}: missing or unknown fields: {', '.join(sorted(wrong))}")
    return tuple(sorted((Paper(**row | {"files": tuple(row["files"])}) for row in rows), key=lambda p: p.number))


def _table(rows: Sequence[Paper], width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    room = width
    for heading, name in (("#", "number"), ("key", "key"), ("family", "family"), ("state", "state")):
        widest = max(len(heading), *(len(str(getattr(p, name))) for p in rows)) if rows else len(heading)
        table.add_column(heading, width=widest, justify="right" if heading == "#" else "left")
        room -= widest + 2  # two blanks between columns
    table.add_column("title", width=max(room, 20), no_wrap=True, overflow="ellipsis")  # titles alone are cut
    for p in rows:
        table.add_row(str(p.number), p.key, p.family, Text(p.state, style="green" if p.state == "done" else ""), Text(p.title))
    return table


def _page(paper: Paper) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in asdict(paper).items():
        if name == "left" and not value:
            continue
        text = "\n".join(value) if name == "files" else str(value) or "none yet"
        table.add_row(name, Text(text))
    return table


def _summary(rows: Sequence[Paper]) -> str:
    counts = Counter(p.state for p in rows)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES)
    return f"\n{len(rows)} papers: {states}. One in full: rankfold papers KEY"
