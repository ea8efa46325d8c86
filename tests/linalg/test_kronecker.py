"""Kronecker SVD."""

import pytest
import torch

from rankfold.errors import NumericError, OptionError
from rankfold.linalg.decompositions import truncated_svd
from rankfold.linalg.kronecker import kronecker_svd
from rankfold.linalg.random import Random

P_SHAPE, Q_SHAPE = (2, 3), (5, 4)


def total(P, S, Q):
    return sum(s * torch.kron(p, q) for p, s, q in zip(P, S, Q))


def test_a_sum_of_terms_is_recovered():
    """Fails for a plain reshape without the exchange of the middle axes."""
    terms = [
        (Random("P", k).normal(P_SHAPE, dtype=torch.float64), Random("Q", k).normal(Q_SHAPE, dtype=torch.float64)) for k in (0, 1)
    ]
    M = sum(torch.kron(p, q) for p, q in terms)
    P, S, Q = kronecker_svd(M, P_SHAPE, Q_SHAPE, 2)
    assert (P.shape, S.shape, Q.shape) == ((2, 2, 3), (2,), (2, 5, 4))
    torch.testing.assert_close(total(P, S, Q), M, atol=1e-12, rtol=0)
    assert (total(P[:1], S[:1], Q[:1]) - M).norm() > 0.1


@pytest.mark.parametrize("terms", [1, 3, 6])
def test_the_error_is_the_tail(terms):
    M = Random("M").normal((10, 12), dtype=torch.float64)
    _, all_S, _ = kronecker_svd(M, P_SHAPE, Q_SHAPE, 6)
    P, S, Q = kronecker_svd(M, P_SHAPE, Q_SHAPE, terms)
    torch.testing.assert_close((M - total(P, S, Q)).square().sum(), all_S[terms:].square().sum(), rtol=1e-8, atol=1e-20)
    torch.testing.assert_close(torch.linalg.matrix_norm(P), torch.ones(terms, dtype=torch.float64))


def test_thin_shapes_are_the_ordinary_svd():
    M = Random("M").normal((6, 5), dtype=torch.float64)
    P, S, Q = kronecker_svd(M, (6, 1), (1, 5), 3)
    for ours, oracle in zip((P[:, :, 0].mT, S, Q[:, 0]), truncated_svd(M, 3)):
        torch.testing.assert_close(ours, oracle, atol=1e-12, rtol=0)


def test_batch_and_odd_input():
    M = Random("M").normal((2, 10, 12), dtype=torch.float64)
    P, S, Q = kronecker_svd(M, P_SHAPE, Q_SHAPE, 6)
    for i in (0, 1):
        torch.testing.assert_close(total(P[i], S[i], Q[i]), M[i], atol=1e-12, rtol=0)
    assert kronecker_svd(torch.zeros(10, 12), P_SHAPE, Q_SHAPE, 1)[1].tolist() == [0.0]
    assert kronecker_svd(M[0].bfloat16(), P_SHAPE, Q_SHAPE, 1)[0].dtype == torch.float32
    with pytest.raises(OptionError, match="is 10 x 12, but M is 12 x 10"):
        kronecker_svd(M[0].mT, P_SHAPE, Q_SHAPE, 1)
    with pytest.raises(OptionError, match="rank 7"):
        kronecker_svd(M[0], P_SHAPE, Q_SHAPE, 7)
    with pytest.raises(NumericError):
        kronecker_svd(torch.full((10, 12), float("inf")), P_SHAPE, Q_SHAPE, 1)
