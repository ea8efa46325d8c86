"""What a run cost on this machine: peak memory since a mark."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

__all__ = ["mark_memory", "peak_memory"]


def mark_memory(device: torch.device) -> None:
    """Start measuring peak memory from here, where the system can: on CUDA, and on Linux for the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes held at one time since `mark_memory`: allocated by torch on CUDA, resident in the process elsewhere.

    >>> mark_memory(torch.device("cpu"))
    >>> before = peak_memory(torch.device("cpu"))
    >>> block = torch.ones(64, 2**20)
    >>> peak_memory(torch.device("cpu")) >= before
    True
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return _resident_peak()


def _resident_peak() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
