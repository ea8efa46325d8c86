"""y = x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ as one autograd function, for a frozen W and for a product measured from its start.

Kept for backward: x (if A trains) and h = drop(x) Aᵀ (if B trains), in the dtype of the activation; never y, a cast or
a mask: of dropout the positions of the dropped entries where they are few, else the seed.
`memory` says how much of that: "keep" all, "auto" the factors of x where x is a product that keeps them anyway, "recompute" no h
either where x is at hand.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from rankfold.linalg.dropout import Mask, draw, dropped

from .inputs import factors_of
from .once import once

__all__ = [
    "Drop",
    "combine",
    "drawn",
    "gradients",
    "input_to_keep",
    "kept_drop",
    "kept_input",
    "lowrank_linear",
    "positions",
    "shrink",
    "stack_factors",
]

Drop = tuple[float, int | Tensor] | None
"""(p, seed) of the dropout in front of A, or None; the seed is a tensor in a compiled graph."""


def stack_factors(B: Tensor, A: Tensor, B0: Tensor | None, A0: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors to multiply by, in `dtype`: (B, A), or ([B − B₀, B₀], [A; A − A₀]) with the differences taken at full
    precision."""
    if B0 is None or A0 is None:
        return B.to(dtype), A.to(dtype)
    return torch.cat([B - B0, B0], 1).to(dtype), torch.cat([A, A - A0], 0).to(dtype)


def drop(x: Tensor, p_seed: Drop) -> Tensor:
    return x if p_seed is None else dropped(x, *p_seed)


def drawn(drop: Drop | Mask, x: Tensor) -> Drop | Mask:
    """The mask of x for this pass, drawn once; other paths draw where they multiply and return `drop` as it is."""
    return drop if drop is None or isinstance(drop, Mask) else draw(x.shape, drop[0], int(drop[1]), x.device)


def shrink(x: Tensor, As: Tensor, drop: Drop | Mask) -> Tensor:
    """h = drop(x) Aᵀ."""
    mask = drawn(drop, x)
    return (mask.times(x) if isinstance(mask, Mask) else x) @ As.mT


def combine(y: Tensor, x: Tensor, Bs: Tensor, As: Tensor, scale: float, drop: Drop | Mask) -> Tensor:
    """y += s·(drop(x) Aᵀ) Bᵀ in place; gives h."""
    h = shrink(x, As, drop)
    y.addmm_(h, Bs.mT, alpha=scale)
    return h


def gradients(
    g: Tensor,
    gx: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    Bs: Tensor,
    As: Tensor,
    scale: float,
    rank: int,
    drop: Drop | Mask,
) -> tuple[Tensor | None, Tensor | None]:
    """(∂B, ∂A) from g = ∂L/∂(low-rank output); adds this branch's share to gx in place. With an offset, Bs and As are stacked."""
    hg = g @ Bs  # [tokens, r] or [tokens, 2r]
    shown = x if x is not None else gx
    mask = None if shown is None else drawn(drop, shown)
    if gx is not None:
        if isinstance(mask, Mask):
            mask.add_product(gx, hg, As, scale)
        else:
            gx.addmm_(hg, As, alpha=scale)
    gA = gB = None
    if x is not None:
        own = hg if hg.shape[1] == rank else hg[:, :rank] + hg[:, rank:]  # g (B − B₀) + g B₀ = g B
        gA = own.mT @ (mask.times(x) if isinstance(mask, Mask) else x)
    if h is not None:
        gB = (h if h.shape[1] == rank else h[:, :rank]).mT @ g  # the wide product in the order that is faster on a CPU
    if scale != 1.0:
        gA, gB = (t if t is None else t.mul_(scale) for t in (gA, gB))
    return (None if gB is None else gB.mT), gA


def input_to_keep(x: Tensor, memory: str) -> tuple[Tensor, Tensor | None]:
    """(x, None), or the two factors of x."""
    return (memory != "keep" and factors_of(x)) or (x, None)


def kept_input(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """x [tokens, in] from what `input_to_keep` gave."""
    if a is None:
        return None
    x = a if b is None else a * b
    return x.reshape(-1, x.shape[-1])


def positions(drop: Drop | Mask, memory: str) -> Tensor | None:
    """Of a mask that was drawn by positions: a few bytes that spare drawing it again."""
    if memory == "recompute" or not isinstance(drop, Mask) or drop.gone is None:
        return None
    return drop.gone.int() if len(drop.gone) < 2**27 else drop.gone


def kept_drop(drop: Drop, gone: Tensor | None) -> Drop | Mask:
    return drop if drop is None or gone is None else Mask(drop[0], gone.long())


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, bias, B, A, B0, A0, base, scale, p_seed, path, memory):
        flat = x.reshape(-1, x.shape[-1])
        y = base.matmul(flat, bias)
        Bs, As = stack_factors(B, A, B0, A0, x.dtype)
        drop = path.drawn(p_seed, flat)
        h = path.combine(y, flat, Bs, As, scale, drop)
        ctx.base, ctx.scale, ctx.p_seed, ctx.shape, ctx.path = base, scale, p_seed, x.shape, path
        need_A, need_B = ctx.needs_input_grad[3], ctx.needs_input_grad[2]
        keep_h = need_B and not (memory == "recompute" and need_A)
        kept = input_to_keep(x, memory) if need_A else (None, None)
        ctx.save_for_backward(*kept, h if keep_h else None, positions(drop, memory), B, A, B0, A0)
        return y.resize_(*x.shape[:-1], y.shape[-1])  # torch lets nobody change a view in place that a function returns

    @staticmethod
    @once
    def backward(ctx: Any, gy):
        *kept, h, gone, B, A, B0, A0 = ctx.saved_tensors
        x, drop = kept_input(*kept), kept_drop(ctx.p_seed, gone)
        g = gy.reshape(-1, gy.shape[-1])
        Bs, As = stack_factors(B, A, B0, A0, g.dtype)
        if h is None and x is not None and ctx.needs_input_grad[2]:
            h = ctx.path.shrink(x, As, drop)
        gx = ctx.base.rmatmul(g) if ctx.needs_input_grad[0] else None
        gB, gA = ctx.path.gradients(g, gx, x, h, Bs, As, ctx.scale, A.shape[0], drop)
        gb = g.sum(0) if ctx.needs_input_grad[1] else None
        return (
            None if gx is None else gx.view(ctx.shape),
            gb,
            None if gB is None else gB.to(B.dtype, memory_format=torch.contiguous_format),
            None if gA is None else gA.to(A.dtype),
            *(None,) * 7,
        )


def lowrank_linear(
    x: Tensor,
    base: Any,
    bias: Tensor | None,
    B: Tensor,
    A: Tensor,
    scale: float = 1.0,
    B0: Tensor | None = None,
    A0: Tensor | None = None,
    p_seed: Drop = None,
    path: Any = None,
    memory: str = "auto",
) -> Tensor:
    """x Wᵀ + bias + s·(drop(x) Aᵀ) Bᵀ, minus the same product of (B₀, A₀) where given.

    Args:
        x: [..., in], in the dtype of the product.
        base: gives `matmul(x, bias)` into a fresh tensor and `rmatmul(g)`.
        B, A: [out, r], [r, in], of any float dtype: cast inside, gradients come back in their own dtype.
        path: a module with `drawn`, `combine`, `shrink` and `gradients`, as `path_for` chooses it; this one by default.
        memory: auto, keep or recompute; see the head of this file.

    >>> import torch
    >>> from rankfold.linalg import Dense
    >>> class W(Dense):
    ...     def matmul(self, x, bias=None): return super().matmul(x)
    >>> x, B, A = torch.ones(1, 3), torch.ones(2, 1), torch.ones(1, 3)
    >>> lowrank_linear(x, W(torch.zeros(2, 3)), None, B, A, scale=0.5).tolist()
    [[1.5, 1.5]]
    """
    return _LowRankLinear.apply(x, bias, B, A, B0, A0, base, scale, p_seed, path or sys.modules[__name__], memory)
