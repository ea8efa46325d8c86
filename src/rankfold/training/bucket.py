"""Adapters are small and stand whole on every process: one collective averages all their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .processes import process_count

__all__ = ["Bucket"]


class Bucket:
    """The gradients of some tensors as one flat buffer [Σ numel + number of tensors]; the last part says who has a gradient.

    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> p.grad = torch.full((3,), 2.0)
    >>> Bucket([p]).all_reduce()  # alone there is nothing to average
    >>> p.grad
    tensor([2., 2., 2.])
    """

    def __init__(self, tensors: Sequence[Tensor], group: Any = None) -> None:
        self.tensors, self.group = list(tensors), group

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Every gradient becomes its mean over the processes; a process without one counts as zero, and gets the mean too.

        Where no process has a gradient there is none afterwards. Call it after the last backward pass of a step and before
        clipping; done twice it changes nothing more.
        """
        count = process_count(self.group)
        if count == 1 or not self.tensors:
            return
        dtype = torch.float32
        for t in self.tensors:
            dtype = torch.promote_types(dtype, t.dtype)
        first = self.tensors[0]
        sizes = [t.numel() for t in self.tensors]
        flat = torch.zeros(sum(sizes) + len(sizes), dtype=dtype, device=first.device)
        parts = flat[: sum(sizes)].split(sizes)
        for k, (t, part) in enumerate(zip(self.tensors, parts)):
            if t.grad is not None:
                part.copy_(t.grad.reshape(-1))
                flat[sum(sizes) + k] = 1.0
        torch.distributed.all_reduce(flat, group=self.group)
        held = flat[sum(sizes) :].tolist()
        for t, part, holders in zip(self.tensors, parts, held):
            if holders:
                mean = (part / count).view(t.shape).to(t.dtype)
                if t.grad is None:
                    t.grad = mean
                else:
                    t.grad.copy_(mean)

    @torch.no_grad()
    def broadcast(self) -> None:
        """Every process takes the first one's tensors."""
        if process_count(self.group) > 1:
            for t in self.tensors:
                torch.distributed.broadcast(t, group=self.group, group_src=0)
