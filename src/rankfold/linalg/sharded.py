"""Tensors that lie in pieces on several processes (torch's DTensor): read whole, and cut again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["cut_like", "is_cut", "whole"]


def is_cut(tensor: Tensor) -> bool:
    """Whether a tensor lies in pieces on several processes."""
    return hasattr(tensor, "full_tensor")  # asked so, a plain tensor costs no import of torch.distributed.tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, without gradient, on every process. A collective where it is cut: each process must take part.

    >>> import torch
    >>> t = torch.ones(2)
    >>> whole(t).data_ptr() == t.data_ptr()
    True
    """
    cut: Any = tensor.detach()
    return cut.full_tensor() if is_cut(tensor) else cut


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which every process holds whole, cut as `like` is; nothing is sent. Itself where `like` is whole."""
    if not is_cut(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    pieces: Any = like
    return distribute_tensor(value, pieces.device_mesh, pieces.placements, src_data_rank=None)
