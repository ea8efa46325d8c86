"""`rankfold methods`: the catalogue by axis, one member in full, or what composes with what."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from rankfold.core.registry import AXES, Entry, entries
from rankfold.errors import UnknownName
from rankfold.methods.catalogue import COMPOSITIONS, Composition

from .member import by_reason, page, page_of_composition
from .screen import console, table

__all__ = ["methods"]


def methods(
    name: Annotated[str | None, typer.Argument(help="A member or a composition, in full.", show_default=False)] = None,
    axis: Annotated[str | None, typer.Option(help=f"One of: {', '.join(AXES)}.", show_default=False)] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="What composes with what, and why the rest doesn't.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the methods by axis, or show one in full."""
    if axis is not None and axis not in AXES:
        raise UnknownName.of("axis", axis, AXES, f"there are: {', '.join(AXES)}")
    if matrix:
        _matrix(name, as_json)
    elif name is not None:
        _one(name, axis, as_json)
    elif as_json:
        print(json.dumps([_plain(e) for e in entries(axis)], indent=2, ensure_ascii=False))
    else:
        _list(axis)


def _list(axis: str | None) -> None:
    screen = console()
    for each in AXES if axis is None else (axis,):
        rows = [(e.name, ", ".join(e.aliases), e.summary) for e in entries(each)]
        if rows:
            screen.print(f"{each}", style="bold underline")
            screen.print(table(("name", "also", "what it is"), rows, wrapped="what it is"), "")
    if axis is None:
        screen.print("compositions", style="bold underline")
        screen.print(
            table(("name", "parts", "what it is"), [(n, c.parts, c.doc) for n, c in COMPOSITIONS.items()], wrapped="what it is"),
            "",
        )
    screen.print(
        "One in full: rankfold methods NAME. A chain: magnitude+lora+init:eva. What composes with what: rankfold methods --matrix"
    )


def _one(name: str, axis: str | None, as_json: bool) -> None:
    found: list[Entry | Composition] = [e for e in entries(axis) if name in (e.name, e.key, *e.aliases)]
    composition = COMPOSITIONS.get(name) if axis is None else None
    if composition is not None:
        found.insert(0, composition)
    if not found:
        known = [e.name for e in entries(axis)] + ([] if axis else list(COMPOSITIONS))
        raise UnknownName.of("method", name, known, "every name: rankfold methods")
    if as_json:
        print(json.dumps([_plain(each) for each in found], indent=2, ensure_ascii=False))
        return
    for number, each in enumerate(found):
        if number:
            print()
        print(page_of_composition(name, each) if isinstance(each, Composition) else page(each))


def _plain(each: Entry | Composition) -> dict[str, object]:
    if isinstance(each, Composition):
        return {**asdict(each), "options": dict(each.options)}
    return {
        "axis": each.axis, "name": each.name, "aliases": list(each.aliases), "paper": each.paper, "summary": each.summary,
        "options": [asdict(o) for o in each.options], "traits": dict(each.traits), "doc": each.doc,
    }  # fmt: skip


def _matrix(name: str | None, as_json: bool) -> None:
    from .matrix import COLUMNS, pairs

    found = pairs(name)
    if as_json:
        print(json.dumps([asdict(p) for p in found], indent=2, ensure_ascii=False))
        return
    screen = console()
    marks = {"tested": "tested", "derived": "derived", "refused": "-"}
    for column in COLUMNS:
        here = {(p.structure, p.other): p for p in found if p.column == column}
        others = list(dict.fromkeys(other for _, other in here))
        rows = [
            (s, *(marks[here[s, o].state] if (s, o) in here else "" for o in others)) for s in dict.fromkeys(s for s, _ in here)
        ]
        if not rows:
            continue
        screen.print(table((f"structure \\ {column}", *others), rows), "")
        for p in here.values():
            if p.note and p.state != "refused":
                screen.print(f"{p.structure} takes {p.other} {p.note}: {p.chain}", soft_wrap=True)
        for reason, chains in by_reason({p.chain: p.note for p in here.values() if p.state == "refused"}).items():
            screen.print(f"-: {reason}\n     {', '.join(chains)}", soft_wrap=True)
        screen.print()
    screen.print("tested: the default of its axis, or a named composition; every law runs on it")
    screen.print("derived: follows from the declared traits; the tests' covering array runs it")
