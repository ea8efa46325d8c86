"""Many adapters in one batch: y_n += (x_n A_{i(n)}ᵀ) B_{i(n)} for rows n that each choose an adapter i(n).

Four ways to the same numbers; which is cheapest depends on how many adapters are present. (Punica, Chen et al. 2023; S-LoRA,
Sheng et al. 2023.)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MASKED", "gathered", "looped", "masked", "one", "way"]

MASKED = 16
"""Up to so many distinct adapters two large products over all of them cost less than a small product for each row."""


def way(distinct: int) -> str:
    """The cheapest way for that many adapters in the batch: one, masked or gathered.

    >>> way(1), way(8), way(32)
    ('one', 'masked', 'gathered')
    """
    return "one" if distinct == 1 else "masked" if distinct <= MASKED else "gathered"


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


def one(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The same adapter for all rows: A [1, r, in], B [1, r, out]."""
    return (x @ A[0].mT) @ B[0]


def masked(x: Tensor, A: Tensor, B: Tensor, chosen: Tensor) -> Tensor:
    """Two products over the factors of the adapters that are present; `chosen` [rows, adapters] leaves each row its own."""
    h = x @ A.flatten(0, 1).mT
    h = h * chosen.repeat_interleave(A.shape[1], dim=1)[:, None].to(h.dtype)
    return h @ B.flatten(0, 1)


def gathered(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """A small product for each row: A [rows, r, in] and B [rows, r, out] are the rows' own.

    >>> x, A, B = torch.randn(3, 2, 5), torch.randn(4, 2, 5), torch.randn(4, 2, 7)
    >>> index = torch.tensor([3, 0, 3])
    >>> torch.allclose(gathered(x, A[index], B[index]), looped(x, A, B, index), atol=1e-5)
    True
    """
    return torch.bmm(torch.bmm(x, A.mT), B)
