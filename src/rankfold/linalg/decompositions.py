"""Truncated singular value decompositions of tensors and operators: exact, randomised, and of a product."""

from typing import Literal

import torch
from torch import Tensor

from rankfold.errors import OptionError
from rankfold.linalg._lapack import orthonormal, thin_svd
from rankfold.linalg._matrix import Matrix, dense, lift, like, precise, require_finite, require_rank, times, transposed_times
from rankfold.linalg.factors import sign_fix
from rankfold.linalg.random import Random

__all__ = ["product_svd", "randomized_svd", "truncated_svd"]

EXACT_BELOW = 2048  # up to this many rows or columns LAPACK is fast enough to be the default
EXACT_SHARE = 0.25  # above this share of all ranks the randomised method saves nothing

Method = Literal["auto", "exact", "randomized"]
SVD = tuple[Tensor, Tensor, Tensor]


@precise
def truncated_svd(
    M: Matrix,
    rank: int,
    method: Method = "auto",
    iterations: int | None = None,
    oversample: int = 10,
    random: Random | None = None,
) -> SVD:
    """The best rank-r approximation of M in every unitarily invariant norm: M ≈ U diag(S) Vh.

    ‖M - U diag(S) Vh‖_F² = Σ_{j>r} σ_j² (Eckart and Young, 1936). Signs are fixed by the columns of U.

    Args:
        M: tensor [..., m, n], or operator.
        rank: r, from 0 to min(m, n).
        method: "exact" is LAPACK on the dense matrix; "randomized" needs products only; "auto" is randomised when
            `iterations` is given, or when min(m, n) > 2048 and r is at most a quarter of it, else exact.
        iterations, oversample, random: of the randomised method (2 iterations by default).

    Returns:
        U [..., m, r], S [..., r] descending, Vh [..., r, n]; float64 for float64 input, else float32.

    Raises:
        NumericError: NaN or Inf in M.
        OptionError: a rank that M cannot have, or an unknown method.

    >>> M = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> U, S, Vh = truncated_svd(M, 2)
    >>> S, (M - U * S @ Vh).norm()
    (tensor([3., 2.]), tensor(1.))
    """
    if method not in ("auto", "exact", "randomized"):
        raise OptionError(f'truncated_svd: method {method!r}; use "auto", "exact" or "randomized"')
    require_rank(rank, M, "truncated_svd")
    small = min(M.shape[-2:])
    exact = small <= EXACT_BELOW or rank > EXACT_SHARE * small
    if method == "exact" or (method == "auto" and iterations is None and exact):
        U, S, Vh = thin_svd(dense(M))
        U, Vh = sign_fix(U[..., :rank], Vh[..., :rank, :])
        return U, S[..., :rank], Vh
    return randomized_svd(M, rank, 2 if iterations is None else iterations, oversample, random)


@precise
def randomized_svd(M: Matrix, rank: int, iterations: int = 2, oversample: int = 10, random: Random | None = None) -> SVD:
    """Truncated SVD from 2·(iterations + 1) products with M (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1).

    Q = orth(M Ω) with normal Ω [n, r + p]; q times Q ← orth(M orth(MᵀQ)); then the SVD of QᵀM. With q = 0,
    E‖M - QQᵀM‖_F ≤ √(1 + r/(p-1))·√Σ_{j>r}σ_j²; each iteration sharpens the spectrum by the power 2. The
    orthonormalisations between half-steps are not optional: without them small directions drown in rounding.

    Args:
        M: tensor [..., m, n], or operator; only `matmul` and `rmatmul` are called.
        rank: r, from 0 to min(m, n).
        iterations: q; 2 is within 2 % of the optimum on decaying spectra, 0 is for spectra that fall very fast.
        oversample: p, extra columns of Ω, dropped at the end.
        random: stream for Ω; a fixed one by default, so equal calls give equal results.

    Raises:
        NumericError: NaN or Inf in M, or in a product with it.
        OptionError: a rank that M cannot have, or negative counts.

    >>> M = Random("M").normal((60, 4)) @ Random("N").normal((4, 40))
    >>> U, S, Vh = randomized_svd(M, 4)
    >>> bool((M - U * S @ Vh).norm() < 1e-5 * M.norm())
    True
    """
    if iterations < 0 or oversample < 0:
        raise OptionError(f"randomized_svd: iterations {iterations} and oversample {oversample} must not be negative")
    require_rank(rank, M, "randomized_svd")
    M = lift(M)
    m, n = M.shape[-2:]
    width = min(rank + oversample, m, n)
    Omega = like(M, (random or Random("randomized_svd")).normal((n, width)))  # [n, r + p]
    Q = orthonormal(require_finite(times(M, Omega), "M"))  # [m, r + p]
    for _ in range(iterations):
        Q = orthonormal(times(M, orthonormal(transposed_times(M, Q))))
    W, S, Vh = thin_svd(transposed_times(M, Q).mT)  # of QᵀM [r + p, n]
    U, Vh = sign_fix(Q @ W[..., :rank], Vh[..., :rank, :])
    return U, S[..., :rank], Vh


@precise
def product_svd(B: Tensor, A: Tensor, rank: int | None = None) -> SVD:
    """The exact SVD of B A, without ever forming it: O((m + n) r² + r³).

    B = Q_b R_b, Aᵀ = Q_a R_a, and the SVD of the small R_b R_aᵀ. A sum Σ B_i A_i is the product of the stacked
    [B_1 B_2 ...] and [A_1; A_2; ...].

    Args:
        B: [..., m, r].
        A: [..., r, n].
        rank: how many components to keep; all min(m, r, n) by default.

    Raises:
        NumericError: NaN or Inf in B or A.
        OptionError: inner widths that differ, or a rank that the product cannot have.

    >>> B, A = Random("B").normal((1000, 3)), Random("A").normal((3, 800))
    >>> [t.shape for t in product_svd(B, A)]
    [torch.Size([1000, 3]), torch.Size([3]), torch.Size([3, 800])]
    """
    B, A = dense(B, "B"), dense(A, "A")
    if B.shape[-1] != A.shape[-2]:
        raise OptionError(f"product_svd: B {list(B.shape)} and A {list(A.shape)} have different inner widths")
    dtype = torch.promote_types(B.dtype, A.dtype)
    most = min(B.shape[-2], B.shape[-1], A.shape[-1])
    rank = most if rank is None else rank
    if not 0 <= rank <= most:
        raise OptionError(f"product_svd: rank {rank} of a product of rank at most {most}")
    Q_b, R_b = torch.linalg.qr(B.to(dtype))
    Q_a, R_a = torch.linalg.qr(A.to(dtype).mT)
    W, S, Zh = thin_svd(R_b @ R_a.mT)
    U, Vh = sign_fix(Q_b @ W[..., :rank], Zh[..., :rank, :] @ Q_a.mT)
    return U, S[..., :rank], Vh
