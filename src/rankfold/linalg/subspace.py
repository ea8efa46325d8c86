"""Subspace and power iteration: leading directions by products alone, warm-started from the last known ones."""

import torch
from torch import Tensor

from rankfold.errors import OptionError
from rankfold.linalg._lapack import orthonormal, thin_svd
from rankfold.linalg._matrix import Matrix, lift, like, precise, require_finite, require_rank, times, transposed_times
from rankfold.linalg.decompositions import SVD
from rankfold.linalg.factors import sign_fix
from rankfold.linalg.random import Random

__all__ = ["norm_estimate", "power_iteration", "subspace_iteration"]


@precise
def subspace_iteration(
    M: Matrix, rank: int, basis: Tensor | None = None, iterations: int = 1, random: Random | None = None
) -> SVD:
    """U S Vh ≈ the r leading singular triplets of M, by V ← orth(Mᵀ orth(M V)) from a given basis V.

    The angle to the leading subspace shrinks by (σ_{r+1}/σ_r)² per iteration, so one iteration from the last step's
    basis follows a matrix that changes slowly (a gradient, a moving average).

    Args:
        M: tensor [..., m, n], or operator.
        rank: r, from 0 to min(m, n).
        basis: V [..., n, r] to start from, for instance `Vh.mT` of the last call; a random one by default.
        iterations: how often; 0 only fits U and S to the basis.
        random: stream for the random start.

    Returns:
        U [..., m, r], S [..., r] (never above the true values), Vh [..., r, n]; signs fixed by U.

    Raises:
        NumericError: NaN or Inf in M.
        OptionError: a rank that M cannot have, or a basis of another shape.

    >>> M = torch.diag(torch.tensor([4.0, 3.0, 0.5, 0.1]))
    >>> U, S, Vh = subspace_iteration(M, 2, iterations=8)
    >>> S
    tensor([4.0000, 3.0000])
    """
    require_rank(rank, M, "subspace_iteration")
    M = lift(M)
    n = M.shape[-1]
    if basis is None:
        basis = (random or Random("subspace_iteration")).normal((n, rank))
    if basis.shape[-2:] != (n, rank):
        raise OptionError(f"subspace_iteration: basis {list(basis.shape)} for rank {rank} of width {n}; use [{n}, {rank}]")
    V = orthonormal(require_finite(like(M, basis), "basis"))
    for _ in range(iterations):
        V = orthonormal(transposed_times(M, orthonormal(times(M, V))))
    W, S, Zh = thin_svd(require_finite(times(M, V), "M"))  # Rayleigh and Ritz: the SVD of M within span V
    U, Vh = sign_fix(W, Zh @ V.mT)
    return U, S, Vh


@precise
def power_iteration(M: Matrix, k: int = 1, tol: float = 1e-6, max_iterations: int = 300, random: Random | None = None) -> SVD:
    """The k leading singular triplets, iterated until no singular value moves by more than tol times the largest.

    A block of k + 2 vectors is iterated, so close values at the edge of the block do not stall it. If
    `max_iterations` is reached the last estimate is returned: it is below the truth, by little if values are close.

    >>> U, S, Vh = power_iteration(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    >>> S, U.shape, Vh.shape
    (tensor([2.]), torch.Size([2, 1]), torch.Size([1, 3]))
    """
    require_rank(k, M, "power_iteration")
    width = min(k + 2, *M.shape[-2:])
    U, S, Vh = subspace_iteration(M, width, random=random)
    for _ in range(max_iterations):
        last = S
        U, S, Vh = subspace_iteration(M, width, basis=Vh.mT)
        if width == 0 or ((S - last).abs() <= tol * S[..., :1]).all():
            break
    return U[..., :k], S[..., :k], Vh[..., :k, :]


def norm_estimate(M: Matrix, tol: float = 1e-3) -> Tensor:
    """The spectral norm ‖M‖ [...] by products with M, from below, to about `tol` relative.

    >>> norm_estimate(torch.tensor([[3.0, 0.0, 4.0]]))
    tensor(5.)
    """
    if min(M.shape[-2:]) == 0:
        return torch.zeros(tuple(M.shape[:-2]))
    return power_iteration(M, 1, tol=tol * 0.1)[1][..., 0]
