"""How a comparison is timed: one process, interleaved, the floor beside every number, medians of paired ratios with intervals."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankfold.kernels import watching

__all__ = ["Timing", "conditions", "interleave", "kept_bytes", "peak_bytes", "relative"]

Step = Callable[[], None]
Interval = tuple[float, float, float]


def conditions(threads: int = 1) -> dict[str, Any]:
    """What a reader needs to judge the numbers: machine, load, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {p: importlib.metadata.version(p) for p in ("torch", "peft", "transformers")}
    load = round(os.getloadavg()[0], 2)
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "load": load, "date": time.strftime("%Y-%m-%d"), **versions}


@dataclass
class Timing:
    """CPU and wall seconds per step of each competitor, round by round."""

    cpu: dict[str, list[float]] = field(default_factory=dict)
    wall: dict[str, list[float]] = field(default_factory=dict)

    def ms(self, name: str, clock: str = "cpu") -> float:
        """Median milliseconds per step."""
        return round(1e3 * float(np.median(getattr(self, clock)[name])), 3)

    def ratio(self, name: str, over: str, clock: str = "cpu") -> Interval:
        """(median, low, high) of the paired ratios, 95 % bootstrap interval of the median.

        >>> Timing({"ours": [2.0, 2.2, 2.0], "floor": [1.0, 1.0, 1.0]}).ratio("ours", "floor")
        (2.0, 2.0, 2.2)
        """
        times = getattr(self, clock)
        ratios = np.array(times[name]) / np.array(times[over])
        drawn = np.random.default_rng(0).choice(ratios, (1000, len(ratios)))
        low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
        return round(float(np.median(ratios)), 4), round(float(low), 4), round(float(high), 4)


def interleave(steps: dict[str, Step], rounds: int = 12, warm_up: int = 2) -> Timing:
    """Run the competitors in turn, A B C C B A A B C ...; process CPU time and wall time of each step."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    timing = Timing({n: [] for n in steps}, {n: [] for n in steps})
    names = list(steps)
    gc.collect()
    gc.disable()
    try:
        for k in range(rounds):
            for name in names if k % 2 == 0 else reversed(names):
                wall, cpu = time.perf_counter(), time.process_time()
                steps[name]()
                timing.cpu[name].append(time.process_time() - cpu)
                timing.wall[name].append(time.perf_counter() - wall)
    finally:
        gc.enable()
    return timing


def kept_bytes(run: Callable[[], Any], known: set[int]) -> int:
    """Bytes that autograd keeps during `run`, each storage once, without those in `known` (parameters and inputs)."""
    held: dict[int, torch.UntypedStorage] = {}

    def look(t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage  # held until the end, so that no address is used twice

    with watching(look):
        keep = run()
    del keep
    return sum(storage.nbytes() for storage in held.values())


class _Live(TorchDispatchMode):
    """Counts the bytes of every storage that an operation gives out, for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in inputs and key not in self.seen:
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    self.seen[key] = weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, nbytes: int) -> None:
        self.now -= nbytes
        del self.seen[key]


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of tensors alive at one time that `run` allocated (what a library call holds inside is not seen)."""
    gc.collect()
    with _Live() as live:
        run()
    return live.peak


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a − b| / max |b|, in float64; 0 only where the two are equal."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
