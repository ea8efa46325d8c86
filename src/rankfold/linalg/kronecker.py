"""The best sum of Kronecker products."""

from torch import Tensor

from rankfold.errors import OptionError
from rankfold.linalg._matrix import Matrix, dense, precise
from rankfold.linalg.decompositions import truncated_svd

__all__ = ["kronecker_svd"]


@precise
def kronecker_svd(M: Matrix, shape_p: tuple[int, int], shape_q: tuple[int, int], terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """M ≈ Σ_k S_k P_k ⊗ Q_k with the least Frobenius error of any such sum (Van Loan and Pitsianis, 1993).

    The entries are rearranged so that each block of M becomes one row: R[(i,j), (k,l)] = M[i·m₂ + k, j·n₂ + l]. A
    Kronecker product has R = vec(P) vec(Q)ᵀ of rank one, so the SVD of R answers, and ‖M - M̂‖_F² = Σ_{k>t} S_k².
    Without the rearrangement (a plain reshape) the SVD answers another question.

    Args:
        M: tensor [..., m₁·m₂, n₁·n₂], or operator (made dense).
        shape_p: (m₁, n₁).
        shape_q: (m₂, n₂).
        terms: t, up to min(m₁·n₁, m₂·n₂).

    Returns:
        P [..., t, m₁, n₁] and Q [..., t, m₂, n₂], each term of Frobenius norm 1, around S [..., t]; the largest entry of
        each P_k is positive.

    Raises:
        NumericError: NaN or Inf in M.
        OptionError: shapes that do not multiply to M's, or more terms than there are.

    >>> import torch
    >>> P0, Q0 = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [1.0]])
    >>> P, S, Q = kronecker_svd(torch.kron(P0, Q0), (1, 2), (3, 1), terms=1)
    >>> torch.allclose(S[0] * torch.kron(P[0], Q[0]), torch.kron(P0, Q0))
    True
    """
    M = dense(M)
    *batch, m, n = M.shape
    (m1, n1), (m2, n2) = shape_p, shape_q
    if (m1 * m2, n1 * n2) != (m, n):
        raise OptionError(f"kronecker_svd: {m1} x {n1} ⊗ {m2} x {n2} is {m1 * m2} x {n1 * n2}, but M is {m} x {n}")
    blocks = M.reshape(*batch, m1, m2, n1, n2).transpose(-3, -2)  # [..., m1, n1, m2, n2]
    U, S, Vh = truncated_svd(blocks.reshape(*batch, m1 * n1, m2 * n2), terms)
    return U.mT.reshape(*batch, terms, m1, n1), S, Vh.reshape(*batch, terms, m2, n2)
