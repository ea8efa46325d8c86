"""A run on disk, so that it can go on elsewhere: adapter, optimizer, policy, history; tensors as safetensors, the rest as JSON.

The folder is replaced as a whole: killed at any moment, the checkpoint before is still there. Random states need no file:
every draw of a run is keyed by its seed and step.

    checkpoint/adapter/             the adapter as `Adaptation.save` writes it
    checkpoint/state.safetensors    optimizer moments, the policy's tensors, the best state so far
    checkpoint/state.json           everything else, with places where the tensors belong
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.adapters.files import Schema, atomic_folder, read_json, read_tensors, recover_folder, write_json, write_tensors
from rankfold.adapters.native import load_native, save_native
from rankfold.errors import FileError

from .adaptation import Adaptation
from .engine import Engine
from .saving import name_in_store, record_of

__all__ = [
    "ADAPTER",
    "RunState",
    "flatten",
    "has_checkpoint",
    "load_checkpoint",
    "put_back",
    "restore",
    "save_checkpoint",
    "take_up",
    "unflatten",
]

ADAPTER = "adapter"
PARTS = ("optimizer", "engine", "best", "history")
VERSION = 1
_STATE = Schema("the state of a run", required={"step": int, "identity": dict, "tree": dict}, version=VERSION)


@dataclass
class RunState:
    """What a run is, beside the adapter's own tensors.

    Args:
        step: steps done.
        identity: what must be the same for the run to go on where it was: seed, batches an epoch, batches a step.
        optimizer: its state_dict.
        engine: the policy's state_dict.
        best: {"step", "value", "tensors"} of the best evaluation so far, or nothing.
        history: as the loop keeps it.
        scaler: of the loss in float16; empty where there is none.
    """

    step: int
    identity: dict[str, Any]
    optimizer: dict[str, Any]
    engine: dict[str, Any]
    best: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree of dicts, lists, tuples, numbers, texts and tensors as JSON; tensors go into `tensors`, a mark stays in their place.

    Raises:
        FileError: a value of another kind.

    >>> tensors = {}
    >>> flatten({0: (torch.ones(2), 0.5)}, tensors)
    {'$items': [[0, {'$tuple': [{'$tensor': 't0'}, 0.5]}]]}
    >>> unflatten({'$items': [[0, {'$tuple': [{'$tensor': 't0'}, 0.5]}]]}, tensors)
    {0: (tensor([1., 1.]), 0.5)}
    """
    match value:
        case Tensor():
            name = f"t{len(tensors)}"
            tensors[name] = value.detach().cpu()
            return {"$tensor": name}
        case float() if not math.isfinite(value):
            return {"$float": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case tuple():
            return {"$tuple": [flatten(item, tensors) for item in value]}
        case list():
            return [flatten(item, tensors) for item in value]
        case Mapping() if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: flatten(v, tensors) for k, v in value.items()}
        case Mapping():
            return {"$items": [[flatten(k, tensors), flatten(v, tensors)] for k, v in value.items()]}
    raise FileError(f"a run's state holds a {type(value).__name__}, which no JSON or safetensors can hold")


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `flatten` was given.

    Raises:
        FileError: a mark that is none, or a tensor that is missing.
    """
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next((k for k in value if k.startswith("$")), None)
    if mark is None:
        return {k: unflatten(v, tensors) for k, v in value.items()}
    inner = value[mark]
    try:
        if mark == "$tensor":
            return tensors[inner]
        if mark == "$float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[inner]
        if mark == "$tuple":
            return tuple(unflatten(item, tensors) for item in inner)
        if mark == "$items":
            return {unflatten(k, tensors): unflatten(v, tensors) for k, v in inner}
    except (KeyError, TypeError, ValueError):
        pass
    raise FileError(f"the state of a run is damaged: {str(value)[:80]}")


def has_checkpoint(folder: str | Path) -> bool:
    """Whether a run can go on from this folder."""
    recover_folder(folder)
    return (Path(folder) / "state.json").is_file()


def save_checkpoint(
    folder: str | Path, adaptation: Adaptation, state: RunState, name: str | None = None, write: bool = True
) -> Path:
    """Write the run; until it is whole the folder's former checkpoint stays.

    Args:
        write: False for a process that only takes part, where the base is cut over several.

    Raises:
        FileError: a full disk or a place that can't be written; the former checkpoint is untouched.
        NumericError: NaN or Inf in a tensor of the adapter.
    """
    record = record_of(adaptation, name)
    if not write:
        return Path(folder)
    tensors: dict[str, Tensor] = {}
    tree = flatten({part: getattr(state, part) for part in (*PARTS, "scaler")}, tensors)
    with atomic_folder(folder) as writing:
        save_native(writing / ADAPTER, record)
        write_tensors(writing / "state.safetensors", tensors, finite=False)  # a moment may be Inf without harm
        write_json(writing / "state.json", {"schema": VERSION, "step": state.step, "identity": state.identity, "tree": tree})
    return Path(folder)


def load_checkpoint(folder: str | Path) -> RunState:
    """The run saved in a folder, without its adapter.

    Raises:
        FileError: no checkpoint, a damaged or a newer one.
    """
    folder = Path(folder)
    if not has_checkpoint(folder):
        raise FileError(f"{folder}: no checkpoint of a run here; start one without --resume")
    document = read_json(folder / "state.json", _STATE)
    tree = unflatten(document["tree"], read_tensors(folder / "state.safetensors", finite=False))
    known = tree if isinstance(tree, dict) else {}
    parts: dict[str, Any] = {part: known.get(part) for part in PARTS} | {"scaler": known.get("scaler", {})}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise FileError(f"{folder}: the state of a run is damaged: parts are missing")
    return RunState(document["step"], document["identity"], **parts)


def restore(folder: str | Path, adaptation: Adaptation, state: RunState, name: str | None = None) -> None:
    """Put the saved tensors and the policy's state into an adaptation, before its optimizer is made.

    Raises:
        FileError: the adaptation has other sites, ranks or tensors than the saved one.
    """
    put_back(Path(folder) / ADAPTER, adaptation, name)
    take_up(adaptation, state.engine, name)


def put_back(folder: str | Path, adaptation: Adaptation, name: str | None = None) -> None:
    """The tensors of a saved adapter in the place of those of the same adapter, as it stands now.

    Raises:
        FileError: another method, or other sites, ranks or tensors.
    """
    attached = adaptation._get(name)
    saved = load_native(folder)
    here = record_of(adaptation, name)
    if saved.method != here.method or saved.tensors.keys() != here.tensors.keys() or saved.extras.keys() != here.extras.keys():
        raise FileError(
            f"{folder}: holds a run of {saved.method!r} at {len(saved.tensors)} sites; this adapter is {here.method!r} at "
            f"{len(here.tensors)}. Start from what was saved: rf.load(model, {str(folder)!r})"
        )
    with torch.no_grad():
        for key, slot in attached.member.slots.items():
            for tensor_name, (stored, slices) in slot.binding.items():
                if slices is None and tensor_name in saved.tensors[key]:
                    _copy(adaptation, stored, saved.tensors[key][tensor_name], folder)
        for short, value in saved.shared.items():
            _copy(adaptation, name_in_store(attached.member.name, short), value, folder)
        for extra in attached.member.extras.values():
            _copy(adaptation, extra.key, saved.extras[extra.name], folder)
    if attached.engine is not None:
        attached.engine.moved = True  # it was us, and no foreign optimizer


def take_up(adaptation: Adaptation, engine: Mapping[str, Any], name: str | None = None) -> None:
    """A policy at work as it was when `Engine.state_dict` was taken, for the optimizer that is made next.

    Raises:
        FileError: saved for other sites or ranks.
    """
    attached = adaptation._get(name)
    if attached.engine is not None:
        attached.engine.uninstall()
    attached.engine = Engine(attached.method.rank, attached.method.losses, adaptation.store, attached.member)
    attached.engine.load_state_dict(engine)
    attached.engine.moved = True


def _copy(adaptation: Adaptation, key: str, value: Tensor, folder: str | Path) -> None:
    tensor = adaptation.store.tensor(key)
    if tensor.shape != value.shape:
        raise FileError(
            f"{folder}: {key} was {tuple(value.shape)} when saved and is {tuple(tensor.shape)} here: its rank changed during the "
            f"run. Start from what was saved: rf.load(model, {str(folder)!r})"
        )
    tensor.copy_(value)
