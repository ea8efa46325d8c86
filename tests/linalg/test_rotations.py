"""Newton-Schulz, Procrustes and Cayley."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.errors import NumericError, OptionError
from rankfold.linalg.random import Random
from rankfold.linalg.rotations import CUBIC, cayley, inverse_cayley, newton_schulz, procrustes


@pytest.mark.parametrize("shape", [(6, 15), (15, 6), (2, 7, 9)])
def test_newton_schulz_keeps_the_singular_vectors_and_levels_the_values(shape):
    M = Random("M").normal(shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    exact = newton_schulz(M, steps=40, coefficients=CUBIC)
    torch.testing.assert_close(exact, U @ Vh, atol=1e-6, rtol=0)
    rough = U.mT @ newton_schulz(M) @ Vh.mT  # diagonal, with the quintic of S/‖S‖ five times over on it
    s = S / (S.norm(dim=-1, keepdim=True) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(rough, torch.diag_embed(s), atol=1e-10, rtol=0)
    assert ((s > 0.6) & (s < 1.3)).all()


def test_newton_schulz_odd_input():
    assert newton_schulz(torch.zeros(3, 4)).abs().sum() == 0
    assert newton_schulz(torch.ones(3, 4, dtype=torch.bfloat16)).dtype == torch.float32
    assert newton_schulz(torch.zeros(0, 4)).shape == (0, 4)
    assert newton_schulz(torch.tensor([[0.0, -7.0]])).abs().max() < 1.3


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6))
def test_procrustes_finds_the_turn_and_nothing_does_better(seed, n):
    A, Q = Random("A", seed).normal((8, n), dtype=torch.float64), Random("Q", seed).haar(n, n, torch.float64)
    torch.testing.assert_close(procrustes(A, A @ Q), Q, atol=1e-5, rtol=0)
    B = Random("B", seed).normal((8, n), dtype=torch.float64)
    best = (A @ procrustes(A, B) - B).norm()
    for draw in range(5):
        other = torch.linalg.qr(Random("other", seed, draw).normal((n, n), dtype=torch.float64)).Q
        assert best <= (A @ other - B).norm() * (1 + 1e-12)


def test_procrustes_odd_input():
    assert procrustes(torch.zeros(4, 2), torch.ones(4, 2)).isfinite().all()
    assert procrustes(torch.ones(4, 2), torch.ones(4, 3)).shape == (2, 3)
    with pytest.raises(OptionError, match="different numbers of rows"):
        procrustes(torch.ones(4, 2), torch.ones(3, 2))
    with pytest.raises(NumericError, match="B: "):
        procrustes(torch.ones(4, 2), torch.full((4, 2), float("nan")))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 7), size=st.floats(0, 5))
def test_cayley_is_a_rotation_and_its_inverse_comes_back(seed, n, size):
    S = size * Random("S", seed).normal((2, n, n), dtype=torch.float64)
    K = (S - S.mT) / 2
    Q = cayley(S)
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(Q, (eye + K) @ torch.linalg.inv(eye - K), atol=1e-10, rtol=0)
    torch.testing.assert_close(Q @ Q.mT, eye.expand(2, n, n), atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.linalg.det(Q), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(inverse_cayley(Q), K, atol=1e-8 * (1 + size**3), rtol=0)


def test_cayley_starts_at_the_identity_with_gradient():
    S = torch.zeros(3, 3, requires_grad=True)
    assert torch.equal(cayley(S), torch.eye(3))
    cayley(S)[0, 1].backward()
    torch.testing.assert_close(S.grad, torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 0]]))
    assert cayley(S.detach().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("Q", [-torch.eye(2), torch.diag(torch.tensor([1.0, -1.0]))])
def test_half_turns_have_no_cayley(Q):
    with pytest.raises(NumericError, match="eigenvalue -1"):
        inverse_cayley(Q)
