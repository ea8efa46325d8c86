"""LU factorisation in the form that adapters use: a permutation vector, unit L, a diagonal, unit U."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.linalg._matrix import Matrix, dense, precise

__all__ = ["LDU", "lu"]


@dataclass(frozen=True)
class LDU:
    """M[permutation] = L diag(d) U.

    Attributes:
        permutation: int64 [m], rows of M in pivot order.
        L: [m, k], lower trapezoidal with unit diagonal, entries at most 1 in size; k = min(m, n).
        d: [k].
        U: [k, n], upper trapezoidal; unit diagonal where `regular`.
        regular: bool [k], pivots above the floor.
    """

    permutation: Tensor
    L: Tensor
    d: Tensor
    U: Tensor
    regular: Tensor

    def unpermuted(self) -> Tensor:
        """P L [m, k]: the rows of L put back to where M has them, so that M = P L diag(d) U."""
        PL = torch.empty_like(self.L)
        PL[self.permutation] = self.L
        return PL

    def dense(self) -> Tensor:
        """M [m, n]."""
        return (self.unpermuted() * self.d) @ self.U


@precise
def lu(M: Matrix, floor: float = 1e-6) -> LDU:
    """LU factorisation with partial pivoting, the diagonal of U taken out: M[permutation] = L diag(d) U.

    A pivot of at most `floor` times the largest cannot be divided by without blowing U up. Its row is divided by the
    row's largest entry instead: the product stays exact, and `regular` is False there (LoLDU, Shi et al. 2024, leaves
    such components out).

    Args:
        M: tensor [m, n], or operator (made dense).
        floor: relative size below which a pivot counts as zero.

    Raises:
        NumericError: NaN or Inf in M.

    >>> M = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> f = lu(M)
    >>> f.permutation, f.d, f.U.diagonal()
    (tensor([1, 0]), tensor([4.0000, 0.7500]), tensor([1., 1.]))
    >>> torch.allclose(f.dense(), M)
    True
    """
    M = dense(M)
    m, n = M.shape
    k = min(m, n)
    if k == 0:
        none = M.new_zeros(0)
        return LDU(torch.arange(m), M.new_zeros(m, 0), none, M.new_zeros(0, n), none.bool())
    packed, pivots, _ = torch.linalg.lu_factor_ex(M)
    L = packed[:, :k].tril(-1) + torch.eye(m, k, dtype=M.dtype, device=M.device)
    U = packed[:k].triu()
    pivot = U.diagonal()
    regular = pivot.abs() > floor * pivot.abs().max()
    peak = U.gather(1, U.abs().argmax(dim=1, keepdim=True)).squeeze(1)  # signed entry of largest size in each row
    d = torch.where(regular, pivot, peak)
    U = torch.where(d.unsqueeze(1) == 0, U, U / torch.where(d == 0, 1.0, d).unsqueeze(1))
    U = torch.where(torch.eye(k, n, dtype=torch.bool, device=M.device) & regular.unsqueeze(1), 1.0, U)
    return LDU(as_permutation(pivots, m), L, d, U, regular)


def as_permutation(pivots: Tensor, m: int) -> Tensor:
    """LAPACK's list of row exchanges (1-based, in order) as one index vector."""
    order = list(range(m))
    for i, j in enumerate(pivots.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order, device=pivots.device)
