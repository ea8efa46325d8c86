"""Which form of the hot products runs on a device: chosen when an adapter is attached, not per call."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

__all__ = ["path_for"]

COMPILED_FOR = frozenset({"cuda"})
"""Devices that Triton compiles for and that the kernels were written for; "cuda" is ROCm's name as well."""


def path_for(device: torch.device) -> ModuleType | None:
    """The module of `combine`, `gradients`, `apply_gain`, `pull_gain` and `row_norms` for a device; None is the reference.

    >>> path_for(torch.device("cpu")) is None
    True
    """
    return _triton() if device.type in COMPILED_FOR else None


@functools.cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("rankfold.kernels.triton.magnitude")
