"""Many adapters in one batch: y_n += (x_n A_{i(n)}ᵀ) B_{i(n)} for rows n that each choose an adapter i(n).

Rows of one adapter form a segment. Segments are cut into blocks of equal size, a few rows beside a few ranks, so that all of them
are two batched products, whatever the ranks, and what an adapter's smaller rank leaves empty is neither read nor multiplied.
(Punica, Chen et al. 2023; S-LoRA, Sheng et al. 2023.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WIDTH", "Block", "Segments", "add_gathered", "add_one", "add_segments", "gathered", "looped", "split"]

WIDTH = 8
"""Ranks in a block. 4 reads a little less where ranks are mixed, 16 makes fewer products; 8 was fastest at ranks 4, 8, 16."""

Block = tuple[int, int]
"""An adapter's number, and which WIDTH of its ranks."""


@dataclass(frozen=True, eq=False)
class Segments:
    """How a batch falls into n blocks of c rows and WIDTH ranks.

    Args:
        blocks: [n], the adapter and the ranks of each block.
        rows: [n·c], rows of the batch, block after block; the last block of a segment repeats its first row.
        full: [n, c, 1], 0 where a row is such a repetition; None where there is none.
        straight: whether block k is row k and nothing else, so that no row need be moved.
    """

    blocks: list[Block]
    rows: Tensor
    full: Tensor | None
    straight: bool


def split(
    adapters: Sequence[int], ranks: Sequence[int], device: torch.device | str = "cpu", standing: Sequence[Block] = ()
) -> Segments:
    """The blocks of a batch whose row n uses `adapters[n]` of rank `ranks[n]`; rank 0 (the base) gets none.

    A block that `standing` holds keeps its position, if that is below their number: whoever holds copies of the factors by
    position replaces those of the other blocks alone.

    >>> cut = split([5, 7, 5, 0], [8, 12, 8, 0])                    # rows 0 and 2 together; row 1 in two blocks of 8 ranks
    >>> cut.blocks, cut.rows.tolist()
    ([(5, 0), (7, 0), (7, 1)], [0, 2, 1, 1, 1, 1])
    >>> cut.full.squeeze(-1).tolist()
    [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    >>> split([9, 7, 9, 0], [8, 12, 8, 0], standing=cut.blocks).blocks
    [(9, 0), (7, 0), (7, 1)]
    """
    members: dict[int, list[int]] = {}
    rank_of = {}
    for row, (adapter, rank) in enumerate(zip(adapters, ranks)):
        if rank:
            members.setdefault(adapter, []).append(row)
            rank_of[adapter] = rank
    height = -(-sum(map(len, members.values())) // max(1, len(members)))  # the mean: at most twice as many blocks as adapters
    found: list[tuple[Block, list[int], int]] = []
    for adapter, own in members.items():
        for start in range(0, len(own), height):
            here = own[start : start + height]
            missing = height - len(here)
            for part in range(-(-rank_of[adapter] // WIDTH)):
                found.append(((adapter, part), here + here[:1] * missing, missing))
    found = _in_place(found, standing)
    rows = [row for _, own, _ in found for row in own]
    full = [float(k < height - missing) for _, _, missing in found for k in range(height)]
    mask = torch.tensor(full, device=device).reshape(-1, height, 1) if 0.0 in full else None
    return Segments(
        [block for block, _, _ in found],
        torch.tensor(rows, dtype=torch.long, device=device),
        mask,
        rows == list(range(len(adapters))),
    )


def _in_place(
    found: list[tuple[Block, list[int], int]], standing: Sequence[Block]
) -> list[tuple[Block, list[int], int]]:
    """The blocks in another order: those that stand keep their position, the others fill up."""
    places: dict[Block, list[int]] = {}
    for position in range(min(len(found), len(standing)) - 1, -1, -1):
        places.setdefault(standing[position], []).append(position)
    at: dict[int, tuple[Block, list[int], int]] = {}
    moved = []
    for entry in found:
        if positions := places.get(entry[0]):
            at[positions.pop()] = entry
        else:
            moved.append(entry)
    others = iter(moved)
    return [at[k] if k in at else next(others) for k in range(len(found))]


def looped(x: Tensor, A: Tensor, B: Tensor, index: Tensor) -> Tensor:
    """The definition, row by row; the others' oracle.

    Args:
        x: [rows, tokens, in].
        A, B: [slots, r, in] and [slots, r, out].
        index: [rows], the slot of each row.

    Returns:
        [rows, tokens, out].
    """
    return torch.stack([x[n] @ A[i].mT @ B[i] for n, i in enumerate(index.tolist())])


def add_one(y: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """y [.., out] += h [n, r] B [r, out], the same adapter for all n rows and tokens of y; in place."""
    if y.is_contiguous() and h.dtype == B.dtype == y.dtype:
        y.view(-1, y.shape[-1]).addmm_(h, B)
        return y
    return y.add_(h.mm(B).view(y.shape).to(y.dtype))


def add_gathered(y: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """y [rows, tokens, out] += h [rows, tokens, r] B [rows, r, out], each row with its own; in place."""
    if h.dtype == B.dtype == y.dtype:
        return y.baddbmm_(h, B)
    return y.add_(torch.bmm(h, B).to(y.dtype))


def gathered(x: Tensor, A: Tensor, B: Tensor, index: Tensor, parts: int) -> Tensor:
    """(x_n A_iᵀ) B_i [rows, tokens, out] for x [rows, tokens, in] and the slot i of each row.

    Args:
        A, B: [slots·parts, k, in] and [slots·parts, k, out]: rank r of slot i stands in row i·parts + r // k.
    """
    own = index[:, None] * parts + torch.arange(parts, device=index.device)  # [rows, parts]
    return torch.bmm(torch.bmm(x, A[own].flatten(1, 2).mT), B[own].flatten(1, 2))


def add_segments(y: Tensor, h: Tensor, B: Tensor, cut: Segments) -> Tensor:
    """y [rows, tokens, out] += the blocks' h [n, c·tokens, WIDTH] B [n, WIDTH, out], each block into its rows; in place.

    >>> x, A, B = torch.randn(3, 2, 5), torch.randn(4, 8, 5), torch.randn(4, 8, 7)
    >>> cut = split([3, 0, 3], [8, 8, 8])
    >>> own = [adapter for adapter, _ in cut.blocks]
    >>> h = torch.bmm(x[cut.rows].view(-1, 4, 5), A[own].mT)       # 2 blocks, each 2 rows of 2 tokens
    >>> y = add_segments(torch.zeros(3, 2, 7), h, B[own], cut)
    >>> torch.allclose(y, looped(x, A, B, torch.tensor([3, 0, 3])), atol=1e-5)
    True
    """
    if cut.straight:
        return add_gathered(y, h, B)
    if cut.full is not None:
        tokens = y.shape[1]
        h = h * cut.full.to(h.dtype).repeat_interleave(tokens, dim=1)
    return y.index_add_(0, cut.rows, torch.bmm(h, B).view(-1, *y.shape[1:]).to(y.dtype))
