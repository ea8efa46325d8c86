"""Numbers that sum up a spectrum. S stands for singular values [k] in any order."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.errors import OptionError
from rankfold.linalg._matrix import require_finite

__all__ = ["SpectralStats", "effective_rank", "energy_rank", "hill_alpha", "participation", "spectral_stats", "stable_rank"]


@dataclass(frozen=True)
class SpectralStats:
    """What `spectral_stats` returns; each is defined at the function of its name."""

    spectral: float  # σ_1
    frobenius: float  # √Σσ²
    nuclear: float  # Σσ
    effective_rank: float
    stable_rank: float
    participation: float
    energy_rank: int  # for 90 % of Σσ²
    hill_alpha: float | None


def spectral_stats(S: Tensor) -> SpectralStats:
    """All of this file in one record; every rank of a zero spectrum is 0.

    Raises:
        NumericError: NaN or Inf in S.

    >>> stats = spectral_stats(torch.tensor([2.0, 2.0, 2.0, 2.0]))
    >>> stats.nuclear, stats.stable_rank, stats.participation, stats.energy_rank
    (8.0, 4.0, 4.0, 4)
    """
    S = descending(S)
    return SpectralStats(
        spectral=float(S.max()) if len(S) else 0.0,
        frobenius=float(S.norm()),
        nuclear=float(S.sum()),
        effective_rank=effective_rank(S),
        stable_rank=stable_rank(S),
        participation=participation(S),
        energy_rank=energy_rank(S),
        hill_alpha=hill_alpha(S.square()),
    )


def effective_rank(S: Tensor, power: int = 1) -> float:
    """exp(-Σ p ln p) with p = S^power / ΣS^power and 0·ln 0 = 0 (Roy and Vetterli, 2007: power 1; papers also use 2).

    >>> round(effective_rank(torch.tensor([1.0, 1.0, 0.0])), 6), round(effective_rank(torch.tensor([3.0, 1.0]), power=2), 2)
    (2.0, 1.38)
    """
    if power not in (1, 2):
        raise OptionError(f"effective_rank: power {power}; use 1 (singular values) or 2 (their squares)")
    weights = descending(S).pow(power)
    total = weights.sum()
    if total == 0:
        return 0.0
    p = weights / total
    return float(torch.special.entr(p).sum().exp())


def stable_rank(S: Tensor) -> float:
    """ΣS² / S₁²: at most the rank, and blind to small values.

    >>> stable_rank(torch.tensor([2.0, 1.0, 1.0]))
    1.5
    """
    squares = descending(S).square()
    return float(squares.sum() / squares[0]) if len(squares) and squares[0] > 0 else 0.0


def participation(S: Tensor) -> float:
    """(ΣS²)² / ΣS⁴: how many directions share the energy.

    >>> participation(torch.tensor([1.0, 1.0, 0.0]))
    2.0
    """
    S = descending(S)
    squares = (S / S[0]).square() if len(S) and S[0] > 0 else S.new_zeros(0)
    return float(squares.sum() ** 2 / squares.square().sum()) if len(squares) else 0.0


def energy_rank(S: Tensor, energy: float = 0.9) -> int:
    """The smallest k with Σ_{j<=k} S_j² >= energy·ΣS², the largest first.

    >>> energy_rank(torch.tensor([3.0, 1.0, 1.0]), 0.8), energy_rank(torch.tensor([3.0, 1.0, 1.0]), 1.0)
    (1, 3)
    """
    if not 0 < energy <= 1:
        raise OptionError(f"energy_rank: energy {energy}; use a share in (0, 1]")
    squares = descending(S).square()
    total = squares.sum()
    if total == 0:
        return 0
    if energy == 1:
        return int((squares > 0).sum())
    return int((squares.cumsum(0) < energy * total).sum()) + 1


def hill_alpha(eigenvalues: Tensor, floor: float = 1e-12) -> float | None:
    """Hill's estimate of the exponent α of a density ~ λ^-α from the upper half of the eigenvalues (Hill, 1975).

    With n positive values ascending, i₀ = ⌊n/2⌋ and k = n - i₀: α = 1 + k / Σ_{i>=i₀} ln(λ_i / λ_{i₀}). Smaller means
    heavier-tailed. Invariant to scale; infinite for equal values; None for fewer than 5 of them.

    Args:
        eigenvalues: squared singular values.
        floor: values of at most floor times the largest count as zero and are left out.

    >>> quantiles = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    >>> round(hill_alpha((1 - quantiles) ** (-1 / 1.5)), 2)  # Pareto with α = 2.5
    2.5
    """
    values = descending(eigenvalues).flip(0)
    values = values[values > floor * values.max()] if len(values) else values
    n = len(values)
    if n < 5:
        return None
    tail = values[n // 2 :]
    total = float((tail / tail[0]).log().sum())
    return 1 + len(tail) / total if total > 0 else math.inf


def descending(S: Tensor) -> Tensor:
    """S as a sorted float64 vector on the CPU, checked."""
    if S.ndim != 1:
        raise OptionError(f"spectra: singular values must be a vector, got shape {list(S.shape)}")
    values = require_finite(S.detach().to("cpu", torch.float64), "S")
    if (values < 0).any():
        raise OptionError("spectra: singular values must not be negative")
    return values.sort(descending=True).values
