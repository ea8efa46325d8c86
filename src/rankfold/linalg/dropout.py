"""Operators on activations, one diagonal per token: dropout, drawn anew from a saved seed, and a gate that is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import LayoutError

from .operator import Operator, like

__all__ = ["Dropout", "Mask", "TokenGate", "draw", "dropped", "keep_mask"]

FEW = 0.15
"""Up to this share the dropped entries are drawn one after the other, above it a number for every entry."""


@dataclass(frozen=True, eq=False)
class Mask:
    """z / (1 − p) for z of zeros and ones: by the flat positions of the zeros, `gone`, or entry by entry, `kept`."""

    p: float
    gone: Tensor | None
    kept: Tensor | None = None

    def entries(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """z, of int16.

        >>> Mask(0.1, torch.tensor([1])).entries((3,)).tolist()
        [1, 0, 1]
        """
        if self.gone is None:
            assert self.kept is not None
            return self.kept
        z = torch.ones(shape, dtype=torch.int16, device=self.gone.device)
        z.view(-1).index_fill_(0, self.gone, 0)
        return z

    def times(self, x: Tensor) -> Tensor:
        """x ∘ z / (1 − p), in a fresh tensor."""
        gone = self.gone
        if gone is None:
            assert self.kept is not None
            return x * self.kept.to(x.dtype).mul_(1.0 / (1.0 - self.p))
        y = (x * (1.0 / (1.0 - self.p))).contiguous()
        if y.requires_grad:  # a change in place of a view is the slower one to differentiate
            return y.view(-1).index_fill(0, gone, 0.0).view(x.shape)
        y.view(-1).index_fill_(0, gone, 0.0)
        return y

    def add_product(self, y: Tensor, h: Tensor, A: Tensor, scale: float) -> None:
        """y += scale · (h A) ∘ z / (1 − p), in place."""
        gone = self.gone
        if gone is None:
            assert self.kept is not None
            y.addcmul_(h @ A, self.kept.to(y.dtype), value=scale / (1.0 - self.p))
        elif y.is_contiguous():
            flat = y.view(-1)
            before = flat.index_select(0, gone)
            y.addmm_(h, A, alpha=scale / (1.0 - self.p))
            flat.index_copy_(0, gone, before)
        else:
            y.add_(self.times(h @ A), alpha=scale)


def draw(shape: torch.Size | tuple[int, ...], p: float, seed: int, device: torch.device) -> Mask:
    """Entries dropped independently with probability p; the same for the same seed, shape and device.

    A small p asks for few numbers: the gaps between dropped entries are geometric, ⌊log u / log(1 − p)⌋ for u uniform on (0, 1].
    How many there are only a CPU says at once; elsewhere, and above `FEW`, every entry has its number.

    >>> mask = draw((1000, 100), 0.05, 7, torch.device("cpu"))
    >>> round(float((mask.times(torch.ones(1000, 100)) == 0).double().mean()), 2)
    0.05
    """
    if not 0 < p <= FEW or device.type != "cpu":
        return Mask(p, None, keep_mask(shape, p, seed, device))
    generator = torch.Generator(device).manual_seed(seed)
    count = math.prod(shape)
    size = int(count * p + 6.0 * math.sqrt(count * p)) + 16  # six standard deviations: one round is nearly always enough
    rounds, last = [], -1
    while last < count:
        steps = torch.rand(size, generator=generator).neg_().log1p_().mul_(1.0 / math.log1p(-p)).long().add_(1)
        steps[0] += last
        rounds.append(steps.cumsum_(0))
        last = int(steps[-1])
    gone = rounds[0] if len(rounds) == 1 else torch.cat(rounds)
    return Mask(p, gone[: int(torch.searchsorted(gone, count))])


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
    """x with the entries of `draw` dropped, over 1 − p.

    A seed that is a tensor (on the CPU) goes through the library operator `rankfold::dropped`: one node of a compiled graph, of
    which the backward pass keeps the seed and no mask.
    """
    if isinstance(seed, Tensor):
        return _dropped(x, p, seed)
    return draw(x.shape, p, seed, x.device).times(x)


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
