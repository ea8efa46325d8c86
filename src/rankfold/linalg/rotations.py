"""Orthogonal matrices: the nearest one, the one that turns A into B, and those made of a skew-symmetric matrix."""

import torch
from torch import Tensor

from rankfold.errors import NumericError, OptionError
from rankfold.linalg._lapack import thin_svd
from rankfold.linalg._matrix import dense, precise

__all__ = ["QUINTIC", "cayley", "inverse_cayley", "newton_schulz", "procrustes"]

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al., "Muon", 2024: fast, settles in [0.68, 1.2] rather than at 1
CUBIC = (1.5, -0.5, 0.0)  # Newton and Schulz: slower, converges to exactly 1


def newton_schulz(M: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = QUINTIC, eps: float = 1e-7) -> Tensor:
    """Roughly U Vᵀ for M = U S Vᵀ, by products alone: X ← a X + (b XXᵀ + c (XXᵀ)²) X from M / ‖M‖_F.

    Each step maps every singular value s to a·s + b·s³ + c·s⁵. With the default coefficients five steps bring all
    values above about 1e-2 of ‖M‖_F into [0.65, 1.25]; `CUBIC` with 20 to 30 steps gives the nearest orthogonal matrix.

    Args:
        M: [..., m, n]; worked in float32 at least, returned so.
        steps, coefficients: as above.
        eps: added to the norm, so that zero stays zero.

    >>> from rankfold.linalg.random import Random
    >>> S = torch.linalg.svdvals(newton_schulz(Random("G").normal((8, 20))))
    >>> bool((S > 0.6).all() and (S < 1.3).all())
    True
    """
    a, b, c = coefficients
    X = M if M.dtype == torch.float64 else M.to(torch.float32)
    wide_matrix = X.shape[-2] <= X.shape[-1]
    X = X if wide_matrix else X.mT  # the Gram matrix on the short side
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + eps)
    for _ in range(steps):
        G = X @ X.mT
        X = a * X + (b * G + c * G @ G) @ X
    return X if wide_matrix else X.mT


@precise
def procrustes(A: Tensor, B: Tensor) -> Tensor:
    """The Q [p, q] with orthonormal rows or columns that minimises ‖A Q - B‖_F (Schönemann, 1966), if p = q.

    Q = U Vᵀ with U S Vᵀ the SVD of AᵀB; for p ≠ q this maximises ⟨A Q, B⟩.

    Args:
        A: [..., k, p].
        B: [..., k, q].

    Raises:
        NumericError: NaN or Inf in A or B.
        OptionError: different numbers of rows.

    >>> from rankfold.linalg.random import Random
    >>> A, Q = Random("A").normal((9, 3)), Random("Q").haar(3, 3)
    >>> torch.allclose(procrustes(A, A @ Q), Q, atol=1e-5)
    True
    """
    A, B = dense(A, "A"), dense(B, "B")
    if A.shape[-2] != B.shape[-2]:
        raise OptionError(f"procrustes: A {list(A.shape)} and B {list(B.shape)} have different numbers of rows")
    U, _, Vh = thin_svd(A.mT @ B)
    return U @ Vh


def cayley(S: Tensor) -> Tensor:
    """Q = (I + K)(I - K)⁻¹ [..., n, n] with K = (S - Sᵀ)/2: a rotation for any S, the identity for S = 0.

    Every rotation without the eigenvalue -1 has one K. Gradients flow; half precision is worked in float32.

    >>> Q = cayley(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    >>> Q
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    K = S if S.dtype == torch.float64 else S.to(torch.float32)
    K = (K - K.mT) / 2
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    return torch.linalg.solve(eye - K, eye + K)  # both are polynomials in K and commute


def inverse_cayley(Q: Tensor) -> Tensor:
    """The skew K [..., n, n] with cayley(K) = Q.

    Raises:
        NumericError: Q has the eigenvalue -1 (a half turn or a reflection), which no K reaches.

    >>> K = torch.tensor([[0.0, 0.5], [-0.5, 0.0]])
    >>> torch.allclose(inverse_cayley(cayley(K)), K)
    True
    """
    Q = Q if Q.dtype == torch.float64 else Q.to(torch.float32)
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    K, info = torch.linalg.solve_ex(Q + eye, Q - eye)
    limit = 1.0 / (Q.shape[-1] * torch.finfo(Q.dtype).eps) if Q.numel() else 1.0
    if info.any() or not torch.isfinite(K).all() or K.abs().amax(dim=(-2, -1)).gt(limit**0.75).any():
        raise NumericError("inverse_cayley: Q has the eigenvalue -1 (a half turn or a reflection); no finite K gives it")
    return (K - K.mT) / 2
