"""How the names in a foreign file are matched to the modules of a model.

A file from elsewhere names modules in its own way. The model's own list decides what is meant: a name that fits no module is
refused with the nearest, one that fits two is refused with both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rankfold.errors import FileError, UnknownName, nearest

__all__ = ["PARTS", "only_part", "parts_hint", "resolve"]

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The models of a pipeline, as diffusers calls them; a file may hold changes of several."""


def only_part(
    path: Path, names: Iterable[str], part: str | None, begins: Callable[[str], str], means: Mapping[str, str | None]
) -> list[str]:
    """The names of a file that belong to one model of a pipeline; all of them for None.

    Args:
        begins: how a name begins, as the file has it.
        means: which part such a beginning stands for.

    Raises:
        UnknownName: no such part.
        FileError: nothing for that part.
    """
    names = list(names)
    if part is not None and part not in PARTS:
        raise UnknownName.of("part", part, PARTS, f"there are: {', '.join(PARTS)}")
    kept = [n for n in names if part is None or means.get(begins(n)) == part]
    if part is not None and not kept:
        there = sorted({b for n in names if (b := begins(n))})[:8]
        raise FileError(f"{path}: holds nothing for the {part}; its keys begin with: {', '.join(there) or 'nothing known'}")
    return kept


def parts_hint(parts: Iterable[str], part: str | None) -> str:
    """What to type where a file with changes of several models meets one of them."""
    parts = sorted(set(parts))
    if part or len(parts) < 2:
        return ""
    return f"the file holds changes of {', '.join(parts)}; read one of them: part={parts[0]!r}"


def resolve(
    path: Path,
    wanted: Mapping[str, list[str]],
    known: Iterable[str],
    spelled: Callable[[str], Iterable[str]],
    hint: str = "",
) -> dict[str, str]:
    """{key of the file: name in the model}.

    Args:
        wanted: for each key, the spellings that it may stand for.
        known: names in the model.
        spelled: the ways in which the file's tool may spell a name of the model.
        hint: added where a key fits nothing.

    Raises:
        FileError: a key that fits nothing (lists the nearest), or several names (lists them), or two keys that fit one name.

    >>> resolve(Path("f"), {"a_b": ["a_b"]}, ["a.b", "a_b"], lambda n: [n.replace(".", "_")])
    Traceback (most recent call last):
    rankfold.errors.FileError: f: 'a_b' may be a.b or a_b of this model; ...
    """
    by_spelling: dict[str, list[str]] = {}
    for name in known:
        for spelling in spelled(name):
            by_spelling.setdefault(spelling, []).append(name)
    found: dict[str, str] = {}
    users: dict[str, str] = {}
    for key, spellings in wanted.items():
        names = list(dict.fromkeys(n for s in spellings for n in by_spelling.get(s, ())))
        if not names:
            close = [by_spelling[s][0] for s in nearest(spellings[0], by_spelling)]
            raise FileError(
                f"{path}: {key!r} fits no module of this model; nearest: {', '.join(close) or 'none'}"
                + (f"\n  {hint}" if hint else "")
            )
        if len(names) > 1:
            raise FileError(f"{path}: {key!r} may be {' or '.join(names)} of this model; rankfold does not guess")
        if names[0] in users:
            raise FileError(
                f"{path}: {users[names[0]]!r} and {key!r} both change {names[0]}"
                + (f"\n  {hint}" if hint else "; the file must name it once")
            )
        users[names[0]] = key
        found[key] = names[0]
    return found
