"""y = x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ as one autograd function, for a frozen W and for a product measured from its start.

Kept for backward: x (if A trains) and h = drop(x) Aᵀ (if B trains), in the dtype of the activation; never y, a cast or a mask.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from rankfold.linalg.dropout import dropped, keep_mask

from .once import once

__all__ = ["Drop", "combine", "gradients", "lowrank_linear", "stack_factors"]

Drop = tuple[float, int | Tensor] | None
"""(p, seed) of the dropout in front of A, or None; the seed is a tensor in a compiled graph."""


def stack_factors(B: Tensor, A: Tensor, B0: Tensor | None, A0: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors to multiply by, in `dtype`: (B, A), or ([B − B₀, B₀], [A; A − A₀]) with the differences taken at full
    precision."""
    if B0 is None or A0 is None:
        return B.to(dtype), A.to(dtype)
    return torch.cat([B - B0, B0], 1).to(dtype), torch.cat([A, A - A0], 0).to(dtype)


def mask_of(shape: torch.Size, p_seed: Drop, like: Tensor) -> Tensor | None:
    """z / (1 − p) in the dtype of `like`, or None without dropout."""
    if p_seed is None:
        return None
    p, seed = p_seed
    return keep_mask(shape, p, int(seed), like.device).to(like.dtype).mul_(1.0 / (1.0 - p))


def drop(x: Tensor, p_seed: Drop) -> Tensor:
    return x if p_seed is None else dropped(x, *p_seed)


def combine(y: Tensor, x: Tensor, Bs: Tensor, As: Tensor, scale: float, p_seed: Drop) -> Tensor:
    """y += s·(drop(x) Aᵀ) Bᵀ in place; gives h."""
    h = drop(x, p_seed) @ As.mT
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
    p_seed: Drop,
) -> tuple[Tensor | None, Tensor | None]:
    """(∂B, ∂A) from g = ∂L/∂(low-rank output); adds this branch's share to gx in place. With an offset, Bs and As are stacked."""
    hg = g @ Bs  # [tokens, r] or [tokens, 2r]
    mask = mask_of(torch.Size((g.shape[0], As.shape[1])), p_seed, g)
    if gx is not None:
        if mask is None:
            gx.addmm_(hg, As, alpha=scale)
        else:
            gx.addcmul_(hg @ As, mask, value=scale)
    gA = gB = None
    if x is not None:
        own = hg if hg.shape[1] == rank else hg[:, :rank] + hg[:, rank:]  # g (B − B₀) + g B₀ = g B
        gA = (own.mT @ (x if mask is None else x * mask)).mul_(scale)
    if h is not None:
        gB = (h[:, :rank].mT @ g).mul_(scale).mT  # the wide product in the order that is faster on a CPU
    return gB, gA


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, bias, B, A, B0, A0, base, scale, p_seed, path):
        flat = x.reshape(-1, x.shape[-1])
        y = base.matmul(flat, bias)
        Bs, As = stack_factors(B, A, B0, A0, x.dtype)
        h = path.combine(y, flat, Bs, As, scale, p_seed)
        ctx.base, ctx.scale, ctx.p_seed, ctx.shape, ctx.path = base, scale, p_seed, x.shape, path
        need_A, need_B = ctx.needs_input_grad[3], ctx.needs_input_grad[2]
        ctx.save_for_backward(flat if need_A else None, h if need_B else None, B, A, B0, A0)
        return y.resize_(*x.shape[:-1], y.shape[-1])  # torch lets nobody change a view in place that a function returns

    @staticmethod
    @once
    def backward(ctx: Any, gy):
        x, h, B, A, B0, A0 = ctx.saved_tensors
        g = gy.reshape(-1, gy.shape[-1])
        Bs, As = stack_factors(B, A, B0, A0, g.dtype)
        gx = ctx.base.rmatmul(g) if ctx.needs_input_grad[0] else None
        gB, gA = ctx.path.gradients(g, gx, x, h, Bs, As, ctx.scale, A.shape[0], ctx.p_seed)
        gb = g.sum(0) if ctx.needs_input_grad[1] else None
        return (
            None if gx is None else gx.view(ctx.shape),
            gb,
            None if gB is None else gB.to(B.dtype, memory_format=torch.contiguous_format),
            None if gA is None else gA.to(A.dtype),
            *(None,) * 6,
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
) -> Tensor:
    """x Wᵀ + bias + s·(drop(x) Aᵀ) Bᵀ, minus the same product of (B₀, A₀) where given.

    Args:
        x: [..., in], in the dtype of the product.
        base: gives `matmul(x, bias)` into a fresh tensor and `rmatmul(g)`.
        B, A: [out, r], [r, in], of any float dtype: cast inside, gradients come back in their own dtype.
        path: a module with `combine` and `gradients`, as `path_for` chooses it; this one by default.

    >>> import torch
    >>> from rankfold.linalg import Dense
    >>> class W(Dense):
    ...     def matmul(self, x, bias=None): return super().matmul(x)
    >>> x, B, A = torch.ones(1, 3), torch.ones(2, 1), torch.ones(1, 3)
    >>> lowrank_linear(x, W(torch.zeros(2, 3)), None, B, A, scale=0.5).tolist()
    [[1.5, 1.5]]
    """
    return _LowRankLinear.apply(x, bias, B, A, B0, A0, base, scale, p_seed, path or sys.modules[__name__])
