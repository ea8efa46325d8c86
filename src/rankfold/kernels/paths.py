"""Which form of the hot products runs on a device: the one place that decides, asked when an adapter is attached, not per call."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

__all__ = ["has_path", "path_for", "segments_for"]

COMPILED_FOR = frozenset({"cuda"})
"""Devices that Triton compiles for and that the kernels were written for; "cuda" is ROCm's name as well."""

INSTALLED = importlib.util.find_spec("triton") is not None


def has_path(device: torch.device) -> bool:
    """Whether a device has a form of its own; what a compiler may ask while it traces, since nothing is imported.

    >>> has_path(torch.device("cpu"))
    False
    """
    return INSTALLED and device.type in COMPILED_FOR


def path_for(device: torch.device) -> ModuleType | None:
    """The module of `combine`, `gradients`, `apply_gain`, `pull_gain` and `row_norms` for a device; None is the reference.

    >>> path_for(torch.device("cpu")) is None
    True
    """
    return _triton("magnitude") if has_path(device) else None


def segments_for(device: torch.device) -> ModuleType | None:
    """The module of `runs`, `add_runs` and `gathered` for the many adapters of a batch; None is the reference."""
    return _triton("segments") if has_path(device) else None


@functools.cache
def _triton(name: str) -> ModuleType:
    return importlib.import_module(f"rankfold.kernels.triton.{name}")
