"""y = g ⊙ (x Wᵀ + s·(drop(x) Aᵀ) Bᵀ) + b with gain g = m / n and the norm n constant, as one autograd function.

Kept for backward: x and h as in the low-rank path, and y, which the next layer mostly keeps anyway. The gradient of m needs
u = (y − b) / g only through Σ gy·u, so no third activation is stored. (DoRA, Liu et al. 2024, section 4.3; factored norm:
"Scaling DoRA", 2026.) The gain stays float32 and acts as u + (g − 1)·u: a bf16 gain near one loses the change that it stands for.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import LayoutError
from rankfold.linalg.flags import answers, flagged, mend

from .lowrank import Drop, combine, drawn, gradients, input_to_keep, kept_drop, kept_input, positions, shrink, stack_factors
from .once import once

__all__ = [
    "amplify",
    "apply_gain",
    "combine",
    "drawn",
    "gradients",
    "magnitude_linear",
    "pull_gain",
    "pull_magnitude",
    "row_norms",
    "shrink",
]

VANISHED = 1e-6
CANCELLED = 1e-4

TOKENS = 4096


def amplify(u: Tensor, gain: Tensor) -> Tensor:
    """gain ⊙ u for a float32 gain [out]: exact product in float32 and float64, u + (gain − 1) u below, rounded once."""
    if u.dtype == gain.dtype:
        return u * gain
    return torch.addcmul(u, u, (gain - 1.0).to(u.dtype))


def apply_gain(u: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """gain ⊙ u + bias."""
    y = amplify(u, gain)
    if bias is not None:
        y += bias.to(y.dtype)
    return y


def pull_gain(g: Tensor, gain: Tensor, y: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(gain ⊙ g, Σ_t g ⊙ (y − bias) where y is given)."""
    total = None
    if y is not None:
        # rounding each product as y itself is rounded averages out in the sum
        total = (g * y).sum(0, dtype=gain.dtype)
        if bias is not None:
            total = total - bias.to(total.dtype) * g.sum(0, dtype=total.dtype)
    return amplify(g, gain), total


@torch.no_grad()
def row_norms(
    base: Any, B: Tensor, A: Tensor, scale: float, B0: Tensor | None = None, A0: Tensor | None = None, floor: float = 1e-12
) -> Tensor:
    """‖W_j + s·(B A)_j‖ [out], from ‖W_j‖² as the base caches it, the r products W Aᵀ, and A Aᵀ: never out x in.

    ‖W_j‖² + s·Σ_k B_jk (2 W Aᵀ + s·B A Aᵀ)_jk, in at least float32. A change that is zero leaves the norm of W itself, bitwise.
    Rows that cancel (W_j ≈ −s·(B A)_j, below 1e-4 of ‖W_j‖²) are formed and summed anew; on an accelerator the first 16 of them,
    the others keep what the formula gave. Never cached: tensors written through `.data` keep their version, and a stale norm
    would be silent.
    """
    Bs, As = stack_factors(B, A, B0, A0, torch.promote_types(B.dtype, torch.float32))
    cross = base.matmul(As.to(base.dtype)).mT.to(Bs.dtype)  # [out, r], by the product that a forward pass runs
    cross = torch.addmm(cross, Bs, As @ As.mT, beta=2.0, alpha=scale)
    own = base.row_sqnorm()
    square = torch.add(own, (Bs * cross).sum(-1), alpha=scale)
    cancelled = square < CANCELLED * own
    rows = flagged(cancelled)
    if len(rows):
        fresh = base.rows(rows).to(Bs.dtype) + scale * (Bs[rows] @ As)
        square = mend(square, cancelled, rows, fresh.square().sum(-1))
    return square.clamp_min_(0.0).sqrt_().clamp_min_(floor)


class _MagnitudeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, bias, m, norm, B, A, B0, A0, base, scale, p_seed, path, memory):
        flat = x.reshape(-1, x.shape[-1])
        u = base.matmul(flat)
        h, drop = None, path.drawn(p_seed, flat)
        if B is not None:
            Bs, As = stack_factors(B, A, B0, A0, x.dtype)
            h = path.combine(u, flat, Bs, As, scale, drop)
        gain = m / norm
        y = path.apply_gain(u, gain, bias)
        y = y.resize_(*x.shape[:-1], y.shape[-1])  # not a view: see `lowrank`
        need_m, need_B, need_A = ctx.needs_input_grad[2], ctx.needs_input_grad[4], ctx.needs_input_grad[5]
        # where a gain vanished y no longer tells u, and the gradient of m needs x
        ctx.vanished = need_m and (not answers(x.device) or bool((gain.abs() < VANISHED).any()))
        keep_x = need_A or ctx.vanished
        keep_h = need_B and not (memory == "recompute" and keep_x)
        kept = input_to_keep(x, memory) if keep_x else (None, None)
        ctx.save_for_backward(
            *kept, h if keep_h else None, positions(drop, memory), y if need_m else None, bias, m, norm, B, A, B0, A0
        )
        ctx.base, ctx.scale, ctx.p_seed, ctx.shape, ctx.path = base, scale, p_seed, x.shape, path
        return y

    @staticmethod
    @once
    def backward(ctx: Any, gy):
        *kept, h, gone, y, bias, m, norm, B, A, B0, A0 = _saved(ctx)
        x, drop = kept_input(*kept), kept_drop(ctx.p_seed, gone)
        g = gy.reshape(-1, gy.shape[-1])
        if h is None and x is not None and ctx.needs_input_grad[4]:
            h = ctx.path.shrink(x, stack_factors(B, A, B0, A0, x.dtype)[1], drop)
        gain = m / norm
        gu, total = ctx.path.pull_gain(g, gain, None if y is None else y.reshape(g.shape), bias)
        gm = None
        if total is not None:
            gm = pull_magnitude(ctx, total, g, x, h, drop, m, norm, B, A, B0, A0) if ctx.vanished else total / m
        gx = ctx.base.rmatmul(gu) if ctx.needs_input_grad[0] else None
        gB = gA = None
        if B is not None:
            Bs, As = stack_factors(B, A, B0, A0, g.dtype)
            gB, gA = ctx.path.gradients(gu, gx, x, h, Bs, As, ctx.scale, A.shape[0], drop)
        gb = g.sum(0) if ctx.needs_input_grad[1] else None
        return (
            None if gx is None else gx.view(ctx.shape),
            gb,
            None if gm is None else gm.to(m.dtype),
            None,
            None if gB is None else gB.to(B.dtype, memory_format=torch.contiguous_format),
            None if gA is None else gA.to(A.dtype),
            *(None,) * 7,
        )


def _saved(ctx: Any) -> tuple[Any, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise LayoutError(
            "the gradient of a magnitude reads the layer's output, which what follows it has changed in place (as "
            "ReLU(inplace=True) does): set inplace=False there, or choose plan='structured'"
        ) from error


def pull_magnitude(
    run: Any, total: Tensor, g: Tensor, x: Any, h: Any, drop: Any, m: Tensor, norm: Tensor, B, A, B0, A0
) -> Tensor:
    """∂m from total = Σ_t g ⊙ (y − bias) and, where a gain vanished, from x; `run` has base, path and scale."""
    gm = total / m
    vanished = (m / norm).abs() < VANISHED
    rows = flagged(vanished)
    if len(rows):
        gm = mend(gm, vanished, rows, _recomputed(run, rows, g, x, h, drop, norm, B, A, B0, A0))
        vanished[rows] = False
        gm = gm.masked_fill(vanished, 0.0)  # those beyond AT_ONCE wait until the others have moved
    return gm


def _recomputed(run: Any, rows: Tensor, g: Tensor, x: Tensor, h: Any, drop: Any, norm: Tensor, B, A, B0, A0) -> Tensor:
    """Σ_t g·u / n for rows whose gain is nearly zero, so that y no longer tells u."""
    W = run.base.rows(rows).to(norm.dtype)
    u = torch.cat([part.to(norm.dtype) @ W.mT for part in x.split(TOKENS)])  # a raised copy of a few tokens at a time
    if B is not None:
        Bs, As = stack_factors(B[rows], A, None if B0 is None else B0[rows], A0, norm.dtype)
        if h is None:
            run.path.combine(u, x.to(norm.dtype), Bs, As, run.scale, drop)
        else:
            u.addmm_(h.to(norm.dtype), Bs.mT, alpha=run.scale)
    return (g[:, rows].to(norm.dtype) * u).sum(0) / norm[rows]


def magnitude_linear(
    x: Tensor,
    base: Any,
    bias: Tensor | None,
    m: Tensor,
    norm: Tensor,
    B: Tensor | None = None,
    A: Tensor | None = None,
    scale: float = 1.0,
    B0: Tensor | None = None,
    A0: Tensor | None = None,
    p_seed: Drop = None,
    path: Any = None,
    memory: str = "auto",
) -> Tensor:
    """(m / norm) ⊙ (x Wᵀ + s·(drop(x) Aᵀ) Bᵀ) + bias; `norm` [out] is a constant of the backward pass.

    Args:
        path: a module of what the reference offers under the same names, as `path_for` chooses it; the reference by default.
            Where a gain vanished (m below 1e-6 of the norm), the gradient of m comes from x; on an accelerator, which can't be
            asked how many there are, for 16 such rows in each step, and is zero for the others.
        memory: auto, keep or recompute: see `lowrank`.

    Raises:
        LayoutError: (from the backward pass) what follows changed the output in place, which the gradient of m reads.

    >>> import torch
    >>> from rankfold.linalg import Dense
    >>> class W(Dense):
    ...     def matmul(self, x, bias=None): return super().matmul(x)
    >>> x = torch.ones(1, 3)
    >>> magnitude_linear(x, W(torch.ones(2, 3)), None, torch.tensor([2.0, 4.0]), torch.tensor([2.0, 2.0])).tolist()
    [[3.0, 6.0]]
    """
    return _MagnitudeLinear.apply(x, bias, m, norm, B, A, B0, A0, base, scale, p_seed, path or sys.modules[__name__], memory)
