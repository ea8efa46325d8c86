"""What the planner believes a plan costs, in multiply-adds of a large product. Calibrated by benchmarks/calibrate.py.

FLOPs alone mislead: products of small rank run at a fraction of the speed of square ones, elementwise passes are bound by memory,
picking and scattering entries is slower by two orders of magnitude, and every small operator has a fixed price. The prices below
are ratios on a CPU; decisions only compare them. How well they choose is measured by benchmarks/regret.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rankfold.linalg import Operator, Sparse

__all__ = ["PRICES", "Prices", "effective_cost", "prefer_recompute", "prices_of", "structured_cost", "terms_cost"]


@dataclass(frozen=True)
class Prices:
    """Over one multiply-add of a large product in the same dtype.

    Args:
        skinny: a multiply-add in a term's own product.
        scatter: an entry that a sparse term picks from x, multiplies and adds to y.
        build: a multiply-add while building W' (in float32).
        element: an entry of W' each time that it is built or pulled back: the sums and casts around it.
        call: a term's small operators, once for each pass.
    """

    skinny: float
    scatter: float
    build: float
    element: float
    call: float


PRICES = {
    torch.float32: Prices(skinny=1.9, scatter=150.0, build=1.3, element=48.0, call=1.3e6),
    torch.bfloat16: Prices(skinny=3.8, scatter=950.0, build=5.7, element=250.0, call=7.0e6),
}
RECOMPUTE_SHARE = 0.15
"""Recompute by default only below this share of the base's own cost."""


def prices_of(dtype: torch.dtype) -> Prices:
    """Half precisions share their prices, and so do the others."""
    return PRICES[torch.bfloat16 if dtype in (torch.bfloat16, torch.float16) else torch.float32]


def terms_cost(expr: Operator, base: Operator, tokens: int, prices: Prices) -> float:
    """One pass of everything beside the base's own product."""
    scattered = sum(tokens * op.values.shape[-1] for op in _inside(expr) if isinstance(op, Sparse))
    multiplied = max(0, expr.flops(tokens) - base.flops(tokens) - 2 * scattered)
    return prices.skinny * multiplied + prices.scatter * scattered + prices.call


def _inside(expr: Operator) -> Iterator[Operator]:
    yield expr
    for child in expr.children():
        yield from _inside(child)


def structured_cost(terms: float, keep: bool, grad: bool) -> float:
    """Terms by their own products: forward, and twice that backward, once more where intermediates are recomputed."""
    return ((3 if keep else 4) if grad else 1) * terms


def effective_cost(expr: Operator, tokens: int, grad: bool, prices: Prices) -> float:
    """W' built forward and backward, its pullback, and one full product for ∂W'."""
    out, in_ = expr.shape
    build = prices.build * expr.dense_flops() + prices.element * out * in_
    return (4 * build + 2 * tokens * out * in_ if grad else build) + prices.call


def prefer_recompute(terms: float, base: int) -> bool:
    """Whether recomputing the terms costs less than a small share of the base's forward and backward."""
    return 4 * terms < RECOMPUTE_SHARE * 2 * base
