"""Rows of a map scaled to given lengths: the operator behind DoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operator import Operator, across, at_least_float32
from .structured import Diagonal

__all__ = ["Magnitude"]


@dataclass(frozen=True, eq=False)
class Magnitude(Operator):
    """diag(m / ‖rows of inner‖) · inner, with m: [*batch, out] (Liu et al., "DoRA", 2024, eq. 5).

    The gain is formed and applied in at least float32: a bf16 gain near one loses the change that it stands for. `detach` treats
    the norm as a constant of the backward pass (section 4.3 there). A zero row keeps gain m over the smallest norm allowed.

    >>> import torch
    >>> from rankfold.linalg import Dense
    >>> op = Magnitude(torch.tensor([1.0, 2.0]), Dense(torch.tensor([[3.0, 4.0], [0.0, 5.0]])))
    >>> op.dense().norm(dim=1).tolist()
    [1.0, 2.0]
    """

    m: Tensor
    inner: Operator
    detach: bool = True
    floor: float = 1e-12

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def batch(self) -> tuple[int, ...]:
        return self.inner.batch

    def norm(self) -> Tensor:
        """‖inner_j‖ by rows, from the terms' own row norms: no product is built where the algebra knows better."""
        if self.detach:
            with torch.no_grad():
                return self.inner.row_sqnorm().sqrt().clamp_min(self.floor)
        return self.inner.row_sqnorm().clamp_min(self.floor**2).sqrt()

    def gain(self) -> Tensor:
        return at_least_float32(self.m) / self.norm()

    def matmul(self, x: Tensor) -> Tensor:
        return (self.inner.matmul(x) * across(self.gain())).to(x.dtype)

    def rmatmul(self, g: Tensor) -> Tensor:
        return self.inner.rmatmul((g * across(self.gain())).to(g.dtype))

    def dense(self) -> Tensor:
        return at_least_float32(self.inner.dense()) * self.gain().unsqueeze(-1)

    def columns(self, index: Tensor) -> Tensor:
        y = self.inner.columns(index)
        return (y * across(self.gain())).to(y.dtype)

    def rows(self, index: Tensor) -> Tensor:
        return at_least_float32(self.inner.rows(index)) * self.gain()[..., index, None]

    def row_sqnorm(self) -> Tensor:
        return at_least_float32(self.m).square()

    def rank_bound(self) -> int:
        return self.inner.rank_bound()

    def scaling(self) -> Diagonal:
        return Diagonal(self.gain())

    def flops(self, tokens: int) -> int:
        return self.inner.flops(tokens) + tokens * self.shape[0]

    def dense_flops(self) -> int:
        return self.inner.dense_flops() + 3 * self.shape[0] * self.shape[1]
