"""What the planner believes a plan costs, in multiply-adds of a large product. Calibrated by benchmarks/calibrate.py.

FLOPs alone mislead: products of rank 8 run at a fraction of the speed of square ones, elementwise passes are bound by memory, and
every small operator has a fixed price. The factors below are ratios on a CPU, stable across machines to about a factor of 1.5;
decisions only compare them.
"""

from __future__ import annotations

from rankfold.linalg import Operator

__all__ = ["effective_cost", "prefer_recompute", "structured_cost"]

SKINNY = 3.0
"""A multiply-add in a term's own product, over one in the base's."""
ELEMENT = 40.0
"""One pass over one entry of an [out, in] matrix."""
BUILD = 1.5
"""A multiply-add while building W'."""
CALL = 4.0e5
"""A small operator's fixed price."""
RECOMPUTE_SHARE = 0.15
"""Recompute by default only below this share of the base's own cost."""


def structured_cost(extra: int, keep: bool, grad: bool) -> float:
    """Terms by their own products: forward, and twice that backward, once more where intermediates are recomputed."""
    passes = (3 if keep else 4) if grad else 1
    return passes * (SKINNY * extra + CALL)


def effective_cost(expr: Operator, tokens: int, grad: bool) -> float:
    """W' built forward and backward, its pullback, and one full product for ∂W'."""
    out, in_ = expr.shape
    build = BUILD * expr.dense_flops() + ELEMENT * out * in_
    return (4 * build + 2 * tokens * out * in_ if grad else build) + CALL


def prefer_recompute(extra: int, base: int) -> bool:
    """Whether recomputing the terms costs less than a small share of the base's forward and backward."""
    return 4 * SKINNY * extra < RECOMPUTE_SHARE * 2 * base
