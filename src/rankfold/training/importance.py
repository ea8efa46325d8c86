"""How much single entries and whole components matter to the loss, as rank policies score them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contracts import SiteView

__all__ = ["best", "importance", "observe_importance"]


def observe_importance(site: SiteView, roles: Sequence[str], beta1: float, beta2: float) -> None:
    """Take in this step's sensitivity I = |p·∂p| of every entry: Ī ← β₁Ī + (1 − β₁)I, Ū ← β₂Ū + (1 − β₂)|I − Ī|.

    Both are kept in the view's state, by role (Zhang et al., 2023, eq. 9-10).
    """
    for role in roles:
        now = (site.tensors[role] * site.grad(role)).abs()
        mean = site.state.setdefault(f"importance.{role}", torch.zeros_like(now))
        spread = site.state.setdefault(f"uncertainty.{role}", torch.zeros_like(now))
        mean.lerp_(now, 1 - beta1)
        spread.lerp_((now - mean).abs(), 1 - beta2)


def importance(site: SiteView, role: str) -> Tensor:
    """Ī·Ū of every entry, in the tensor's shape; zero where nothing was observed."""
    mean = site.state.get(f"importance.{role}")
    return torch.zeros_like(site.tensors[role]) if mean is None else mean * site.state[f"uncertainty.{role}"]


def best(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Which components are among the `budget` best of all sites, one mask per site; ties go by the order of sites and components.

    >>> best([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], budget=3)
    [tensor([True, True]), tensor([False,  True])]
    """
    order = torch.cat(list(scores)).sort(descending=True, stable=True).indices
    on = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    on[order[:budget]] = True
    return list(on.split([len(s) for s in scores]))
