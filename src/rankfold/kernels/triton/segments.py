"""Many adapters in one batch, in Triton: y_n += (x_n A_{i(n)}ᵀ) B_{i(n)}, the rows of one adapter side by side in a program.

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

__all__ = ["Runs", "add_runs", "runs"]

ROWS, WIDTH, RANKS = 16, 64, 64


class Runs(NamedTuple):
    """A batch cut into runs of at most 16 rows of one adapter.

    Args:
        order: [rows that an adapter changes], rows of the batch, those of one adapter side by side.
        table: [runs, 4]: slot, first place in `order`, number of rows, rank.
    """

    order: Tensor
    table: Tensor


def runs(slots: Sequence[int], ranks: Sequence[int], tokens: int = 1, device: torch.device | str = "cpu") -> Runs:
    """The runs of a batch whose row n, of `tokens` tokens, uses adapter `slots[n]` of rank `ranks[n]`; rank 0 is the base.

    >>> runs([5, 7, 5, 0], [8, 12, 8, 0]).order.tolist()
    [0, 2, 1]
    >>> runs([5, 7, 5, 0], [8, 12, 8, 0]).table.tolist()
    [[5, 0, 2, 8], [7, 2, 1, 12]]
    """
    members: dict[tuple[int, int], list[int]] = {}
    for row, (slot, rank) in enumerate(zip(slots, ranks)):
        if rank:
            members.setdefault((slot, rank), []).extend(range(row * tokens, (row + 1) * tokens))
    order: list[int] = []
    table: list[tuple[int, int, int, int]] = []
    for (slot, rank), own in members.items():
        table += [(slot, len(order) + k, min(ROWS, len(own) - k), rank) for k in range(0, len(own), ROWS)]
        order += own
    return Runs(
        torch.tensor(order, dtype=torch.int64, device=device),
        torch.tensor(table, dtype=torch.int64, device=device).reshape(-1, 4),
    )


@triton.jit
def _down(
    X, A, H, order, table, width, xt, xn, as_, ar, an, ht, hr,
    RAISED: tl.constexpr, EXACT: tl.constexpr, T: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    entry = table + tl.program_id(0) * 4
    slot, first, count, rank = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    t, r = tl.arange(0, T), tl.program_id(1) * R + tl.arange(0, R)
    row = tl.load(order + first + t, t < count, 0)
    total = tl.zeros((T, R), tl.float32)
    for start in range(0, width, N):
        n = start + tl.arange(0, N)
        x = tl.load(X + row[:, None] * xt + n[None, :] * xn, (t[:, None] < count) & (n[None, :] < width), 0.0)
        a = tl.load(A + slot * as_ + r[:, None] * ar + n[None, :] * an, (r[:, None] < rank) & (n[None, :] < width), 0.0)
        total = _dot(x, tl.trans(a), total, EXACT, RAISED)
    tl.store(H + (first + t)[:, None] * ht + r[None, :] * hr, total, (t[:, None] < count) & (r[None, :] < rank))


@triton.jit
def _up(
    Y, H, B, order, table, width, yt, yn, ht, hr, bs, br, bn,
    RAISED: tl.constexpr, EXACT: tl.constexpr, T: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    entry = table + tl.program_id(0) * 4
    slot, first, count, rank = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    t, n = tl.arange(0, T), tl.program_id(1) * N + tl.arange(0, N)
    row = tl.load(order + first + t, t < count, 0)
    total = tl.zeros((T, N), tl.float32)
    for start in range(0, rank, R):
        r = start + tl.arange(0, R)
        h = tl.load(H + (first + t)[:, None] * ht + r[None, :] * hr, (t[:, None] < count) & (r[None, :] < rank), 0.0)
        b = tl.load(B + slot * bs + r[:, None] * br + n[None, :] * bn, (r[:, None] < rank) & (n[None, :] < width), 0.0)
        total = _dot(h, b, total, EXACT, RAISED)
    at, inside = Y + row[:, None] * yt + n[None, :] * yn, (t[:, None] < count) & (n[None, :] < width)
    tl.store(at, tl.load(at, inside, 0.0).to(tl.float32) + total, inside)


def add_runs(y: Tensor, x: Tensor, A: Tensor, B: Tensor, cut: Runs) -> Tensor:
    """y [tokens, out] += (x [tokens, in] A_iᵀ) B_i for the adapter i of each token; in place.

    Args:
        A, B: [slots, r, in] and [slots, r, out], views of an arena as they are, in the dtype of x.
        cut: of the same batch, by `runs`.
    """
    if len(cut.table) == 0 or y.numel() == 0:
        return y
    rank = A.shape[1]
    h = x.new_empty(len(cut.order), rank)
    how = {"RAISED": INTERPRETED, "EXACT": x.dtype == torch.float32, "T": ROWS, "N": WIDTH, "R": cover(rank, RANKS)}
    _down[(len(cut.table), triton.cdiv(rank, how["R"]))](
        x, A, h, cut.order, cut.table, x.shape[1], *x.stride(), *A.stride(), *h.stride(), **how
    )
    _up[(len(cut.table), triton.cdiv(y.shape[1], WIDTH))](
        y, h, B, cut.order, cut.table, y.shape[1], *y.stride(), *h.stride(), *B.stride(), **how
    )
    return y
