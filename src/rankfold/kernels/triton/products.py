"""Products with one side of rank r, in Triton: H = (z ∘ X) Aᵀ, Y += s·z ∘ (H M) and s·Hᵀ (z ∘ X), with sums in float32.

z is a dropout mask over 1 − p, drawn entry by entry from (seed, position) where it is needed: none is ever stored. It is another
mask than the one that the reference draws from the same seed, and the same in all three.
"""

# no `from __future__ import annotations`: Triton reads the annotations of its functions

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lowrank import Drop

__all__ = ["Blocks", "cover", "expand", "mask", "reduce", "shrink"]


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


@triton.jit
def _drop(x, seed, p, rows, columns, width):
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    return tl.where(tl.rand(seed, at) >= p, x.to(tl.float32) * (1.0 / (1.0 - p)), 0.0).to(x.dtype)


@triton.jit
def _dot(a, b, total, EXACT: tl.constexpr, RAISED: tl.constexpr):
    if RAISED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision="ieee" if EXACT else "tf32")


@triton.jit(do_not_specialize=["seed", "p"])
def _shrink(
    X, A, H, seed, p, tokens, width, rank, xt, xn, ar, an, ht, hr,
    DROP: tl.constexpr, EXACT: tl.constexpr, RAISED: tl.constexpr, T: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    t, r = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1) * R + tl.arange(0, R)
    total = tl.zeros((T, R), tl.float32)
    for start in range(0, width, N):
        n = start + tl.arange(0, N)
        x = tl.load(X + t.to(tl.int64)[:, None] * xt + n[None, :] * xn, (t[:, None] < tokens) & (n[None, :] < width), 0.0)
        if DROP:
            x = _drop(x, seed, p, t, n, width)
        a = tl.load(A + r[:, None] * ar + n[None, :] * an, (r[:, None] < rank) & (n[None, :] < width), 0.0)
        total = _dot(x, tl.trans(a), total, EXACT, RAISED)
    tl.store(H + t.to(tl.int64)[:, None] * ht + r[None, :] * hr, total, (t[:, None] < tokens) & (r[None, :] < rank))


@triton.jit(do_not_specialize=["seed", "p"])
def _expand(
    Y, H, M, scale, seed, p, tokens, width, rank, yt, yn, ht, hr, mr, mn,
    DROP: tl.constexpr, EXACT: tl.constexpr, RAISED: tl.constexpr, T: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    t, n = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((T, N), tl.float32)
    for start in range(0, rank, R):
        r = start + tl.arange(0, R)
        h = tl.load(H + t.to(tl.int64)[:, None] * ht + r[None, :] * hr, (t[:, None] < tokens) & (r[None, :] < rank), 0.0)
        m = tl.load(M + r[:, None] * mr + n[None, :] * mn, (r[:, None] < rank) & (n[None, :] < width), 0.0)
        total = _dot(h, m, total, EXACT, RAISED)
    if DROP:
        total = _drop(total, seed, p, t, n, width)
    at, inside = Y + t.to(tl.int64)[:, None] * yt + n[None, :] * yn, (t[:, None] < tokens) & (n[None, :] < width)
    tl.store(at, tl.load(at, inside, 0.0).to(tl.float32) + scale * total, inside)


@triton.jit(do_not_specialize=["seed", "p"])
def _reduce(
    H, X, G, scale, seed, p, tokens, width, rank, share, ht, hr, xt, xn,
    DROP: tl.constexpr, EXACT: tl.constexpr, RAISED: tl.constexpr, T: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    r, n = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * N + tl.arange(0, N)
    part = tl.program_id(2)
    total = tl.zeros((R, N), tl.float32)
    for start in range(part * share, min(tokens, (part + 1) * share), T):
        t = start + tl.arange(0, T)
        inside = t[:, None] < min(tokens, (part + 1) * share)
        h = tl.load(H + t.to(tl.int64)[:, None] * ht + r[None, :] * hr, inside & (r[None, :] < rank), 0.0)
        x = tl.load(X + t.to(tl.int64)[:, None] * xt + n[None, :] * xn, inside & (n[None, :] < width), 0.0)
        if DROP:
            x = _drop(x, seed, p, t, n, width)
        total = _dot(tl.trans(h), x, total, EXACT, RAISED)
    at = G + part.to(tl.int64) * rank * width + r[:, None] * width + n[None, :]
    tl.store(at, scale * total, (r[:, None] < rank) & (n[None, :] < width))


def _how(drop: Drop, dtype: torch.dtype) -> tuple[float, int, dict[str, bool]]:
    """(p, seed, switches): float32 is multiplied as float32, as torch does unless it is told otherwise."""
    p, seed = (0.0, 0) if drop is None else (drop[0], int(drop[1]))
    exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return p, seed, {"DROP": drop is not None, "EXACT": exact, "RAISED": INTERPRETED}


def shrink(x: Tensor, A: Tensor, drop: Drop = None, blocks: Blocks = BLOCKS) -> Tensor:
    """(z ∘ x) Aᵀ, [tokens, in] by [r, in], in the dtype of x."""
    (tokens, width), rank = x.shape, A.shape[0]
    h = x.new_empty(tokens, rank)
    if h.numel() == 0:
        return h
    p, seed, how = _how(drop, x.dtype)
    R = cover(rank, blocks.rank)
    grid = (triton.cdiv(tokens, blocks.tokens), triton.cdiv(rank, R))
    _shrink[grid](
        x, A, h, seed, p, tokens, width, rank, *x.stride(), *A.stride(), *h.stride(), **how, T=blocks.tokens, N=blocks.width, R=R
    )
    return h


def expand(y: Tensor, h: Tensor, M: Tensor, scale: float, drop: Drop = None, blocks: Blocks = BLOCKS) -> Tensor:
    """y += s·z ∘ (h M) in place, [tokens, out] from [tokens, r] by [r, out]."""
    (tokens, width), rank = y.shape, M.shape[0]
    if y.numel() == 0 or rank == 0:
        return y
    p, seed, how = _how(drop, y.dtype)
    grid = (triton.cdiv(tokens, blocks.tokens), triton.cdiv(width, blocks.width))
    _expand[grid](
        y, h, M, scale, seed, p, tokens, width, rank, *y.stride(), *h.stride(), *M.stride(), **how,
        T=blocks.tokens, N=blocks.width, R=cover(rank, blocks.rank),
    )  # fmt: skip
    return y


def reduce(h: Tensor, x: Tensor, scale: float, drop: Drop = None, blocks: Blocks = BLOCKS, splits: int = SPLITS) -> Tensor:
    """s·hᵀ (z ∘ x) in float32, [r, in] from [tokens, r] and [tokens, in]; the parts are added in one order, always."""
    (tokens, width), rank = x.shape, h.shape[1]
    share = triton.cdiv(triton.cdiv(max(1, tokens), blocks.tokens), splits) * blocks.tokens
    parts = triton.cdiv(max(1, tokens), share)
    g = x.new_empty(parts, rank, width, dtype=torch.float32)
    if g.numel():
        p, seed, how = _how(drop, x.dtype)
        R = cover(rank, blocks.rank)
        grid = (triton.cdiv(rank, R), triton.cdiv(width, blocks.width), parts)
        _reduce[grid](
            h, x, g, scale, seed, p, tokens, width, rank, share, *h.stride(), *x.stride(), **how,
            T=blocks.tokens, N=blocks.width, R=R,
        )  # fmt: skip
    return g.sum(0)


def mask(shape: tuple[int, int], drop: tuple[float, int], like: Tensor) -> Tensor:
    """z [tokens, in] itself, for whoever wants to see it: no path does."""
    ones = like.new_zeros(shape, dtype=torch.float32)
    return expand(
        ones, like.new_ones(shape[0], 1, dtype=torch.float32), like.new_ones(1, shape[1], dtype=torch.float32), 1.0, drop
    )
