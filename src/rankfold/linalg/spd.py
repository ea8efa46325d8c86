"""Functions of symmetric positive definite matrices, in float64 inside."""

import torch
from torch import Tensor

from rankfold.errors import NumericError, OptionError
from rankfold.linalg._lapack import eigh
from rankfold.linalg._matrix import dense, precise, wide

__all__ = ["cholesky_damped", "inverse_sqrt", "spd_power", "spd_sqrt"]

ASYMMETRY = 1e-3  # a Gram matrix summed in bf16 is this symmetric; more is a mistake of the caller


@precise
def spd_power(H: Tensor, p: float, floor: float = 1e-8) -> Tensor:
    """H^p = Q diag(λ^p) Qᵀ for symmetric H [..., n, n], with eigenvalues raised to at least floor·λ_max.

    The floor turns rounding's small negative eigenvalues into positive ones and bounds negative powers. With floor 0,
    eigenvalues within rounding of zero give zero: H^-1 is then the pseudo-inverse.

    Raises:
        NumericError: NaN or Inf in H, or a negative power of zero.
        OptionError: H is not symmetric.

    >>> spd_power(torch.tensor([[4.0, 0.0], [0.0, 9.0]]), 0.5)
    tensor([[2., 0.],
            [0., 3.]])
    """
    H = symmetric(H, "spd_power")
    values, Q = eigh(wide(H))
    largest = values[..., -1:]
    if p < 0 and (largest <= 0).any():
        raise NumericError(f"spd_power: power {p} of a matrix without positive eigenvalues; add damping first")
    if floor > 0:
        powers = torch.maximum(values, floor * largest.clamp_min(0)).pow(p)
    else:
        positive = values > largest * values.shape[-1] * torch.finfo(values.dtype).eps
        powers = torch.where(positive, torch.where(positive, values, 1.0).pow(p), 0.0)
    return (Q * powers.unsqueeze(-2) @ Q.mT).to(H.dtype)


def spd_sqrt(H: Tensor, floor: float = 0.0) -> Tensor:
    """The symmetric root: R R = H.

    >>> R = spd_sqrt(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> R @ R
    tensor([[2.0000, 1.0000],
            [1.0000, 2.0000]])
    """
    return spd_power(H, 0.5, floor)


def inverse_sqrt(H: Tensor, floor: float = 1e-8) -> Tensor:
    """The symmetric R with R H R = I (whitening), eigenvalues of H raised to floor·λ_max.

    >>> inverse_sqrt(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    return spd_power(H, -0.5, floor)


@precise
def cholesky_damped(H: Tensor, damping: float = 1e-6) -> tuple[Tensor, float]:
    """Lower L [n, n] with L Lᵀ = H + δ·(tr H / n)·I, and the δ that was needed.

    δ starts at `damping` and grows tenfold until the factorisation succeeds. It is relative, because an absolute 1e-6
    means nothing beside eigenvalues of 1e6.

    Raises:
        NumericError: NaN or Inf in H, tr H not positive, or indefinite even with δ = 1.
        OptionError: H is not symmetric, or negative damping.

    >>> L, used = cholesky_damped(torch.tensor([[4.0, 2.0], [2.0, 1.0]]))
    >>> used, bool(L.isfinite().all())
    (1e-06, True)
    """
    if damping < 0:
        raise OptionError(f"cholesky_damped: damping {damping} must not be negative")
    H = symmetric(H, "cholesky_damped")
    n = H.shape[-1]
    G = wide(H)
    unit = float(G.diagonal().sum()) / max(n, 1)
    if n and unit <= 0:
        raise NumericError(f"cholesky_damped: trace {unit * n:g} of a {n} x {n} matrix; it must be positive")
    delta = damping
    while True:
        L, info = torch.linalg.cholesky_ex(G + delta * unit * torch.eye(n, dtype=G.dtype, device=G.device))
        if int(info) == 0 and torch.isfinite(L).all():
            return L.to(H.dtype), delta
        if delta >= 1:
            raise NumericError(f"cholesky_damped: a {n} x {n} matrix is indefinite even with its mean eigenvalue added")
        delta = max(10 * delta, 1e-12)


def symmetric(H: Tensor, what: str) -> Tensor:
    """(H + Hᵀ)/2 of an almost symmetric H."""
    H = dense(H, "H")
    if H.shape[-1] != H.shape[-2]:
        raise OptionError(f"{what}: H has shape {list(H.shape)}; it must be square")
    if (H - H.mT).norm() > ASYMMETRY * H.norm():
        raise OptionError(f"{what}: H is not symmetric; pass (H + H.mT) / 2 if that is meant")
    return (H + H.mT) / 2
