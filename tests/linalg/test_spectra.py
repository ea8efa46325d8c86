"""Numbers of a spectrum against their formulas and invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.errors import NumericError, OptionError
from rankfold.linalg.random import Random
from rankfold.linalg.spectra import effective_rank, energy_rank, hill_alpha, participation, spectral_stats, stable_rank

values = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(S=values, scale=st.floats(1e-3, 1e3))
def test_formulas_bounds_and_scale_invariance(S, scale):
    n, total = len(S), math.fsum(S)
    t = torch.tensor(S, dtype=torch.float64)
    stats = spectral_stats(t)
    assert stats.nuclear == pytest.approx(total)
    assert stats.spectral == max(S)
    assert stats.frobenius == pytest.approx(math.sqrt(math.fsum(s * s for s in S)))
    entropy = -math.fsum(s / total * math.log(s / total) for s in S)
    assert stats.effective_rank == pytest.approx(math.exp(entropy))
    assert stats.stable_rank == pytest.approx(math.fsum(s * s for s in S) / max(S) ** 2)
    assert stats.participation == pytest.approx(math.fsum(s**2 for s in S) ** 2 / math.fsum(s**4 for s in S))
    for rank in (stats.effective_rank, stats.stable_rank, stats.participation, stats.energy_rank):
        assert 1 - 1e-9 <= rank <= n * (1 + 1e-9)
    assert effective_rank(t, power=2) <= stats.effective_rank * (1 + 1e-9)
    assert effective_rank(t, power=2) == pytest.approx(effective_rank(t.square()))
    again = spectral_stats(scale * t.flip(0))
    assert again.effective_rank == pytest.approx(stats.effective_rank)
    assert again.stable_rank == pytest.approx(stats.stable_rank)
    assert again.participation == pytest.approx(stats.participation)


@settings(deadline=None, max_examples=40)
@given(S=values, energy=st.floats(0.05, 0.999))
def test_energy_rank_is_the_smallest_that_suffices(S, energy):
    squares = sorted((s * s for s in S), reverse=True)
    k = energy_rank(torch.tensor(S, dtype=torch.float64), energy)
    assert math.fsum(squares[:k]) >= energy * math.fsum(squares) * (1 - 1e-12)
    assert k == 1 or math.fsum(squares[: k - 1]) < energy * math.fsum(squares) * (1 + 1e-12)


def test_isotropic_rank_one_zero_and_empty():
    assert spectral_stats(torch.ones(6)).effective_rank == pytest.approx(6)
    assert spectral_stats(torch.tensor([3.0, 0.0, 0.0])).effective_rank == 1.0
    for S in (torch.zeros(4), torch.zeros(0)):
        stats = spectral_stats(S)
        assert (stats.nuclear, stats.effective_rank, stats.stable_rank, stats.participation, stats.energy_rank) == (0, 0, 0, 0, 0)
        assert stats.hill_alpha is None
    assert participation(torch.tensor([1e-30, 1e-30])) == pytest.approx(2.0)
    assert stable_rank(torch.tensor([2.0, 1.0], dtype=torch.bfloat16)) == 1.25
    assert energy_rank(torch.tensor([2.0, 1.0, 0.0]), 1.0) == 2


def test_hill_estimates_the_exponent_of_a_pareto_law():
    """Density ~ λ^-2.5 sampled by its inverse distribution function."""
    u = Random("pareto").uniform((100_000,), dtype=torch.float64)
    assert hill_alpha((1 - u) ** (-1 / 1.5)) == pytest.approx(2.5, abs=0.03)


def test_hill_by_its_formula():
    ascending = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0]
    expected = 1 + 3 / (math.log(5 / 5) + math.log(8 / 5) + math.log(13 / 5))
    t = torch.tensor(ascending)
    assert hill_alpha(t) == pytest.approx(expected)
    assert hill_alpha(1e-5 * t.flip(0)) == pytest.approx(expected)
    assert hill_alpha(torch.cat([t, torch.zeros(9)])) == pytest.approx(expected)
    assert hill_alpha(torch.ones(6)) == math.inf
    assert hill_alpha(torch.ones(4)) is None


def test_refusals():
    with pytest.raises(NumericError, match="S: 1 of 2"):
        spectral_stats(torch.tensor([1.0, float("nan")]))
    with pytest.raises(OptionError, match="vector"):
        spectral_stats(torch.ones(2, 2))
    with pytest.raises(OptionError, match="negative"):
        stable_rank(torch.tensor([1.0, -1.0]))
    with pytest.raises(OptionError, match="power 3"):
        effective_rank(torch.ones(2), power=3)
    with pytest.raises(OptionError, match="energy 0"):
        energy_rank(torch.ones(2), 0)
