"""Fused forms in a compiled graph, on a device that has kernels of its own: one library operator for each site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankfold.kernels import has_path
from rankfold.kernels.lowrank import stack_factors
from rankfold.kernels.operators import lowrank_product, magnitude_product, row_norms

from .base import Base, DenseBase

__all__ = ["as_operators", "takes_operators"]


def takes_operators(base: Base, x: Tensor) -> bool:
    """Whether a graph should hold the library's operators here: a plain frozen weight, on a device with kernels."""
    return has_path(x.device) and isinstance(base, DenseBase) and not base.trains() and x.dtype != torch.float64


def as_operators(base: Any, fused: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """x W'ᵀ + bias for W' = W + s·B A, its rows scaled where `fused` has a magnitude; as the planner's record has its pieces."""
    B, A = stack_factors(fused.B, fused.A, fused.B0, fused.A0, x.dtype)
    p, seed = (0.0, None) if fused.drop is None else fused.drop
    if isinstance(seed, int):
        seed = torch.tensor(seed)
    if fused.magnitude is None:
        return lowrank_product(x, base.W, bias, B, A, fused.scale, p, seed)[0]
    m = fused.magnitude.m
    m = m if m.dtype in (torch.float32, torch.float64) else m.float()
    with torch.no_grad():
        if fused.drop is None:
            precise = stack_factors(fused.B, fused.A, fused.B0, fused.A0, torch.float32)
            norm = row_norms(base.W, base.row_sqnorm(), *precise, fused.scale, fused.magnitude.floor)
        else:
            norm = fused.magnitude.norm()
    return magnitude_product(x, base.W, bias, m, norm, B, A, fused.scale, p, seed)[0]
