"""Operators on activations, one diagonal per token: dropout, drawn anew from a saved seed, and a gate that is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import LayoutError

from .operator import Operator, like

__all__ = ["Dropout", "TokenGate", "dropped", "keep_mask"]


def keep_mask(shape: torch.Size | tuple[int, ...], p: float, seed: int, device: torch.device) -> Tensor:
    """A mask of zeros and, with probability 1 − p (p rounded to 1/65536), ones; the same for the same seed, shape and device.

    Four entries are cut from each 64-bit draw: on a CPU several times faster than one draw per entry. They stay int16, compared
    in place: a CPU casts those to a float ten times faster than booleans.

    >>> float(keep_mask((1000, 100), 0.25, 7, torch.device("cpu")).float().mean().round(decimals=2))
    0.75
    """
    generator = torch.Generator(device).manual_seed(seed)
    count = 1
    for n in shape:
        count *= n
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return bits.view(torch.int16)[:count].ge_(round(p * 65536) - 32768).view(shape)


def dropped(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """x with the entries of `keep_mask` dropped, over 1 − p.

    A seed that is a tensor (on the CPU) goes through the library operator `rankfold::dropped`: one node of a compiled graph, of
    which the backward pass keeps the seed and no mask.
    """
    if isinstance(seed, Tensor):
        return _dropped(x, p, seed)
    return x * keep_mask(x.shape, p, seed, x.device).to(x.dtype).mul_(1.0 / (1.0 - p))


@torch.library.custom_op("rankfold::dropped", mutates_args=())
def _dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return dropped(x, p, int(seed)).contiguous()


@_dropped.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_seed(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _drop_gradient(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return _dropped(g, ctx.p, seed), None, None


_dropped.register_autograd(_drop_gradient, setup_context=_keep_seed)


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
        return dropped(x, self.p, self.seed)

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
