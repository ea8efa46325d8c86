"""Subspace and power iteration."""

from itertools import pairwise

import pytest
import torch

from rankfold.errors import NumericError, OptionError
from rankfold.linalg.decompositions import truncated_svd
from rankfold.linalg.random import Random
from rankfold.linalg.subspace import norm_estimate, power_iteration, subspace_iteration

SIGMA = torch.tensor([10.0, 7.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)


def matrix(m=14, n=11):
    U = torch.linalg.qr(Random("U").normal((m, 6), dtype=torch.float64)).Q
    V = torch.linalg.qr(Random("V").normal((n, 6), dtype=torch.float64)).Q
    return U * SIGMA @ V.mT


def sine(V, W):
    """Sine of the largest principal angle between the spans of two orthonormal bases."""
    return float(torch.linalg.matrix_norm(V - W @ (W.mT @ V), 2))


@pytest.mark.parametrize("shape", [(14, 11), (11, 14)])
def test_warm_starts_close_in_on_the_subspace(shape):
    """The angle falls by about (σ₄/σ₃)² = 1/4 per iteration, and never grows, for a matrix that stands still."""
    M = matrix(*shape)
    true = truncated_svd(M, 3)
    basis, angles = Random("start").haar(shape[1], 3, torch.float64), []
    for _ in range(12):
        _, S, Vh = subspace_iteration(M, 3, basis=basis)
        basis = Vh.mT
        angles.append(sine(basis, true[2].mT))
        assert (SIGMA[:3] - S >= -1e-11).all()
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(angles))
    assert 0.2 < (angles[-1] / angles[-4]) ** (1 / 3) < 0.3
    for ours, oracle in zip(subspace_iteration(M, 3, basis=basis, iterations=20), true):
        torch.testing.assert_close(ours, oracle, atol=1e-10, rtol=0)


def test_a_moving_matrix_is_followed_better_warm_than_cold():
    M, drift = matrix(), 0.1 * Random("drift").normal((14, 11), dtype=torch.float64)
    basis = truncated_svd(M, 3)[2].mT
    true = truncated_svd(M + drift, 3)[2].mT
    warm = sine(subspace_iteration(M + drift, 3, basis)[2].mT, true)
    cold = sine(subspace_iteration(M + drift, 3)[2].mT, true)
    assert warm < 0.3 * cold


def test_zero_iterations_fit_the_basis_only():
    M, V = matrix(), Random("V0").haar(11, 2, torch.float64)
    U, S, Vh = subspace_iteration(M, 2, V, iterations=0)
    torch.testing.assert_close(U * S @ Vh, M @ V @ V.mT, atol=1e-6, rtol=0)


def test_power_iteration_and_norm():
    M = matrix()
    for ours, oracle in zip(power_iteration(M, 2, tol=1e-14), truncated_svd(M, 2)):
        torch.testing.assert_close(ours, oracle, atol=1e-6, rtol=0)
    from rankfold.linalg import Dense, LowRank

    assert float(norm_estimate(M)) == pytest.approx(10.0, rel=1e-3)
    assert float(norm_estimate(Dense(M.float()))) == pytest.approx(10.0, rel=1e-3)
    B, A = Random("B").normal((20, 2)), Random("A").normal((2, 30))
    assert float(norm_estimate(LowRank(B, A))) == pytest.approx(float(torch.linalg.matrix_norm(B @ A, 2)), rel=1e-3)
    torch.testing.assert_close(
        norm_estimate(torch.stack([M, 2 * M])), torch.tensor([10.0, 20.0], dtype=torch.float64), rtol=1e-3, atol=0
    )
    slow = torch.diag(torch.linspace(1, 0.9, 60, dtype=torch.float64))
    assert float(norm_estimate(slow, tol=1e-4)) == pytest.approx(1.0, rel=1e-3)
    equal = torch.eye(40, 30)  # no gap at all
    assert float(norm_estimate(equal)) == pytest.approx(1.0, rel=1e-5)


def test_odd_input():
    assert norm_estimate(torch.zeros(3, 4)).item() == 0.0
    assert norm_estimate(torch.zeros(0, 4)).item() == 0.0
    assert norm_estimate(torch.tensor([[3.0, 4.0]])).item() == pytest.approx(5.0)
    assert norm_estimate(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16)).dtype == torch.float32
    U, S, Vh = subspace_iteration(torch.zeros(5, 3), 2)
    assert S.tolist() == [0.0, 0.0]
    torch.testing.assert_close(Vh @ Vh.mT, torch.eye(2))
    torch.testing.assert_close(U.mT @ U, torch.eye(2))
    assert subspace_iteration(torch.zeros(5, 3), 0)[0].shape == (5, 0)
    assert power_iteration(torch.zeros(0, 3), 0)[2].shape == (0, 3)
    with pytest.raises(OptionError, match=r"basis \[3, 1\] for rank 2 of width 3; use \[3, 2\]"):
        subspace_iteration(torch.ones(5, 3), 2, torch.ones(3, 1))
    with pytest.raises(OptionError, match="rank 4"):
        subspace_iteration(torch.ones(5, 3), 4)
    with pytest.raises(NumericError):
        norm_estimate(torch.full((5, 3), float("nan")))
