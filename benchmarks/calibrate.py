"""The micro-benchmark behind rankfold/core/costs.py: prints the planner's prices as measured beside those in use, for each dtype.

The unit is the time of one FLOP in a large product (x Wᵀ, 256 tokens, 512 x 512), on one thread, measured anew before each price:
on a busy machine the two meet the same neighbours. CPU time; the median over the runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rankfold.core import costs
from rankfold.linalg import Dense, Kronecker, LowRank, Operator, Sparse, Sum

from .results import Results

__all__ = ["measure", "run"]

DTYPES = ("float32", "bfloat16")


def _seconds(f: Callable[[], object], repeats: int) -> float:
    """CPU time of the fastest decile of single calls: what the machine does when nobody disturbs it."""
    f()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return float(np.quantile(times, 0.1))


def measure(dtype: torch.dtype, size: int = 512, tokens: int = 256, repeats: int = 40, runs: int = 7) -> dict[str, float]:
    """The five prices of `costs.Prices` in units of one FLOP of the large product, each the median over the runs."""
    torch.manual_seed(0)
    x, W = torch.randn(tokens, size).to(dtype), torch.randn(size, size).to(dtype)
    found: dict[str, list[float]] = {}
    for _ in range(runs):
        for name, price in _prices(dtype, size, tokens, repeats).items():
            flop = _seconds(lambda: x @ W.mT, repeats) / (2 * tokens * size * size)
            found.setdefault(name, []).append(price() / flop)
    return {name: float(np.median(values)) for name, values in found.items()}


def _prices(dtype: torch.dtype, size: int, tokens: int, repeats: int) -> dict[str, Callable[[], float]]:
    """Seconds of one unit of each. `skinny`, `scatter` and `call` are read off a whole term forward and backward, three passes,
    at full size and at a size that costs nothing; `element` off W + P ⊗ Q built twice and its pullback, four passes."""

    def skinny(ranks: Sequence[int] = (8, 16, 32, 64)) -> float:
        own = [_term(low_rank(size, r), dtype, tokens, repeats) / (3 * 4 * tokens * size * r) for r in ranks]
        return float(np.exp(np.mean(np.log(own))))

    def scatter() -> float:
        k = 32 * size
        op = Sparse(torch.randn(k, requires_grad=True), torch.randperm(size * size)[:k].sort().values, size, size)
        return _term(op, dtype, tokens, max(3, repeats // 4)) / (3 * tokens * k)

    def build(ranks: Sequence[int] = (8, 16, 32)) -> float:
        own = [_seconds(low_rank(size, r).dense, repeats) / (2 * size * size * r) for r in ranks]
        return float(np.exp(np.mean(np.log(own))))

    def element() -> float:
        half = max(1, int(size**0.5))
        P, Q = torch.randn(size // half, size // half, requires_grad=True), torch.randn(half, half, requires_grad=True)
        W = torch.randn(size // half * half, size // half * half).to(dtype)
        g = torch.randn_like(W, dtype=torch.float32)

        def whole() -> None:
            Sum((Dense(W), Kronecker(P.detach(), Q.detach()))).dense().to(dtype)
            torch.autograd.grad(Sum((Dense(W), Kronecker(P, Q))).dense(), [P, Q], g.to(dtype).float())

        return _seconds(whole, repeats) / (4 * W.numel())

    return {
        "skinny": skinny,
        "scatter": scatter,
        "build": build,
        "element": element,
        "call": lambda: _term(low_rank(4, 2), dtype, 4, 4 * repeats) / 3,
    }


def low_rank(size: int, rank: int) -> LowRank:
    return LowRank(torch.randn(size, rank, requires_grad=True), torch.randn(rank, size, requires_grad=True))


def _term(op: Operator, dtype: torch.dtype, tokens: int, repeats: int) -> float:
    """Seconds of a term forward and backward, its input's gradient included."""
    x = torch.randn(tokens, op.shape[1]).to(dtype).requires_grad_()
    wanted, gy = [x, *(t for t in op.leaves() if t.requires_grad)], torch.randn(tokens, op.shape[0]).to(dtype)
    return _seconds(lambda: torch.autograd.grad(op.matmul(x), wanted, gy), repeats)


def run(results: Results, size: str = "short", only: Sequence[str] = ()) -> None:
    """Measure, and print beside the prices in use."""
    for name in DTYPES:
        dtype = getattr(torch, name)
        how: dict[str, Any] = {"size": 32, "tokens": 8, "repeats": 3, "runs": 2} if size == "toy" else {}
        row = results.measure(name, lambda dtype=dtype, how=how: {"prices": measure(dtype, **how)})
        for price, value in row["prices"].items():
            print(
                f"calibrate {name:8} {price:8} measured {value:10.3g}   in use {getattr(costs.PRICES[dtype], price):10.3g}",
                flush=True,
            )
