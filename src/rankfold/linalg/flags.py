"""A few rows that need care, found without asking the device: a host that asks stands still until all work before is done."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["answers", "flagged", "mend"]

ASKED = frozenset({"cpu"})
"""Devices that may be asked for a value in the middle of a pass."""
AT_ONCE = 16
"""How many flagged rows are seen to at once on a device that can't be asked how many there are, and in a compiled graph."""


def answers(device: torch.device) -> bool:
    """Whether a device may be asked for a value here."""
    return device.type in ASKED and not torch.compiler.is_compiling()


def flagged(flags: Tensor) -> Tensor:
    """Indices of the rows that are flagged. On a device that can't be asked how many they are: AT_ONCE indices, flagged rows
    first, and whoever writes to them looks at the flags again.

    >>> flagged(torch.tensor([False, True, False, True])).tolist()
    [1, 3]
    """
    if answers(flags.device):
        return flags.nonzero().flatten()
    return flags.to(torch.uint8).topk(min(AT_ONCE, flags.shape[0])).indices


def mend(values: Tensor, flags: Tensor, rows: Tensor, better: Tensor) -> Tensor:
    """`values` with `better` in those of the `rows` that are flagged; rows are the last dimension.

    >>> flags = torch.tensor([False, True, False])
    >>> mend(torch.zeros(3), flags, torch.tensor([0, 1]), torch.tensor([5.0, 7.0])).tolist()
    [0.0, 7.0, 0.0]
    """
    new = torch.where(flags[..., rows], better.to(values.dtype), values[..., rows])
    return values.index_copy(-1, rows, new)
