"""Several processes at one job: who speaks and writes, on which device, and how they part."""

from __future__ import annotations

import atexit
import os
from typing import Any, TypeVar

import torch

from rankfold.errors import LayoutError

__all__ = ["is_first", "in_all", "leave_at_exit", "process_count", "require_same", "take_device"]

Item = TypeVar("Item")
_leaving: list[bool] = []


def process_count(group: Any = None) -> int:
    """Processes of torch.distributed; 1 where it isn't running."""
    distributed = torch.distributed
    return distributed.get_world_size(group) if distributed.is_available() and distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks: the only one, or the first that a launcher started.

    >>> is_first()
    True
    """
    if process_count() > 1:
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def in_all(items: list[Item]) -> list[Item]:
    """What stands in the lists of all processes, in this one's order: they must decide alike.

    >>> in_all(["a", "b"])
    ['a', 'b']
    """
    lists: list[Any] = [items] * process_count()
    if len(lists) > 1:
        torch.distributed.all_gather_object(lists, items)
    return [item for item in items if all(item in other for other in lists)]


def require_same(what: str, value: str) -> None:
    """Refuse to go on where processes disagree.

    Raises:
        LayoutError: on all of them.
    """
    values: list[Any] = [None] * process_count()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    if len(set(values)) > 1:
        raise LayoutError(f"the processes hold {len(set(values))} different {what}; make them one, by a seed or a checkpoint")


def take_device() -> None:
    """On a machine with several GPUs each process of a launcher takes its own as "cuda"."""
    local = int(os.environ.get("LOCAL_RANK", "-1"))
    if local >= 0 and torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())


def leave_at_exit() -> None:
    """End the process group before the interpreter is taken down, as torch asks of every program. A group that ended earlier is
    left alone."""
    if not _leaving:
        _leaving.append(True)
        atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
