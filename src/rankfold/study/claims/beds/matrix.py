"""One matrix: W₀ [size, size] with singular values 1, 1/2, 1/3, ..., to be changed into a given target."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.linalg.random import Random

__all__ = ["base_weight", "best_error", "fit"]


def base_weight(seed: int, size: int) -> Tensor:
    """W₀ = U diag(1/k) Vᵀ with U and V drawn uniformly."""
    random = Random(seed, "claims", "matrix")
    U, V = random.child("U").haar(size, size), random.child("V").haar(size, size)
    return U * (1.0 / torch.arange(1, size + 1)) @ V.mT


def best_error(change: Tensor, rank: int) -> float:
    """‖Δ − Δ_r‖ / ‖Δ‖ of the best approximation of that rank (Eckart and Young 1936): no LoRA of the rank can be nearer."""
    S = torch.linalg.svdvals(change.double())
    return float(S[rank:].norm() / S.norm())


def fit(W0: Tensor, target: Tensor, method: str, seed: int, lr: float, steps: int, **options: Any) -> float:
    """‖W' − target‖ / ‖target − W₀‖ after AdamW steps with a cosine schedule on ‖W' − target‖²."""
    layer = nn.Linear(W0.shape[1], W0.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(W0)
    adaptation = rf.adapt(layer, method, targets="all", seed=seed, **options)
    optimizer = adaptation.optimizer(lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    every = torch.eye(W0.shape[1])  # the columns of W', one a row
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(every) - target.mT).square().sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        left = float((layer(every) - target.mT).norm())
    return left / float((target - W0).norm()) if math.isfinite(left) else math.inf
