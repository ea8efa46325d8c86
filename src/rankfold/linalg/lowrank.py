"""Maps of low rank: B · core · A, and the deviation of such a product from where it started."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operator import Number, Operator, across, at_least_float32, like

__all__ = ["Deviation", "LowRank"]


@dataclass(frozen=True, eq=False)
class LowRank(Operator):
    """Δ = scale · B · diag(d) · M · A, with B: [out, r], A: [r, in]; `diag` [r] and `core` M [r, r] are optional.

    The kind of core is explicit, never guessed from a shape: beside a batch dimension a vector and a matrix look alike.

    >>> import torch
    >>> op = LowRank(torch.ones(4, 2), torch.ones(2, 3), diag=torch.tensor([1.0, 0.0]), scale=0.5)
    >>> op.matmul(torch.ones(3)).tolist(), op.rank_bound()
    ([1.5, 1.5, 1.5, 1.5], 2)
    """

    B: Tensor
    A: Tensor
    diag: Tensor | None = None
    core: Tensor | None = None
    scale: Number = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return (self.B.shape[-2], self.A.shape[-1])

    @property
    def batch(self) -> tuple[int, ...]:
        return max(tuple(self.B.shape[:-2]), tuple(self.A.shape[:-2]), key=len)

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def matmul(self, x: Tensor) -> Tensor:
        h = x @ like(self.A, x).mT
        if self.core is not None:
            h = h @ like(self.core, x).mT
        if self.diag is not None:
            h = h * across(like(self.diag, x))
        return self._times(h @ like(self.B, x).mT)

    def rmatmul(self, g: Tensor) -> Tensor:
        h = g @ like(self.B, g)
        if self.diag is not None:
            h = h * across(like(self.diag, g))
        if self.core is not None:
            h = h @ like(self.core, g)
        return self._times(h @ like(self.A, g))

    def _times(self, y: Tensor) -> Tensor:
        """y times the scale, which may be a tensor that trains: 0-dim, or [E] beside a batch."""
        s = self.scale
        if isinstance(s, Tensor):
            s = like(s[..., None, None] if s.ndim else s, y)
        return y * s

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B', A) with everything between them and the scale taken into B': B' A = Δ."""
        B = self._times(self.B)
        if self.diag is not None:
            B = B * self.diag.unsqueeze(-2)
        if self.core is not None:
            B = B @ self.core
        return B, self.A

    def dense(self) -> Tensor:
        B, A = self.factors()
        return at_least_float32(B) @ at_least_float32(A)

    def columns(self, index: Tensor) -> Tensor:
        B, A = self.factors()
        return A.mT[..., index, :] @ B.mT

    def rows(self, index: Tensor) -> Tensor:
        B, A = self.factors()
        return at_least_float32(B[..., index, :]) @ at_least_float32(A)

    def row_sqnorm(self) -> Tensor:
        """By the Gram matrix: Σ_k (B' A Aᵀ)_jk B'_jk, never out x in."""
        B, A = (at_least_float32(t) for t in self.factors())
        return ((B @ (A @ A.mT)) * B).sum(-1).clamp_min(0.0)  # rounding can fall below zero

    def row_dot(self, other: Operator) -> Tensor:
        """Σ_k B'_jk (other Aᵀ)_jk: asks `other` for r products only, in its own dtype, in which a forward pass reads A as
        well."""
        B, A = self.factors()
        return (at_least_float32(B) * other.matmul(like(A, next(other.leaves()))).mT).sum(-1)

    def to_lowrank(self, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
        from .decompositions import product_svd

        B, A = (at_least_float32(t) for t in self.factors())
        if rank is None or rank >= self.rank:
            return B, A, 0.0
        U, S, Vh = product_svd(B, A)
        total = float(torch.linalg.vector_norm(S))
        lost = float(torch.linalg.vector_norm(S[..., rank:]))
        return U[..., :rank] * S[..., None, :rank], Vh[..., :rank, :], lost / total if total else 0.0

    def rank_bound(self) -> int:
        return min(self.rank, *self.shape)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.rank * (sum(self.shape) + (self.rank if self.core is not None else 0))

    def dense_flops(self) -> int:
        return 2 * self.rank * self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Deviation(Operator):
    """Δ = scale · (B D M A − B₀ D M₀ A₀), with D = diag(d) and cores M, M₀: [r, r]; `diag` and the cores are optional.

    Written as scale · [(B − B₀) D M A + B₀ D ((M − M₀) A + M₀ (A − A₀))], so that it is zero, bitwise and in every dtype, while
    all three are where they started, and loses nothing to cancellation afterwards. A factor that does not train is the same
    tensor twice, and costs nothing. Switching component k off (d_k = 0) returns it to its start, not to zero: offsets stay legal
    under rank policies.

    >>> import torch
    >>> B, A = torch.randn(4, 2), torch.randn(2, 3)
    >>> float(Deviation(B, A, B.clone(), A.clone()).dense().abs().max())
    0.0
    """

    B: Tensor
    A: Tensor
    B0: Tensor
    A0: Tensor
    diag: Tensor | None = None
    scale: Number = 1.0
    core: Tensor | None = None
    core0: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.B.shape[-2], self.A.shape[-1])

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.B.shape[:-2])

    def stacked(self) -> LowRank:
        """The same map as a LowRank: [B − B₀, B₀] · [M A; (M − M₀) A + M₀ (A − A₀)], of rank r where A stays, else of rank 2r."""
        M, M0 = self.core, self.core0
        if self.A is self.A0 and (M is None or M0 is None):
            return LowRank(self.B - self.B0, self.A, self.diag, scale=self.scale)
        if self.A is self.A0 and M is not None and M0 is not None:
            if self.B is self.B0:
                return LowRank(self.B, self.A, self.diag, M - M0, self.scale)
            moved, fixed = (t if self.diag is None else t * self.diag.unsqueeze(-2) for t in (self.B - self.B0, self.B0))
            return LowRank(moved @ M + fixed @ (M - M0), self.A, scale=self.scale)
        left, right = self.A, self.A - self.A0
        if M is not None and M0 is not None:
            left, right = M @ left, M0 @ right if M is M0 else (M - M0) @ left + M0 @ right
        diag = None if self.diag is None else torch.cat([self.diag, self.diag], -1)
        B = torch.cat([self.B - self.B0, self.B0], -1)
        return LowRank(B, torch.cat([left, right], -2), diag=diag, scale=self.scale)

    @property
    def rank(self) -> int:
        """Inner width of `stacked()`."""
        return self.A.shape[-2] * (1 if self.A is self.A0 else 2)

    def matmul(self, x: Tensor) -> Tensor:
        return self.stacked().matmul(x)

    def rmatmul(self, g: Tensor) -> Tensor:
        return self.stacked().rmatmul(g)

    def dense(self) -> Tensor:
        return self.stacked().dense()

    def columns(self, index: Tensor) -> Tensor:
        return self.stacked().columns(index)

    def rows(self, index: Tensor) -> Tensor:
        return self.stacked().rows(index)

    def row_sqnorm(self) -> Tensor:
        return self.stacked().row_sqnorm()

    def row_dot(self, other: Operator) -> Tensor:
        return self.stacked().row_dot(other)

    def to_lowrank(self, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
        return self.stacked().to_lowrank(rank)

    def rank_bound(self) -> int:
        return min(self.rank, *self.shape)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.rank * sum(self.shape)

    def dense_flops(self) -> int:
        return 2 * self.rank * self.shape[0] * self.shape[1]
