"""Operators on activations, one diagonal per token: dropout, drawn anew from a saved seed, and a gate that is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.errors import LayoutError

from .operator import Operator, like

__all__ = ["Dropout", "TokenGate", "keep_mask"]


def keep_mask(shape: torch.Size | tuple[int, ...], p: float, seed: int | Tensor, device: torch.device) -> Tensor:
    """A mask of zeros and, with probability 1 − p (p rounded to 1/65536), ones; the same for the same seed, shape and device.

    Four entries are cut from each 64-bit draw: on a CPU several times faster than one draw per entry. They stay int16, compared
    in place: a CPU casts those to a float ten times faster than booleans. A seed that is a tensor (on the CPU) goes through the
    library operator `rankfold::keep_mask`, one node of a compiled graph.

    >>> float(keep_mask((1000, 100), 0.25, 7, torch.device("cpu")).float().mean().round(decimals=2))
    0.75
    """
    if isinstance(seed, Tensor):
        return _keep_mask(list(shape), p, seed, device)
    generator = torch.Generator(device).manual_seed(seed)
    count = 1
    for n in shape:
        count *= n
    bits = torch.empty(count // 4 + 1, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return bits.view(torch.int16)[:count].ge_(round(p * 65536) - 32768).view(shape)


@torch.library.custom_op("rankfold::keep_mask", mutates_args=())
def _keep_mask(shape: Sequence[int], p: float, seed: Tensor, device: torch.device) -> Tensor:
    return keep_mask(tuple(shape), p, int(seed), device)


@_keep_mask.register_fake
def _(shape: Sequence[int], p: float, seed: Tensor, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.int16, device=device)


@dataclass(frozen=True, eq=False)
class Dropout(Operator):
    """x ↦ mask ∘ x / (1 − p), the mask a function of (seed, shape of x). Its expectation, and its dense form, is the identity."""

    size: int
    p: float
    seed: int | Tensor
    anchor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size, self.size)

    def matmul(self, x: Tensor) -> Tensor:
        return x * keep_mask(x.shape, self.p, self.seed, x.device).to(x.dtype).mul_(1.0 / (1.0 - self.p))

    def rmatmul(self, g: Tensor) -> Tensor:
        return self.matmul(g)

    def dense(self) -> Tensor:
        return torch.eye(self.size, dtype=self.dtype, device=self.device)

    def row_sqnorm(self) -> Tensor:
        return torch.ones(self.size, device=self.device)

    def flops(self, tokens: int) -> int:
        return 8 * tokens * self.size


@dataclass(frozen=True, eq=False)
class TokenGate(Operator):
    """h ↦ gate ∘ h with a gate of its own for every token: [..., size] against h [..., size]; no dense form exists.

    >>> TokenGate(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).matmul(torch.ones(2, 2)).tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """

    gate: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.gate.shape[-1], self.gate.shape[-1])

    def matmul(self, x: Tensor) -> Tensor:
        return x * like(self.gate, x)

    def rmatmul(self, g: Tensor) -> Tensor:
        return self.matmul(g)

    def dense(self) -> Tensor:
        raise LayoutError("a gate that differs from token to token has no dense form")

    def flops(self, tokens: int) -> int:
        return tokens * self.shape[0]
