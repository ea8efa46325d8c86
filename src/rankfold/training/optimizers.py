"""AdamW whose weight decay pulls a tensor to where it started, and the groups that updates build from trainable tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .contracts import Trainable

__all__ = ["DeviationAdamW", "decays", "deviation_adamw", "groups"]


class DeviationAdamW(torch.optim.AdamW):
    """torch's AdamW; tensors in `starts` decay towards their start: p ← p − lr·λ·(p − p₀), then Adam's step.

    For all others p₀ = 0, which is AdamW (Loshchilov and Hutter, 2019). A tensor at its start without gradient stays bitwise.

    Args:
        params: groups; one with tensors that have a start carries its λ as `deviation_decay`, with `weight_decay` 0.
        starts: {parameter: its start}; edits that replace a parameter keep this up.

    >>> p = nn.Parameter(torch.tensor([3.0]))
    >>> group = {"params": [p], "weight_decay": 0.0, "deviation_decay": 0.1}
    >>> optimizer = DeviationAdamW([group], starts={p: torch.tensor([2.0])}, lr=1.0)
    >>> p.grad = torch.zeros(1)
    >>> _ = optimizer.step()
    >>> p.data
    tensor([2.9000])
    """

    def __init__(self, params: Any, starts: dict[nn.Parameter, Tensor] | None = None, **options: Any) -> None:
        super().__init__(params, **options)
        self.starts = dict(starts or {})

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                rate = group["lr"] * group.get("deviation_decay", 0.0)
                for p in group["params"] if rate else ():
                    if p.grad is not None and p in self.starts:
                        p.sub_(rate * (p - self.starts[p]))
        _unhooked(torch.optim.AdamW.step)(self)
        return loss


def _unhooked(step: Callable) -> Callable:
    """A parent's `step` without the step hooks: torch wraps it in them once it has made an instance of the parent itself, and the
    hooks of this optimizer, which run around its own `step`, would run a second time."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


def deviation_adamw(tensors: Sequence[Trainable], grouped: list[dict[str, Any]], lr: float, **options: Any) -> DeviationAdamW:
    """`DeviationAdamW` over groups of these tensors, each with the start that it has."""
    return DeviationAdamW(grouped, {t.param: t.start for t in tensors if t.start is not None}, lr=lr, **options)


def decays(t: Trainable) -> bool:
    """Whether weight decay makes sense: for matrices; not for biases, norms, gates and magnitudes, whose zero is not neutral."""
    return t.param.ndim >= 2


def groups(
    tensors: Sequence[Trainable], lr: float, weight_decay: float, rate: Callable[[Trainable], float] = lambda t: 1.0
) -> list[dict]:
    """Parameter groups of equal rate and equal decay, in a fixed order; every tensor is in exactly one."""
    found: dict[tuple[float, str], dict[str, Any]] = {}
    for t in tensors:
        kind = "none" if not (weight_decay and decays(t)) else "deviation" if t.start is not None else "plain"
        group = found.setdefault((rate(t), kind), {"params": [], "lr": lr * rate(t), "weight_decay": 0.0})
        if kind != "none":
            group["weight_decay" if kind == "plain" else "deviation_decay"] = weight_decay
        group["params"].append(t.param)
    return [found[key] for key in sorted(found)]
