"""The frozen surfaces: public names, commands and options, keys of adapter files. A change is a line of a diff, and meant.

RANKFOLD_SNAPSHOTS=write python -m pytest tests/test_snapshots.py        writes them anew; then read the diff
"""

import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import safe_open

import rankfold as rf
from rankfold.cli.entry import app
from rankfold.core.registry import entries
from rankfold.methods.catalogue import COMPOSITIONS

FOLDER = Path(__file__).parent / "snapshots"


def public_names() -> Iterator[str]:
    """`rankfold`'s own names with their signatures, and the methods and attributes of the handle."""
    for name in rf.__all__:
        value = getattr(rf, name)
        signature = _parameters(value) if callable(value) and not inspect.isclass(value) else ""
        yield f"rankfold.{name}{signature}"
    for cls in (rf.Adaptation, rf.Method, rf.Site, rf.Targets):
        own = {**vars(cls), **getattr(cls, "__dataclass_fields__", {})}
        for name in sorted(n for n in own if not n.startswith("_")):
            value = inspect.unwrap(own[name]) if inspect.isfunction(own[name]) else own[name]
            yield f"rankfold.{cls.__name__}.{name}{_parameters(value) if inspect.isfunction(value) else ''}"


def _parameters(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    names = [f"{'**' if p.kind is p.VAR_KEYWORD else '*' if p.kind is p.VAR_POSITIONAL else ''}{p.name}" for p in parameters]
    return f"({', '.join(n for n in names if n != 'self')})"


def commands() -> Iterator[str]:
    """Every command with its arguments and options."""
    group = typer.main.get_command(app)
    yield from (f"rankfold {' '.join(sorted(p.opts))}" for p in group.params)
    for name, command in sorted(group.commands.items()):
        for p in command.params:
            yield f"rankfold {name} {'/'.join([*p.opts, *p.secondary_opts])}"


def members() -> Iterator[str]:
    """Every name of the catalogue, with its options; what a page's example registered in this process is not of it."""
    own = Path(rf.__file__).parent
    for entry in (e for e in entries() if e.file.is_relative_to(own)):
        also = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
        yield f"{entry.key}{also} {' '.join(o.name for o in entry.options)}".rstrip()
    yield from (f"composition:{name} = {c.parts}" for name, c in COMPOSITIONS.items())


def adapter_keys(folder: Path) -> Iterator[str]:
    """Names of the fields and tensors in an adapter folder: one with shared tensors, a head, a row slice and labels."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("body", torch.nn.Linear(4, 6))
    model.add_module("head", torch.nn.Linear(6, 2))
    adaptation = rf.adapt(model, "magnitude+vera", rank=2, targets=["body[0:3]"], extras=["head"])
    adaptation.attached["default"].labels = ("no", "yes")
    adaptation.save(folder)
    yield from sorted(p.name for p in folder.iterdir())
    yield from sorted(_keys(json.loads((folder / "adapter.json").read_text())))
    with safe_open(folder / "adapter.safetensors", "pt") as file:
        yield from sorted(file.keys())


def _keys(value: Any, path: str = "") -> set[str]:
    """Paths of the keys in JSON; the names of weights, which stand as keys in "base", are not among them."""
    if isinstance(value, dict):
        if path == ".base":
            return {".base"} | {f".base.*{key}" for item in value.values() for key in _keys(item)}
        return {path} - {""} | {key for name, item in value.items() for key in _keys(item, f"{path}.{name}")}
    if isinstance(value, list):
        return {path} | {key for item in value for key in _keys(item, f"{path}[]") if isinstance(item, dict)}
    return {path}


@pytest.mark.parametrize("surface", ["public_names", "commands", "members", "adapter_keys"])
def test_the_surface_is_as_recorded(surface, tmp_path):
    found = {"public_names": public_names, "commands": commands, "members": members}.get(
        surface, lambda: adapter_keys(tmp_path / "a")
    )
    text = "\n".join(found()) + "\n"
    file = FOLDER / f"{surface}.txt"
    if os.environ.get("RANKFOLD_SNAPSHOTS") == "write":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), (
        f"meant? write {file.name} anew (see the head of this file) and read its diff"
    )


def test_every_public_name_is_documented():
    for name in rf.__all__:
        value = getattr(rf, name)
        if callable(value):
            assert inspect.getdoc(value), f"rankfold.{name} has no docstring"
