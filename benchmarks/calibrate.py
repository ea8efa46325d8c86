"""The micro-benchmark behind rankfold/core/costs.py: prints the planner's constants as measured beside those in use.

The unit is the time of one FLOP in a large product (x Wᵀ, 256 tokens, 512 x 512), on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle

import numpy as np
import torch

from rankfold.core import costs
from rankfold.linalg import LowRank

from .protocol import conditions
from .results import Results

__all__ = ["measure", "run"]


def _seconds(f: Callable[[], object], repeats: int) -> float:
    """The fastest decile of single calls: what the machine does when nobody disturbs it."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return float(np.quantile(times, 0.1))


def measure(tokens: int = 256, size: int = 512, ranks: Sequence[int] = (8, 16, 32), repeats: int = 200) -> dict[str, float]:
    """SKINNY, BUILD, ELEMENT and CALL as ratios to a FLOP of the large product; the first two as geometric means over ranks.

    SKINNY and CALL are read off a whole term, x Aᵀ Bᵀ and its backward pass: at full size, and at a size that costs nothing.
    """
    torch.manual_seed(0)
    x, W = torch.randn(tokens, size), torch.randn(size, size)
    flop = _seconds(lambda: x @ W.mT, repeats) / (2 * tokens * size * size)
    skinny = [_term(tokens, size, r, repeats) / (3 * 4 * tokens * size * r) / flop for r in ranks]
    build = []
    for rank in ranks:
        A, B = torch.randn(rank, size), torch.randn(size, rank)
        build.append(_seconds(lambda A=A, B=B: B @ A, repeats) / (2 * size * size * rank) / flop)
    buffers = cycle([torch.randn(size, size) for _ in range(32)])  # together larger than a cache that one core has
    element = _seconds(lambda: next(buffers) * W, repeats) / (size * size) / flop
    return {
        "SKINNY": float(np.exp(np.mean(np.log(skinny)))),
        "BUILD": float(np.exp(np.mean(np.log(build)))),
        "ELEMENT": element,
        "CALL": _term(4, 4, 2, repeats) / 3 / flop,
    }


def _term(tokens: int, size: int, rank: int, repeats: int) -> float:
    """Seconds of a low-rank term forward and backward, its input's gradient included."""
    x = torch.randn(tokens, size, requires_grad=True)
    op = LowRank(torch.randn(size, rank, requires_grad=True), torch.randn(rank, size, requires_grad=True))
    wanted, gy = [x, op.B, op.A], torch.randn(tokens, size)
    return _seconds(lambda: torch.autograd.grad(op.matmul(x), wanted, gy), repeats)


def run(results: Results, size: str = "short", only: Sequence[str] = ()) -> None:
    """Measure, and print beside the constants in use."""
    row = results.measure("ratios", lambda: {"ratios": measure(repeats=20 if size == "toy" else 200)})
    for name, value in row["ratios"].items():
        print(f"calibrate {name:8} measured {value:12.4g}   in use {getattr(costs, name):12.4g}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(conditions())
    run(Results("calibrate"))
