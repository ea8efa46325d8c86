"""Many adapters in one batch, in Triton: y_n += (x_n A_{i(n)}ᵀ) B_{i(n)}, the tokens of one adapter side by side in a program.

Two kernels, to rank r and back (Punica, Chen et al. 2023). Factors are read from the arena where they lie, no copy of them is
made; ranks above an adapter's own are neither read nor multiplied, and rows of the base are left alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .products import INTERPRETED, _dot, cover

__all__ = ["Runs", "add_runs", "gathered", "runs"]

TOKENS, WIDTH, RANKS = 64, 64, 64
"""Largest blocks: tokens of a run, entries of a row, ranks."""


class Runs(NamedTuple):
    """A batch cut into runs of a few tokens of one adapter.

    Args:
        order: [rows that an adapter changes], rows of the batch, those of one adapter side by side.
        table: [runs, 4]: slot, first token in `order`, number of tokens, rank.
        tokens: of a row.
        longest: no run has more tokens.
    """

    order: Tensor
    table: Tensor
    tokens: int
    longest: int


def runs(slots: Sequence[int], ranks: Sequence[int], tokens: int = 1, device: torch.device | str = "cpu") -> Runs:
    """The runs of a batch whose row n, of `tokens` tokens, uses adapter `slots[n]` of rank `ranks[n]`; rank 0 is the base.

    >>> cut = runs([5, 7, 5, 0], [8, 12, 8, 0])
    >>> cut.order.tolist(), cut.table.tolist()
    ([0, 2, 1], [[5, 0, 2, 8], [7, 2, 1, 12]])
    """
    members: dict[tuple[int, int], list[int]] = {}
    for row, (slot, rank) in enumerate(zip(slots, ranks)):
        if rank:
            members.setdefault((slot, rank), []).append(row)
    longest = cover(tokens * max(map(len, members.values()), default=1), TOKENS)
    order: list[int] = []
    table: list[tuple[int, int, int, int]] = []
    for (slot, rank), own in members.items():
        first, count = len(order) * tokens, len(own) * tokens
        table += [(slot, first + k, min(longest, count - k), rank) for k in range(0, count, longest)]
        order += own
    return Runs(
        torch.tensor(order, dtype=torch.int64, device=device),
        torch.tensor(table, dtype=torch.int64, device=device).reshape(-1, 4),
        tokens,
        longest,
    )


@triton.jit
def _down(
    X, A, H, order, table, tokens, parts, width, xt, xn, as_, ar, an, ht, hr,
    RAISED: tl.constexpr, EXACT: tl.constexpr, T: tl.constexpr, N: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    entry = table + tl.program_id(0) * 4
    slot, first, count, rank = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    t, r = tl.arange(0, T), tl.program_id(1) * R + tl.arange(0, R)
    at = first + t
    token = tl.load(order + at // tokens, t < count, 0) * tokens + at % tokens
    total = tl.zeros((T, R), tl.float32)
    if tl.program_id(1) * R < rank:
        own = A + (slot * parts + r // P) * as_ + (r % P) * ar
        for start in range(0, width, N):
            n = start + tl.arange(0, N)
            x = tl.load(X + token[:, None] * xt + n[None, :] * xn, (t[:, None] < count) & (n[None, :] < width), 0.0)
            a = tl.load(own[:, None] + n[None, :] * an, (r[:, None] < rank) & (n[None, :] < width), 0.0)
            total = _dot(x, tl.trans(a), total, EXACT, RAISED)
        tl.store(H + at[:, None] * ht + r[None, :] * hr, total, (t[:, None] < count) & (r[None, :] < rank))


@triton.jit
def _up(
    Y, H, B, order, table, tokens, parts, width, yt, yn, ht, hr, bs, br, bn,
    RAISED: tl.constexpr, EXACT: tl.constexpr, T: tl.constexpr, N: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    entry = table + tl.program_id(0) * 4
    slot, first, count, rank = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    t, n = tl.arange(0, T), tl.program_id(1) * N + tl.arange(0, N)
    at = first + t
    token = tl.load(order + at // tokens, t < count, 0) * tokens + at % tokens
    total = tl.zeros((T, N), tl.float32)
    for start in range(0, rank, R):
        r = start + tl.arange(0, R)
        h = tl.load(H + at[:, None] * ht + r[None, :] * hr, (t[:, None] < count) & (r[None, :] < rank), 0.0)
        own = B + (slot * parts + r // P) * bs + (r % P) * br
        b = tl.load(own[:, None] + n[None, :] * bn, (r[:, None] < rank) & (n[None, :] < width), 0.0)
        total = _dot(h, b, total, EXACT, RAISED)
    place, inside = Y + token[:, None] * yt + n[None, :] * yn, (t[:, None] < count) & (n[None, :] < width)
    tl.store(place, tl.load(place, inside, 0.0).to(tl.float32) + total, inside)


def add_runs(y: Tensor, x: Tensor, A: Tensor, B: Tensor, parts: int, cut: Runs) -> Tensor:
    """y [tokens, out] += (x [tokens, in] A_iᵀ) B_i for the adapter i of each token; in place.

    Args:
        A, B: [slots·parts, k, in] and [slots·parts, k, out], views of an arena as they are, in the dtype of x: rank r of slot i
            stands in row i·parts + r // k.
        cut: of the same batch, by `runs`.
    """
    if len(cut.table) == 0 or y.numel() == 0:
        return y
    rank = A.shape[1] * parts
    h = x.new_empty(len(cut.order) * cut.tokens, rank)
    exact = x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    how = {"RAISED": INTERPRETED, "EXACT": exact, "T": cut.longest, "N": WIDTH, "R": cover(rank, RANKS), "P": A.shape[1]}
    _down[(len(cut.table), triton.cdiv(rank, how["R"]))](
        x, A, h, cut.order, cut.table, cut.tokens, parts, x.shape[1], *x.stride(), *A.stride(), *h.stride(), **how
    )
    _up[(len(cut.table), triton.cdiv(y.shape[1], WIDTH))](
        y, h, B, cut.order, cut.table, cut.tokens, parts, y.shape[1], *y.stride(), *h.stride(), *B.stride(), **how
    )
    return y


def gathered(x: Tensor, A: Tensor, B: Tensor, index: Tensor, parts: int) -> Tensor:
    """(x_n A_iᵀ) B_i for x [rows, tokens, in] and the slot i of each row, given on the device and read there alone.

    Every rank of the bucket is multiplied, save of slot 0, the base.
    """
    rows, tokens = x.shape[:2]
    longest = cover(tokens, TOKENS)
    number = triton.cdiv(max(1, tokens), longest)
    order = torch.arange(rows, device=x.device)
    start = torch.arange(number, device=x.device) * longest  # [runs of a row]
    slot = index[:, None].expand(rows, number)
    first = order[:, None] * tokens + start
    count = (tokens - start).clamp(max=longest).expand(rows, number)
    rank = (slot > 0) * (A.shape[1] * parts)
    table = torch.stack([slot, first, count, rank], -1).view(-1, 4)
    y = x.new_zeros(rows * tokens, B.shape[2])
    return add_runs(y, x.reshape(rows * tokens, -1), A, B, parts, Runs(order, table, tokens, longest)).view(rows, tokens, -1)
