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

    Applied in a compact form 1 − X T Xᵀ as WY is (Joffrain et al., 2006), but with X = [u_1, u_2 − u_1, u_3, u_4 − u_3, ...]: two
    neighbours u, v = u + d make the rotation 1 − 2δ uuᵀ + 2(1 − δ) udᵀ − 2 duᵀ − 2 ddᵀ with δ = ‖d‖², where every term holds d.
    So equal neighbours are the identity bitwise, in every dtype, and a small rotation is as exact relative to its angle as a
    large one; the usual X = U leaves a rounding error of the size of x. Cost: two skinny products and one triangular solve of
    size r, the solve in at least float32.

    >>> import torch
    >>> u = torch.randn(5, 1)
    >>> pair = Householder(torch.cat([u, u], 1))          # a reflection twice is the identity
    >>> torch.equal(pair.dense(), torch.eye(5))
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

    def unit(self) -> Tensor:
        """The columns of U at length one, [*batch, n, r]; a zero column stays zero, and its reflection is the identity."""
        return self._columns()[1]

    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, its unit columns, and their lengths (one where a column is zero), in at least float32."""
        U = at_least_float32(self.U)
        length = torch.linalg.vector_norm(U, dim=-2, keepdim=True)
        length = torch.where(length > 0, length, torch.ones_like(length))
        return U, U / length, length

    def compact(self) -> tuple[Tensor, Tensor]:
        """(X, T), [*batch, n, r] and [*batch, r, r], with H_1 ... H_r = 1 − X T Xᵀ.

        With M the 2 x 2 blocks of the pairs, (1 + X_1 M_1 X_1ᵀ)(1 + X_2 M_2 X_2ᵀ) ... = 1 + X N Xᵀ for N = (1 − M S)⁻¹ M, where S
        is XᵀX above its diagonal blocks; T = −N.
        """
        raw, U, length = self._columns()
        r = U.shape[-1]
        (u, v), (a, b) = ((t[..., 0 : r - r % 2 : 2], t[..., 1::2]) for t in (raw, length))
        first, second = U[..., 0 : r - r % 2 : 2], U[..., 1::2]
        # v/‖v‖ − u/‖u‖ from v − u, which is exact for close neighbours: the rounding of the unit columns would drown a small turn
        e = v - u
        d = (e - first * ((e * (u + v)).sum(-2, keepdim=True) / (a + b))) / b
        d = torch.where((v == 0).all(-2, keepdim=True), second - first, d)
        X = torch.stack([first, d], -1).flatten(-2)
        delta = d.square().sum(-2)  # [*batch, pairs]
        two = torch.full_like(delta, 2.0)
        blocks = torch.stack([-2.0 * delta, two - 2.0 * delta, -two, -two], -1).unflatten(-1, (2, 2))  # [*batch, pairs, 2, 2]
        M = BlockDiagonal(blocks).dense()
        if r % 2:  # one reflection is left: 1 − 2 u uᵀ
            X = torch.cat([X, U[..., -1:]], -1)
            M = torch.nn.functional.pad(M, (0, 1, 0, 1)) - 2.0 * torch.diag_embed(
                (torch.arange(r, device=M.device) == r - 1).to(M.dtype)
            )
        pair = torch.arange(r, device=U.device) // 2
        S = (X.mT @ X) * (pair[:, None] < pair)
        eye = torch.eye(r, dtype=U.dtype, device=U.device)
        return X, -torch.linalg.solve_triangular(eye - M @ S, M, upper=True, unitriangular=True)

    def matmul(self, x: Tensor) -> Tensor:
        X, T = self.compact()
        return x - (x @ like(X @ T.mT, x)) @ like(X, x).mT  # x Hᵀ with Hᵀ = 1 − X Tᵀ Xᵀ

    def rmatmul(self, g: Tensor) -> Tensor:
        X, T = self.compact()
        return g - (g @ like(X @ T, g)) @ like(X, g).mT

    def dense(self) -> Tensor:
        X, T = self.compact()
        return torch.eye(self.shape[0], dtype=X.dtype, device=X.device) - (X @ T) @ X.mT

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
