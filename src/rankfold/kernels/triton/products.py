"""Products with one side of rank r, in Triton: H = (z ∘ X) Aᵀ, Y += s·z ∘ (H M) and s·Hᵀ (z ∘ X), with sums in float32.

z is a dropout mask over 1 − p: the reference's own, drawn by whoever calls. It is applied
where the activation is read, no masked activation is ever stored.
"""

# no `from __future__ import annotations`: Triton reads the annotations of its functions

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankfold.linalg.dropout import draw

from ..lowrank import Drop

__all__ = ["Blocks", "Mask", "cover", "expand", "masked", "reduce", "shrink"]

Mask = tuple[Tensor, float] | None
"""What is kept, zeros and ones of int16 as wide as the activation, and 1 / (1 − p); None without dropout."""


class Blocks(NamedTuple):
    """What one program holds at a time: rows of the activation, entries of its width, ranks. Powers of two, at least 16."""

    tokens: int = 64
    width: int = 64
    rank: int = 64


BLOCKS = Blocks()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The interpreter multiplies the bits of a bf16 as an integer: there, factors are raised to float32 first."""

SPLITS = 16
"""Into how many parts the tokens of a `reduce` are cut at most, so that many programs share a small result."""


def cover(n: int, largest: int) -> int:
    """The smallest power of two, from 16, that covers n, but no more than `largest`."""
    return min(largest, max(16, triton.next_power_of_2(n)))


def masked(shape: tuple[int, int] | torch.Size, drop: Drop, device: torch.device) -> Mask:
    """The mask that the reference draws from the same seed."""
    return None if drop is None else (draw(shape, drop[0], int(drop[1]), device).entries(shape), 1.0 / (1.0 - drop[0]))


@triton.jit
def _drop(x, Z, raise_, rows, columns, inside, width):
    kept = tl.load(Z + rows.to(tl.int64)[:, None] * width + columns[None, :], inside, 0)
    return (x.to(tl.float32) * (kept.to(tl.float32) * raise_)).to(x.dtype)


@triton.jit
def _dot(a, b, total, EXACT: tl.constexpr, RAISED: tl.constexpr):
    if RAISED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision="ieee" if EXACT else "tf32")


@triton.jit(do_not_specialize=["raise_"])
def _shrink(
    X, A, H, Z, raise_, tokens, width, rank, xt, xn, ar, an, ht, hr,
    DROP: tl.constexpr, EXACT: tl.constexpr, RAISED: tl.constexpr, T: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    t, r = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1) * R + tl.arange(0, R)
    total = tl.zeros((T, R), tl.float32)
    for start in range(0, width, N):
        n = start + tl.arange(0, N)
        inside = (t[:, None] < tokens) & (n[None, :] < width)
        x = tl.load(X + t.to(tl.int64)[:, None] * xt + n[None, :] * xn, inside, 0.0)
        if DROP:
            x = _drop(x, Z, raise_, t, n, inside, width)
        a = tl.load(A + r[:, None] * ar + n[None, :] * an, (r[:, None] < rank) & (n[None, :] < width), 0.0)
        total = _dot(x, tl.trans(a), total, EXACT, RAISED)
    tl.store(H + t.to(tl.int64)[:, None] * ht + r[None, :] * hr, total, (t[:, None] < tokens) & (r[None, :] < rank))


@triton.jit(do_not_specialize=["raise_"])
def _expand(
    Y, H, M, Z, scale, raise_, tokens, width, rank, yt, yn, ht, hr, mr, mn,
    DROP: tl.constexpr, EXACT: tl.constexpr, RAISED: tl.constexpr, T: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    t, n = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((T, N), tl.float32)
    for start in range(0, rank, R):
        r = start + tl.arange(0, R)
        h = tl.load(H + t.to(tl.int64)[:, None] * ht + r[None, :] * hr, (t[:, None] < tokens) & (r[None, :] < rank), 0.0)
        m = tl.load(M + r[:, None] * mr + n[None, :] * mn, (r[:, None] < rank) & (n[None, :] < width), 0.0)
        total = _dot(h, m, total, EXACT, RAISED)
    at, inside = Y + t.to(tl.int64)[:, None] * yt + n[None, :] * yn, (t[:, None] < tokens) & (n[None, :] < width)
    if DROP:
        total = _drop(total, Z, raise_, t, n, inside, width)
    tl.store(at, tl.load(at, inside, 0.0).to(tl.float32) + scale * total, inside)


@triton.jit(do_not_specialize=["raise_"])
def _reduce(
    H, X, G, Z, scale, raise_, tokens, width, rank, share, ht, hr, xt, xn,
    DROP: tl.constexpr, EXACT: tl.constexpr, RAISED: tl.constexpr, T: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    r, n = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * N + tl.arange(0, N)
    part = tl.program_id(2)
    total = tl.zeros((R, N), tl.float32)
    for start in range(part * share, min(tokens, (part + 1) * share), T):
        t = start + tl.arange(0, T)
        inside = t[:, None] < min(tokens, (part + 1) * share)
        h = tl.load(H + t.to(tl.int64)[:, None] * ht + r[None, :] * hr, inside & (r[None, :] < rank), 0.0)
        within = inside & (n[None, :] < width)
        x = tl.load(X + t.to(tl.int64)[:, None] * xt + n[None, :] * xn, within, 0.0)
        if DROP:
            x = _drop(x, Z, raise_, t, n, within, width)
        total = _dot(tl.trans(h), x, total, EXACT, RAISED)
    at = G + part.to(tl.int64) * rank * width + r[:, None] * width + n[None, :]
    tl.store(at, scale * total, (r[:, None] < rank) & (n[None, :] < width))


def _how(z: Mask, x: Tensor) -> tuple[Tensor, float, dict[str, bool]]:
    """(mask, factor, switches): float32 is multiplied as float32, as torch does unless it is told otherwise."""
    bits, factor = (x, 1.0) if z is None else z
    exact = x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return bits, factor, {"DROP": z is not None, "EXACT": exact, "RAISED": INTERPRETED}


def shrink(x: Tensor, A: Tensor, z: Mask = None, blocks: Blocks = BLOCKS) -> Tensor:
    """(z ∘ x) Aᵀ, [tokens, in] by [r, in], in the dtype of x."""
    (tokens, width), rank = x.shape, A.shape[0]
    h = x.new_empty(tokens, rank)
    if h.numel() == 0:
        return h
    bits, factor, how = _how(z, x)
    R = cover(rank, blocks.rank)
    grid = (triton.cdiv(tokens, blocks.tokens), triton.cdiv(rank, R))
    _shrink[grid](
        x, A, h, bits, factor, tokens, width, rank, *x.stride(), *A.stride(), *h.stride(), **how,
        T=blocks.tokens, N=blocks.width, R=R,
    )  # fmt: skip
    return h


def expand(y: Tensor, h: Tensor, M: Tensor, scale: float, z: Mask = None, blocks: Blocks = BLOCKS) -> Tensor:
    """y += s·z ∘ (h M) in place, [tokens, out] from [tokens, r] by [r, out]."""
    (tokens, width), rank = y.shape, M.shape[0]
    if y.numel() == 0 or rank == 0:
        return y
    bits, factor, how = _how(z, y)
    grid = (triton.cdiv(tokens, blocks.tokens), triton.cdiv(width, blocks.width))
    _expand[grid](
        y, h, M, bits, scale, factor, tokens, width, rank, *y.stride(), *h.stride(), *M.stride(), **how,
        T=blocks.tokens, N=blocks.width, R=cover(rank, blocks.rank),
    )  # fmt: skip
    return y


def reduce(h: Tensor, x: Tensor, scale: float, z: Mask = None, blocks: Blocks = BLOCKS, splits: int = SPLITS) -> Tensor:
    """s·hᵀ (z ∘ x) in float32, [r, in] from [tokens, r] and [tokens, in]; the parts are added in one order, always."""
    (tokens, width), rank = x.shape, h.shape[1]
    share = triton.cdiv(triton.cdiv(max(1, tokens), blocks.tokens), splits) * blocks.tokens
    parts = triton.cdiv(max(1, tokens), share)
    g = x.new_empty(parts, rank, width, dtype=torch.float32)
    if g.numel():
        bits, factor, how = _how(z, x)
        R = cover(rank, blocks.rank)
        grid = (triton.cdiv(rank, R), triton.cdiv(width, blocks.width), parts)
        _reduce[grid](
            h, x, g, bits, scale, factor, tokens, width, rank, share, *h.stride(), *x.stride(), **how,
            T=blocks.tokens, N=blocks.width, R=R,
        )  # fmt: skip
    return g.sum(0)
