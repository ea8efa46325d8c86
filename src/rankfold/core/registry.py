"""The catalogue's index: members of each axis, found by folder and read by parsing; imported only when used.

A new method is one new file below `rankfold/methods/<axis>s/`. Third parties register through the entry point group
`rankfold.methods` (a module name), a file named in the environment variable RANKFOLD_METHODS (paths joined like PATH), or
`load_file`.
Listing needs no torch: names, options and one-line descriptions are literals in the source.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rankfold.errors import CompositionError, FileError, UnknownName

__all__ = ["AXES", "Entry", "Option", "entries", "find", "load_file", "register", "resolve"]

AXES = ("structure", "init", "rank", "update", "loss")
ROOT = Path(__file__).resolve().parent.parent / "methods"
PACKAGE = f"{ROOT.parent.name}.{ROOT.name}"
"""Also the name of the entry point group."""
T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """One option of a member as it stands in the source."""

    name: str
    type: str
    default: str


@dataclass(frozen=True)
class Entry:
    """One member of an axis, as far as its source tells without being imported."""

    axis: str
    name: str
    file: Path
    class_name: str
    doc: str
    aliases: tuple[str, ...] = ()
    paper: str | None = None
    options: tuple[Option, ...] = ()
    traits: tuple[tuple[str, str], ...] = ()

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return self.doc.strip().split("\n\n")[0].replace("\n", " ").strip()

    @property
    def key(self) -> str:
        return f"{self.axis}:{self.name}"


_extra_files: list[Path] = []
_classes: dict[tuple[str, str], type] = {}


def register(axis: str, name: str, *, paper: str | None = None, aliases: tuple[str, ...] = ()) -> Callable[[type[T]], type[T]]:
    """Class decorator: this class is member `name` of `axis`. `paper` is a citation key like "hu2021lora"."""
    if axis not in AXES:
        raise UnknownName.of("axis", axis, AXES)

    def mark(cls: type[T]) -> type[T]:
        if getattr(cls, "__name__", "") and _classes.get((axis, name), cls).__qualname__ != cls.__qualname__:
            raise CompositionError(
                f"{axis}:{name} is registered twice: by {_classes[(axis, name)].__qualname__} and {cls.__qualname__}"
            )
        for key in (name, *aliases):
            _classes[(axis, key)] = cls
        cls.axis, cls.name, cls.paper = axis, name, paper  # type: ignore[attr-defined]
        return cls

    return mark


def load_file(path: str | Path) -> list[Entry]:
    """Add the members that one Python file of the user's defines; they are imported when first used.

    Raises:
        UnknownName: the file does not exist or registers nothing.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise UnknownName.of("plugin file", str(path), [])
    found = _read(file, file.stat().st_mtime_ns)
    if not found:
        raise UnknownName(f"plugin file {path} registers nothing: it needs a class with @register(axis, name)")
    if file not in _extra_files:
        _extra_files.append(file)
    return list(found)


def _plugin_files() -> list[Path]:
    return [*(Path(p) for p in os.environ.get("RANKFOLD_METHODS", "").split(os.pathsep) if p), *_entry_point_files()]


@functools.cache  # reads the metadata of every installed package; what is installed does not change under a running program
def _entry_point_files() -> tuple[Path, ...]:
    from importlib.metadata import entry_points

    specs = (importlib.util.find_spec(point.value.split(":")[0]) for point in entry_points(group=PACKAGE))
    return tuple(Path(spec.origin) for spec in specs if spec and spec.origin)


@functools.cache
def _read(file: Path, _stamp: int) -> tuple[Entry, ...]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError) as error:
        raise FileError(f"{file}: can't be read as Python ({error})") from error
    found = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and getattr(mark.func, "id", getattr(mark.func, "attr", "")) == "register":
                words = {k.arg: ast.literal_eval(k.value) for k in mark.keywords}
                axis, name = (ast.literal_eval(a) for a in mark.args)
                options, traits = _fields(node)
                doc = ast.get_docstring(node) or ""
                found.append(
                    Entry(axis, name, file, node.name, doc, tuple(words.get("aliases", ())), words.get("paper"), options, traits)
                )
    return tuple(found)


def _fields(node: ast.ClassDef) -> tuple[tuple[Option, ...], tuple[tuple[str, str], ...]]:
    options, traits = [], []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            kind, value = ast.unparse(item.annotation), ast.unparse(item.value) if item.value else ""
            if kind.startswith("ClassVar"):
                traits.append((item.target.id, value))
            else:
                options.append(Option(item.target.id, kind, value))
    return tuple(options), tuple(traits)


def entries(axis: str | None = None) -> list[Entry]:
    """Every member known, in the order of axes and names. Imports nothing but this file."""
    files = [
        f for a in AXES for f in sorted((ROOT / (a + "s" if a != "loss" else "losses")).glob("*.py")) if f.stem != "__init__"
    ]
    found: dict[tuple[str, str], Entry] = {}
    for file in [*files, *_plugin_files(), *_extra_files]:
        for entry in _read(file, file.stat().st_mtime_ns):
            other = found.setdefault((entry.axis, entry.name), entry)
            if other.file != entry.file:
                raise CompositionError(f"{entry.key} is defined twice: in {other.file.name} and {entry.file.name}")
    rank = {a: k for k, a in enumerate(AXES)}
    return sorted((e for e in found.values() if axis in (None, e.axis)), key=lambda e: (rank[e.axis], e.name))


def find(name: str, axis: str | None = None) -> list[Entry]:
    """The members that `name` may mean, by name or alias."""
    return [e for e in entries(axis) if name == e.name or name in e.aliases]


def resolve(entry: Entry) -> type[Any]:
    """The class of a member, imported now."""
    key = (entry.axis, entry.name)
    if key not in _classes or Path(sys.modules[_classes[key].__module__].__file__ or "").resolve() != entry.file:
        _classes.pop(key, None)
        if entry.file.is_relative_to(ROOT):
            importlib.import_module(PACKAGE + "." + ".".join(entry.file.relative_to(ROOT).with_suffix("").parts))
        else:
            module_name = f"rankfold_plugin_{entry.file.stem}_{abs(hash(entry.file)):x}"
            spec = importlib.util.spec_from_file_location(module_name, entry.file)
            assert spec
            assert spec.loader
            sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except ImportError as error:
                raise FileError(f"{entry.file}: {entry.key} can't be imported ({error})") from error
    return _classes[key]
