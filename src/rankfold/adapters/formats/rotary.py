"""The two orders of the rows of q and k under rotary embedding: pairs beside each other (Meta, llama.cpp, torchtune), or half a
head apart (transformers). Both compute the same attention; a change of a weight must be moved with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Heads", "halves_of_pairs", "pairs_of_halves"]


@dataclass(frozen=True)
class Heads:
    """Numbers of heads of a model's attention.

    Args:
        model_type: as transformers' config says.
        queries, keys: how many heads q and k have.
    """

    model_type: str
    queries: int
    keys: int


def halves_of_pairs(rows: Tensor, heads: int) -> Tensor:
    """[heads · half · 2, ...] -> [heads · 2 · half, ...]: from pairs beside each other to pairs half a head apart.

    >>> import torch
    >>> halves_of_pairs(torch.arange(4), 1)
    tensor([0, 2, 1, 3])
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def pairs_of_halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse: [heads · 2 · half, ...] -> [heads · half · 2, ...].

    >>> import torch
    >>> pairs_of_halves(halves_of_pairs(torch.arange(12), 2), 2).tolist() == list(range(12))
    True
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
