"""A run of a Trainer on disk, beside the adapter: what the method's optimizer, the schedule and the rank policy know.

checkpoint-40/adapter.json, adapter.safetensors     the adapter: rf.load(model, "checkpoint-40")
checkpoint-40/optimizer.json, optimizer.safetensors this file's
checkpoint-40/trainer_state.json, rng_state.pth     the library's
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.adapters.files import Schema, atomic_folder, read_json, read_tensors, write_json, write_tensors
from rankfold.errors import FileError
from rankfold.training.checkpoints import flatten, unflatten

__all__ = ["load_run_state", "save_run_state"]

JSON, TENSORS = "optimizer.json", "optimizer.safetensors"
PARTS = ("optimizer", "scheduler", "engine")
VERSION = 1
_STATE = Schema("the state of a Trainer's run", required={"tree": dict}, version=VERSION)


def save_run_state(folder: str | Path, optimizer: dict[str, Any], scheduler: dict[str, Any], engine: dict[str, Any]) -> None:
    """Write the two files; what else is in the folder stays.

    Raises:
        FileError: a state that neither JSON nor safetensors can hold; a full disk.
    """
    tensors: dict[str, Tensor] = {}
    tree = flatten({"optimizer": optimizer, "scheduler": scheduler, "engine": engine}, tensors)
    with atomic_folder(folder, owns=(JSON, TENSORS)) as writing:
        write_tensors(writing / TENSORS, tensors, finite=False)  # a moment may be Inf without harm
        write_json(writing / JSON, {"schema": VERSION, "tree": tree})


def load_run_state(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{"optimizer", "scheduler", "engine"} as they were saved.

    Raises:
        FileError: not there, damaged, or of a newer version.

    >>> import tempfile, torch
    >>> save_run_state(folder := tempfile.mkdtemp(), {"state": {0: {"step": torch.tensor(3.0)}}}, {"last_epoch": 3}, {})
    >>> load_run_state(folder)["optimizer"]
    {'state': {0: {'step': tensor(3.)}}}
    """
    folder = Path(folder)
    if not (folder / JSON).is_file():
        raise FileError(
            f"{folder}: no state of a run to go on from (no {JSON}): saved with save_only_model=True, or by another Trainer. "
            f"To start a new run from its adapter: rf.load(model, {str(folder)!r})"
        )
    tree = unflatten(read_json(folder / JSON, _STATE)["tree"], read_tensors(folder / TENSORS, finite=False))
    if sorted(tree) != sorted(PARTS) or not all(isinstance(part, dict) for part in tree.values()):
        raise FileError(f"{folder / JSON}: the state of a run is damaged: it holds {sorted(tree)}")
    return tree
