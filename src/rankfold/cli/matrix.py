"""Structures against inits: which pairs compose, and why the others don't."""

from dataclasses import dataclass
from typing import Literal

from rankfold.core.registry import entries, resolve
from rankfold.core.structure import Decorator
from rankfold.errors import UnknownName
from rankfold.methods.catalogue import COMPOSITIONS

from .member import refusal

__all__ = ["Pair", "pairs"]


@dataclass(frozen=True)
class Pair:
    """A structure and an init: "tested", "derived" or "refused" with its reason."""

    structure: str
    init: str
    state: Literal["tested", "derived", "refused"]
    reason: str = ""


def pairs(name: str | None = None) -> list[Pair]:
    """Every pair, or those of one structure or init. A decorator stands around the default structure.

    Raises:
        UnknownName: neither a structure nor an init.
    """
    structures, inits = entries("structure"), entries("init")
    if name is not None:
        rows, columns = (
            [s for s in structures if name in (s.name, s.key, *s.aliases)],
            [i for i in inits if name in (i.name, i.key, *i.aliases)],
        )
        if not rows and not columns:
            raise UnknownName.of("structure or init", name, [e.name for e in (*structures, *inits)])
        structures, inits = rows or structures, columns if not rows else inits
    default = {
        axis: next(e.name for e in entries(axis) if dict(e.traits).get("default") == "True") for axis in ("structure", "init")
    }
    named = {frozenset(c.parts.split("+")) for c in COMPOSITIONS.values()}
    found = []
    for s in structures:
        label = f"{s.name}+{default['structure']}" if issubclass(resolve(s), Decorator) else s.name
        for i in inits:
            reason = refusal(s, i)
            composed = any({*label.split("+"), i.key} <= parts for parts in named)
            tested = i.name == default["init"] or composed
            found.append(Pair(label, i.name, "refused" if reason else "tested" if tested else "derived", reason or ""))
    return found
