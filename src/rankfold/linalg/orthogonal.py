"""Orthogonal maps of R^n: products of Householder reflections, and Cayley rotations by blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operator import Operator, at_least_float32, like
from .structured import BlockDiagonal

__all__ = ["Cayley", "Householder"]


@dataclass(frozen=True, eq=False)
class Householder(Operator):
    """H_1 H_2 ... H_r with H_k = 1 − 2 u_k u_kᵀ / ‖u_k‖², from the columns of U: [*batch, n, r].

    Applied in the compact WY form 1 − U T Uᵀ, T⁻¹ = striu(UᵀU) + 1/2 on unit columns (Joffrain et al., 2006): two skinny
    products and one triangular solve of size r, the solve in at least float32.

    >>> import torch
    >>> u = torch.randn(5, 1)
    >>> pair = Householder(torch.cat([u, u], 1))          # a reflection twice is the identity
    >>> torch.allclose(pair.dense(), torch.eye(5), atol=1e-5)
    True
    """

    U: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.U.shape[-2], self.U.shape[-2])

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.U.shape[:-2])

    @property
    def orthogonal(self) -> bool:
        return True

    def compact(self) -> tuple[Tensor, Tensor]:
        """(Û, T): unit columns [n, r] and the upper triangle [r, r] with H_1 ... H_r = 1 − Û T Ûᵀ."""
        U = at_least_float32(self.U)
        U = U / torch.linalg.vector_norm(U, dim=-2, keepdim=True).clamp_min(torch.finfo(U.dtype).tiny)
        eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
        inverse = torch.triu(U.mT @ U, 1) + 0.5 * eye
        return U, torch.linalg.solve_triangular(inverse, eye.expand_as(inverse), upper=True)

    def matmul(self, x: Tensor) -> Tensor:
        U, T = self.compact()
        return x - (x @ like(U @ T.mT, x)) @ like(U, x).mT  # x Hᵀ with Hᵀ = 1 − U Tᵀ Uᵀ

    def rmatmul(self, g: Tensor) -> Tensor:
        U, T = self.compact()
        return g - (g @ like(U @ T, g)) @ like(U, g).mT

    def dense(self) -> Tensor:
        U, T = self.compact()
        return torch.eye(self.shape[0], dtype=U.dtype, device=U.device) - (U @ T) @ U.mT

    def flops(self, tokens: int) -> int:
        n, r = self.U.shape[-2:]
        return 4 * tokens * n * r + 4 * n * r * r

    def dense_flops(self) -> int:
        n, r = self.U.shape[-2:]
        return 2 * n * n * r + 4 * n * r * r


@dataclass(frozen=True, eq=False)
class Cayley(Operator):
    """diag of (1 + S_k)(1 − S_k)⁻¹, S_k = X_k − X_kᵀ skew, from X: [*batch, n, b, b]; the identity at X = 0.

    Solved in at least float32.
    """

    X: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        n, b, _ = self.X.shape[-3:]
        return (n * b, n * b)

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.X.shape[:-3])

    @property
    def orthogonal(self) -> bool:
        return True

    def blocks(self) -> BlockDiagonal:
        X = at_least_float32(self.X)
        S = X - X.mT
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        return BlockDiagonal(torch.linalg.solve(eye - S, eye + S, left=False), rotation=True)

    def matmul(self, x: Tensor) -> Tensor:
        return self.blocks().matmul(x)

    def rmatmul(self, g: Tensor) -> Tensor:
        return self.blocks().rmatmul(g)

    def dense(self) -> Tensor:
        return self.blocks().dense()

    def flops(self, tokens: int) -> int:
        n, b, _ = self.X.shape[-3:]
        return 2 * tokens * n * b * b + 3 * n * b**3

    def dense_flops(self) -> int:
        n, b, _ = self.X.shape[-3:]
        return 3 * n * b**3 + (n * b) ** 2
