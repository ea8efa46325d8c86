"""How a comparison is timed: one process, interleaved, the floor beside every number, medians of paired ratios with intervals."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Step = Callable[[], None]


def conditions(threads: int) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    versions = {p: importlib.metadata.version(p) for p in ("torch", "peft", "transformers")}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "date": time.strftime("%Y-%m-%d"), **versions}


@dataclass
class Timing:
    """CPU and wall seconds per step of each competitor, round by round."""

    cpu: dict[str, list[float]] = field(default_factory=dict)
    wall: dict[str, list[float]] = field(default_factory=dict)

    def ms(self, name: str) -> float:
        return 1e3 * float(np.median(self.cpu[name]))

    def ratio(self, name: str, over: str, clock: str = "cpu") -> tuple[float, float, float]:
        """(median, low, high) of the paired ratios, 95 % bootstrap interval of the median."""
        times = getattr(self, clock)
        ratios = np.array(times[name]) / np.array(times[over])
        rng = np.random.default_rng(0)
        medians = np.median(rng.choice(ratios, (1000, len(ratios))), axis=1)
        return float(np.median(ratios)), float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def interleave(steps: dict[str, Step], rounds: int = 12, warm_up: int = 2, inner: int = 1) -> Timing:
    """Run the competitors in turn, A B C C B A A B C ..., `inner` steps each; process CPU time and wall time."""
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
                for _ in range(inner):
                    steps[name]()
                timing.cpu[name].append((time.process_time() - cpu) / inner)
                timing.wall[name].append((time.perf_counter() - wall) / inner)
    finally:
        gc.enable()
    return timing


def kept_bytes(run: Callable[[], Any], known: set[int]) -> int:
    """Bytes that autograd keeps during `run`, each storage once, without those in `known` (parameters and inputs)."""
    held: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep = run()
    del keep
    return sum(held.values())
