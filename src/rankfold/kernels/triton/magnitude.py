"""Row norms of W + s·B A in chunks of the rank, and the gain with its bias and gradient, in Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lowrank import stack_factors
from .lowrank import combine, drawn, gradients, shrink
from .products import cover

__all__ = ["apply_gain", "combine", "drawn", "gradients", "pull_gain", "row_norms", "shrink"]

CANCELLED = 1e-4
ROWS, RANKS, WIDTH, TOKENS = 32, 64, 64, 64
PARTS = 32


@triton.jit
def _norms(
    W, B, A, cross, gram, own, result, scale, limit, out, width, rank, wo, wn, bo, br, ar, an, co, cr,
    O: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * O + tl.arange(0, O)
    here = o < out
    first = tl.load(own + o, here, 1.0).to(tl.float32)
    square = first
    for k in range(0, rank, R):
        r = k + tl.arange(0, R)
        inner = 2.0 * tl.load(cross + o[:, None] * co + r[None, :] * cr, here[:, None] & (r[None, :] < rank), 0.0).to(tl.float32)
        for m in range(0, rank, R):
            q = m + tl.arange(0, R)
            b = tl.load(B + o[:, None] * bo + q[None, :] * br, here[:, None] & (q[None, :] < rank), 0.0)
            c = tl.load(gram + q[:, None] * rank + r[None, :], (q[:, None] < rank) & (r[None, :] < rank), 0.0)
            inner += scale * tl.dot(b, c, input_precision="ieee")
        b = tl.load(B + o[:, None] * bo + r[None, :] * br, here[:, None] & (r[None, :] < rank), 0.0)
        square += scale * tl.sum(b * inner, 1)
    lost = (square < limit * first) & here
    if tl.max(lost.to(tl.int32), 0) > 0:  # the device decides: nobody waits for it
        fresh = tl.zeros((O,), tl.float32)
        for start in range(0, width, N):
            n = start + tl.arange(0, N)
            row = tl.load(W + o.to(tl.int64)[:, None] * wo + n[None, :] * wn, here[:, None] & (n[None, :] < width), 0.0)
            row = row.to(tl.float32)
            for k in range(0, rank, R):
                r = k + tl.arange(0, R)
                b = tl.load(B + o[:, None] * bo + r[None, :] * br, here[:, None] & (r[None, :] < rank), 0.0)
                a = tl.load(A + r[:, None] * ar + n[None, :] * an, (r[:, None] < rank) & (n[None, :] < width), 0.0)
                row += scale * tl.dot(b, a, input_precision="ieee")
            fresh += tl.sum(row * row, 1)
        square = tl.where(lost, fresh, square)
    tl.store(result + o, square, here)


@torch.no_grad()
def row_norms(
    base: Any, B: Tensor, A: Tensor, scale: float, B0: Tensor | None = None, A0: Tensor | None = None, floor: float = 1e-12
) -> Tensor:
    """‖W_j + s·(B A)_j‖ [out] in float32; of a base that holds a plain weight, which rows that cancel are read from."""
    Bs, As = stack_factors(B, A, B0, A0, torch.float32)
    W, rank = base.W, As.shape[0]
    cross = base.matmul(As.to(base.dtype)).mT  # [out, r]
    out, width = W.shape
    square = torch.empty(out, dtype=torch.float32, device=W.device)
    _norms[(triton.cdiv(out, ROWS),)](
        W, Bs, As, cross, As @ As.mT, base.row_sqnorm(), square, scale, CANCELLED, out, width, rank,
        *W.stride(), *Bs.stride(), *As.stride(), *cross.stride(), O=ROWS, R=cover(rank, RANKS), N=WIDTH,
    )  # fmt: skip
    return square.clamp_min_(0.0).sqrt_().clamp_min_(floor)  # by torch's root, so that a change of zero leaves the norm's bits


@triton.jit
def _apply(U, gain, bias, Y, tokens, out, ut, un, yt, yn, BIAS: tl.constexpr, T: tl.constexpr, N: tl.constexpr):
    t, n = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1) * N + tl.arange(0, N)
    inside = (t[:, None] < tokens) & (n[None, :] < out)
    y = tl.load(U + t.to(tl.int64)[:, None] * ut + n[None, :] * un, inside, 0.0).to(tl.float32)
    y *= tl.load(gain + n, n < out, 0.0)[None, :]
    if BIAS:
        y += tl.load(bias + n, n < out, 0.0).to(tl.float32)[None, :]
    tl.store(Y + t.to(tl.int64)[:, None] * yt + n[None, :] * yn, y, inside)


def apply_gain(u: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """gain ⊙ u + bias for a float32 gain [out], in float32 inside and rounded once."""
    y = torch.empty_like(u)
    if y.numel() == 0:
        return y
    tokens, out = u.shape
    grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(out, WIDTH))
    _apply[grid](
        u, gain, bias, y, tokens, out, *u.stride(), *y.stride(), BIAS=bias is not None, T=TOKENS, N=WIDTH
    )  # fmt: skip
    return y


@triton.jit
def _pull(
    G, Y, gain, P, dot, total, tokens, out, share, gt, gn, yt, yn, pt, pn, SUMS: tl.constexpr, T: tl.constexpr, N: tl.constexpr
):
    n, part = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1)
    here = n[None, :] < out
    factor = tl.load(gain + n, n < out, 0.0)[None, :]
    dots, sums = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
    for start in range(part * share, min(tokens, (part + 1) * share), T):
        t = start + tl.arange(0, T)
        inside = (t[:, None] < min(tokens, (part + 1) * share)) & here
        g = tl.load(G + t.to(tl.int64)[:, None] * gt + n[None, :] * gn, inside, 0.0).to(tl.float32)
        tl.store(P + t.to(tl.int64)[:, None] * pt + n[None, :] * pn, g * factor, inside)
        if SUMS:
            y = tl.load(Y + t.to(tl.int64)[:, None] * yt + n[None, :] * yn, inside, 0.0).to(tl.float32)
            dots += tl.sum(g * y, 0)
            sums += tl.sum(g, 0)
    if SUMS:
        tl.store(dot + part * out + n, dots, n < out)
        tl.store(total + part * out + n, sums, n < out)


def pull_gain(g: Tensor, gain: Tensor, y: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(gain ⊙ g, Σ_t g ⊙ (y − bias) where y is given), reading g once."""
    tokens, out = g.shape
    pulled = torch.empty_like(g)
    share = triton.cdiv(triton.cdiv(max(1, tokens), TOKENS), PARTS) * TOKENS
    parts = triton.cdiv(max(1, tokens), share)
    dot, total = torch.zeros(2, parts, out, dtype=torch.float32, device=g.device)
    if g.numel():
        seen = g if y is None else y
        _pull[(triton.cdiv(out, WIDTH), parts)](
            g, seen, gain, pulled, dot, total, tokens, out, share, *g.stride(), *seen.stride(), *pulled.stride(),
            SUMS=y is not None, T=TOKENS, N=WIDTH,
        )  # fmt: skip
    if y is None:
        return pulled, None
    return pulled, dot.sum(0) if bias is None else dot.sum(0) - bias.float() * total.sum(0)
