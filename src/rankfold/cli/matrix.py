"""What composes with what, and why the rest doesn't: structures against decorators, each other, inits, rank policies, updates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rankfold.core.registry import Entry, entries, resolve
from rankfold.core.structure import Decorator
from rankfold.errors import UnknownName
from rankfold.methods.catalogue import COMPOSITIONS

from .member import refused

__all__ = ["COLUMNS", "Pair", "pairs"]

COLUMNS = ("decorator", "inside", "init", "rank", "update")
"""What stands over the columns: decorators around a structure, structures inside it, and the other three axes."""


@dataclass(frozen=True)
class Pair:
    """A structure and what joins it: "tested", "derived" or "refused".

    Args:
        structure: as one types it; a decorator stands around the default structure.
        column: one of COLUMNS. other: a name of that column.
        chain: what one types for both.
        note: the reason of a refusal; of a pair that composes, what must stand beside it.
    """

    structure: str
    column: str
    other: str
    chain: str
    state: Literal["tested", "derived", "refused"]
    note: str = ""


def pairs(name: str | None = None) -> list[Pair]:
    """Every pair, or those of one member: a structure's row, the column of any other.

    Raises:
        UnknownName: a name that no structure, init, rank policy or update has.
    """
    known = [e for axis in ("structure", "init", "rank", "update") for e in entries(axis)]
    wanted = {e.key for e in known if name in (None, e.name, e.key, *e.aliases)}
    if not wanted:
        raise UnknownName.of("member", str(name), [e.name for e in known])
    asked = (side for side in _sides() if side[0].key in wanted or (side[2].key in wanted and side[1] != "inside"))
    return [_pair(*side) for side in asked]


def _sides() -> Iterator[tuple[Entry, str, Entry]]:
    decorators = [e for e in entries("structure") if issubclass(resolve(e), Decorator)]
    plain = [e for e in entries("structure") if e not in decorators]
    for s in entries("structure"):
        yield from ((s, "decorator", d) for d in decorators if d != s)
        yield from ((s, "inside", other) for other in plain if s not in decorators and other != s)
        for axis in ("init", "rank", "update"):
            yield from ((s, axis, other) for other in entries(axis))


def _default(axis: str) -> str:
    return next(e.name for e in entries(axis) if dict(e.traits).get("default") == "True")


def _pair(structure: Entry, column: str, other: Entry) -> Pair:
    label = f"{structure.name}+{_default('structure')}" if issubclass(resolve(structure), Decorator) else structure.name
    member = other.name if other.axis == "structure" else other.key
    chain = f"{member}+{label}" if column == "decorator" else f"{label}+{member}"
    reason = refused(chain)
    named = next((n for n, c in COMPOSITIONS.items() if {*label.split("+"), member} <= set(c.parts.split("+"))), None)
    if reason is not None and named is not None:  # the composition sets options that the pair alone lacks
        return Pair(label, column, other.name, named, "tested", f"with the options of {named}")
    if reason is not None and column == "rank":  # a policy that spreads ranks needs scores, and the default init has none
        for init in entries("init"):
            if refused(f"{chain}+{init.key}") is None:
                return Pair(label, column, other.name, f"{chain}+{init.key}", "derived", f"with {init.key}")
    if reason is not None:
        return Pair(label, column, other.name, chain, "refused", reason)
    default = label == _default("structure") if column == "decorator" else column != "inside" and other.name == _default(column)
    return Pair(label, column, other.name, chain, "tested" if default or named else "derived")
