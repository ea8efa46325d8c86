"""Rows of a weight that train alone (new tokens): put into the output of an embedding or a linear head, so that neither a copy of
the whole weight nor its gradient is made; elsewhere into a copy of the weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.linalg import like

__all__ = ["into_output", "into_weight", "run_beside"]


def into_weight(weight: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A copy of `weight` [n, ...] with `values` [k, ...] in these rows."""
    return weight.index_copy(0, rows, like(values, weight))


def run_beside(module: nn.Module, native: Any, param: str) -> bool:
    """Whether changed rows of the weight are rows or columns of this module's output."""
    if param != "weight":
        return False
    if isinstance(module, nn.Embedding):
        return native is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq
    return isinstance(module, nn.Linear) and native is nn.Linear.forward


def into_output(module: nn.Module, y: Tensor, x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """What the module gives with `values` in `rows` of its weight, from what it gives without.

    Args:
        y: the module's output, fresh: a head's is written into.
        x: its input, token indices or hidden states.
        rows: [k], rising.
    """
    if isinstance(module, nn.Embedding):
        place = torch.searchsorted(rows, x).clamp_(max=len(rows) - 1)
        pad = None if module.padding_idx is None else (rows == module.padding_idx).nonzero()
        padding = int(pad[0]) if pad is not None and len(pad) else None  # this row never trains
        own = F.embedding(place, values, padding).to(y.dtype)
        return torch.where((rows[place] == x).unsqueeze(-1), own, y)
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    own = F.linear(x, like(values, weight), None if bias is None else bias[rows])
    return y.index_copy_(-1, rows, own.to(y.dtype))
