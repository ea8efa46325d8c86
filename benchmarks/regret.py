"""How well the planner chooses: at each cell, the time of what plan "auto" runs over that of the best plan there is.

One linear site, forward and backward, base frozen; the plans of a cell take turns, and each has the CPU time of its fast calls.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import rankfold as rf
from rankfold.errors import LayoutError

from .results import Results

__all__ = ["Cell", "cells", "measure", "run"]

STRUCTURES: dict[str, dict[str, Any]] = {
    "kron": {},
    "hra": {},
    "shira": {},
    "bone": {"bone.blocks": "in"},
    "hadamard": {},
    "magnitude+kron": {},
    "magnitude+shira": {},
    "gate+kron": {},
}
"""With more than one plan to choose from; what has a fused form always takes it, a mask on W has the effective plan alone."""
SHAPES = ((256, 256), (512, 512), (512, 2048), (2048, 512), (2048, 2048))
PLANS = (("fused", "auto"), ("structured", "keep"), ("structured", "recompute"), ("effective", "auto"))
LARGEST = 2**31
"""tokens · out · in of a cell that is still measured."""


@dataclass(frozen=True)
class Cell:
    method: str
    out: int
    in_: int
    tokens: int
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.method}-{self.out}x{self.in_}-{self.tokens}-{self.dtype}"


def cells(size: str = "short") -> Iterator[Cell]:
    """Every structure, shape, number of tokens and dtype; "short" two shapes at 16 and 256 tokens, "toy" one cell."""
    if size == "toy":
        yield Cell("kron", 32, 24, 8, "float32")
        return
    shapes, lengths = (SHAPES, (16, 256, 2048)) if size == "all" else (SHAPES[1:3], (16, 256))
    for dtype, method, (out, in_), tokens in itertools.product(("float32", "bfloat16"), STRUCTURES, shapes, lengths):
        if tokens * out * in_ <= LARGEST:
            yield Cell(method, out, in_, tokens, dtype)


def measure(cell: Cell, seconds: float = 0.2) -> dict[str, Any]:
    """Milliseconds of each plan, the one that "auto" chose, and their ratio."""
    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    model = nn.Sequential(nn.Linear(cell.in_, cell.out, bias=False)).to(dtype)
    a = rf.adapt(model, cell.method, targets=["0"], **STRUCTURES[cell.method])
    with torch.no_grad():
        for p in a.parameters():
            p.add_(0.01 * torch.randn_like(p))
    x, g = torch.randn(cell.tokens, cell.in_).to(dtype).requires_grad_(), torch.randn(cell.tokens, cell.out).to(dtype)
    wanted = [x, *a.parameters()]
    chosen = rf.explain(model, cell.tokens)[0]
    steps: dict[str, Callable[[], object]] = {}
    for plan, memory in PLANS:

        def step(plan: str = plan, memory: str = memory) -> None:
            a.store.plan, a.store.memory = plan, memory
            torch.autograd.grad(model(x), wanted, g)

        try:
            step()
        except LayoutError:
            continue
        steps[f"{plan}, {memory}" if plan == "structured" else plan] = step
    ms = {name: round(1e3 * t, 4) for name, t in fastest(steps, seconds).items()}
    name = chosen["plan"] if chosen["plan"] != "structured" else f"structured, {chosen['memory']}"
    return {"chosen": name, "ms": ms, "regret": round(ms[name] / min(ms.values()), 4)}


def fastest(steps: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """CPU seconds of the fastest quarter of each, all of them in turn for that long (three times at least)."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return {name: sorted(t)[len(t) // 4] for name, t in times.items()}


def run(results: Results, size: str = "short", only: Sequence[str] = ()) -> None:
    for cell in cells(size):
        if only and not any(part in cell.key for part in only):
            continue
        row = results.measure(cell.key, lambda cell=cell: {"cell": asdict(cell), **measure(cell, 0.01 if size == "toy" else 0.1)})
        print(f"regret {cell.key:42} {row['chosen']:22} {row['regret']:.3f} x the best", flush=True)
