"""Nyström factors: a matrix from some of its own rows and columns."""

from typing import Literal

import torch
from torch import Tensor

from rankfold.errors import OptionError
from rankfold.linalg._lapack import thin_svd
from rankfold.linalg._matrix import Matrix, dense, precise, require_rank, wide
from rankfold.linalg.decompositions import truncated_svd
from rankfold.linalg.lu import lu

__all__ = ["nystrom"]


@precise
def nystrom(
    W: Matrix, rank: int, mode: Literal["pinv", "block", "pivoted"] = "pinv", rcond: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor]:
    """B [m, r], N [r, r], A [r, n] cut out of W: B = W[:, J], A = W[I, :], and N from the block W[I, J].

    If W has rank at most r and the block is invertible, W = B W[I, J]⁻¹ A exactly. NLoRA (Guo et al. 2025) starts an
    adapter from these factors without an SVD of W.

    Args:
        W: tensor [m, n], or operator (made dense).
        rank: r, from 0 to min(m, n).
        mode: "pinv": I = J = the first r, N the pseudo-inverse of the block. "block": N is the block itself, as the
            published code has it; B N A then approximates nothing. "pivoted": rows and columns picked by the pivots of
            the leading singular vectors (the discrete empirical interpolation of Sorensen and Embree, 2016) and a
            pseudo-inverse; much closer to W than the first r rows, which are arbitrary.
        rcond: singular values of the block below rcond times its largest are left out of the pseudo-inverse.

    Raises:
        NumericError: NaN or Inf in W.
        OptionError: a rank that W cannot have, or an unknown mode.

    >>> from rankfold.linalg.random import Random
    >>> W = Random("left").normal((30, 3)) @ Random("right").normal((3, 20))
    >>> B, N, A = nystrom(W, 3)
    >>> B.shape, A.shape, bool((B @ N @ A - W).norm() < 1e-3 * W.norm())
    (torch.Size([30, 3]), torch.Size([3, 20]), True)
    """
    if mode not in ("pinv", "block", "pivoted"):
        raise OptionError(f'nystrom: mode {mode!r}; use "pinv", "block" or "pivoted"')
    W = dense(W, "W")
    require_rank(rank, W, "nystrom")
    rows = columns = torch.arange(rank, device=W.device)
    if mode == "pivoted":
        U, _, Vh = truncated_svd(W, rank)
        rows, columns = lu(U).permutation[:rank], lu(Vh.mT).permutation[:rank]
    block = W[rows][:, columns]
    N = block if mode == "block" else pseudo_inverse(block, rcond)
    return W[:, columns], N, W[rows]


def pseudo_inverse(M: Tensor, rcond: float) -> Tensor:
    """M⁺ by the SVD in float64; singular values of at most rcond times the largest count as zero."""
    U, S, Vh = thin_svd(wide(M))
    inverse = torch.where(rcond * S[:1] < S, 1.0 / S, 0.0)
    return (Vh.mT * inverse @ U.mT).to(M.dtype)
