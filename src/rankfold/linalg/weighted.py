"""One weighted SVD behind FWSVD, ASVD, SVD-LLM, EoRA, CorDA and FILA: they differ in the weights alone."""

from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from rankfold.errors import OptionError
from rankfold.linalg._lapack import thin_svd
from rankfold.linalg._matrix import Matrix, dense, precise, require_finite, require_rank, wide
from rankfold.linalg.decompositions import SVD, Method, truncated_svd
from rankfold.linalg.random import Random

__all__ = ["Weight", "weighted_svd"]


class Weight(Protocol):
    """A weight on the last axis: `matmul(X)` applies it to X [..., n], `solve` applies its (pseudo-)inverse."""

    def matmul(self, x: Tensor, /) -> Tensor: ...
    def solve(self, x: Tensor, /) -> Tensor: ...


@precise
def weighted_svd(
    M: Matrix,
    rank: int,
    left: Tensor | Weight | None = None,
    right: Tensor | Weight | None = None,
    method: Method = "auto",
    iterations: int | None = None,
    random: Random | None = None,
) -> SVD:
    """The M̂ of rank r that minimises ‖L (M - M̂) R‖_F: with U S Vᵀ the truncated SVD of L M R, M̂ = (L⁺U) S (VᵀR⁺).

    The minimum is √Σ_{j>r} σ_j²(L M R). It depends on L and R only through LᵀL and R Rᵀ: Cholesky factor, eigenvector
    form and symmetric root of one H = R Rᵀ give the same M̂. With H = XᵀX the loss is ‖X (M - M̂)ᵀ‖_F, the error of the
    layer's output (SVD-LLM: Wang et al. 2024; EoRA: Liu et al. 2024); R = diag(mean |x|)^α is ASVD (Yuan et al. 2023);
    L or R = diag(√Fisher) is FWSVD (Hsu et al. 2022).

    Where R is singular (a weight of zero, or fewer tokens than inputs), directions of no weight are set to zero:
    of all minimisers the one that acts on weighted directions alone.

    Args:
        M: tensor [m, n], or operator (made dense).
        rank: r, from 0 to min(m, n).
        left: weight on the m outputs: a vector [m] (diagonal), a matrix L [k, m], an object with `matmul` and `solve`
            that weights the last axis of Mᵀ, or None.
        right: weight on the n inputs: a vector [n], a matrix R [n, k], such an object, or None.
        method, iterations, random: as in `truncated_svd`.

    Returns:
        L⁺U [m, r], S [r], VᵀR⁺ [r, n], to be read like an SVD (`split` makes factors of it); S holds the singular values
        of L M R. Worked in float64; float64 for float64 M, else float32.

    Raises:
        NumericError: NaN or Inf in M or a weight.
        OptionError: shapes that do not fit.

    >>> M, x_size = Random("M").normal((6, 4)), torch.tensor([10.0, 1.0, 1.0, 0.1])
    >>> loss = lambda U, S, Vh: float(((M - U * S @ Vh) * x_size).norm())
    >>> loss(*weighted_svd(M, 2, right=x_size)) < loss(*truncated_svd(M, 2))
    True
    """
    M = dense(M)
    require_rank(rank, M, "weighted_svd")
    m, n = M.shape[-2:]
    onto_outputs = None if left is None else as_weight(left, m, "left", transposed=True)
    onto_inputs = None if right is None else as_weight(right, n, "right", transposed=False)
    weighed = wide(M)
    if onto_outputs is not None:
        weighed = onto_outputs.matmul(weighed.mT).mT  # L M
    if onto_inputs is not None:
        weighed = onto_inputs.matmul(weighed)  # L M R
    require_finite(weighed, "L M R")
    components = min(rank, *weighed.shape[-2:])  # a weight with few columns caps the rank of L M R
    U, S, Vh = truncated_svd(weighed, components, method, iterations, random=random)
    if onto_outputs is not None:
        U = onto_outputs.solve(U.mT).mT
    if onto_inputs is not None:
        Vh = onto_inputs.solve(Vh)
    pad = rank - components
    U, S, Vh = (torch.nn.functional.pad(t, p) for t, p in ((U, (0, pad)), (S, (0, pad)), (Vh, (0, 0, 0, pad))))
    return U.to(M.dtype), S.to(M.dtype), Vh.to(M.dtype)


def as_weight(given: Tensor | Weight, size: int, what: str, transposed: bool) -> Weight:
    """The weight in the form that acts on the last axis: a left matrix L acts on rows of Mᵀ as Lᵀ."""
    if not isinstance(given, Tensor):
        return given
    factor = require_finite(wide(given), what)
    if factor.ndim == 1 and len(factor) == size:
        return DiagonalWeight(factor)
    if factor.ndim == 2:
        R = factor.mT if transposed else factor
        if len(R) == size:
            return TriangularWeight(R) if is_invertible_triangle(R) else MatrixWeight.of(R)
    shape = f"[k, {size}]" if transposed else f"[{size}, k]"
    raise OptionError(f"weighted_svd: {what} has shape {list(given.shape)}; use a vector [{size}] or a matrix {shape}")


@dataclass(frozen=True)
class DiagonalWeight:
    d: Tensor  # [n]

    def matmul(self, x: Tensor) -> Tensor:
        return x * self.d

    def solve(self, x: Tensor) -> Tensor:
        return x * torch.where(self.d == 0, 0.0, 1.0 / self.d)


@dataclass(frozen=True)
class TriangularWeight:
    R: Tensor  # [n, n], well away from singular

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.R

    def solve(self, x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.R, x, upper=is_upper(self.R), left=False)


@dataclass(frozen=True)
class MatrixWeight:
    """Any R [n, k] by its SVD P diag(s) Zᵀ; the pseudo-inverse is Z diag(1/s) Pᵀ. Weights below `negligible` are left out."""

    P: Tensor  # [n, q]
    s: Tensor  # [q]
    Zh: Tensor  # [q, k]

    @classmethod
    def of(cls, R: Tensor) -> "MatrixWeight":
        P, s, Zh = thin_svd(R)
        keep = s > negligible(R) * s[:1]
        return cls(P[:, keep], s[keep], Zh[keep])

    def matmul(self, x: Tensor) -> Tensor:
        return (x @ self.P) * self.s @ self.Zh

    def solve(self, x: Tensor) -> Tensor:
        return (x @ self.Zh.mT) / self.s @ self.P.mT


def negligible(R: Tensor) -> float:
    """Relative weight that counts as none: the root of rounding, as the root of a singular Gram matrix has it for zeros.

    Leaving such a direction out changes the weighted loss by 1e-7 of ‖M R‖; keeping it divides by noise.
    """
    return sqrt(max(R.shape) * torch.finfo(R.dtype).eps)


def is_upper(R: Tensor) -> bool:
    return torch.equal(R, R.triu())


def is_invertible_triangle(R: Tensor) -> bool:
    """Square, triangular, and with a diagonal that promises an accurate solve."""
    if R.shape[0] != R.shape[1] or not (is_upper(R) or torch.equal(R, R.tril())):
        return False
    d = R.diagonal().abs()
    return bool(d.min() > negligible(R) * d.max()) if len(d) else False
