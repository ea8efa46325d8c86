"""Weighted SVD: the oracles of ASVD, SVD-LLM and FWSVD, and what singular weights mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.errors import NumericError, OptionError
from rankfold.linalg.decompositions import truncated_svd
from rankfold.linalg.factors import split
from rankfold.linalg.random import Random
from rankfold.linalg.weighted import weighted_svd

OUT, IN, RANK = 7, 5, 2


def product(U, S, Vh):
    return U * S @ Vh


@pytest.fixture
def M():
    return Random("M").normal((OUT, IN), dtype=torch.float64)


@pytest.fixture
def X():
    """Correlated inputs [tokens, in]."""
    return Random("X").normal((40, IN), dtype=torch.float64) @ Random("mix").normal((IN, IN), dtype=torch.float64)


def test_whitened_loss_is_the_tail_of_the_spectrum(M, X):
    """‖X (M - M̂)ᵀ‖_F² = Σ_{j>r} σ_j²(M L), L the Cholesky factor of XᵀX (SVD-LLM)."""
    L = torch.linalg.cholesky(X.mT @ X)
    U, S, Vh = weighted_svd(M, RANK, right=L)
    sigma = torch.linalg.svdvals(M @ L)
    loss = (X @ (M - product(U, S, Vh)).mT).square().sum()
    torch.testing.assert_close(loss, sigma[RANK:].square().sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(S, sigma[:RANK], rtol=1e-12, atol=0)
    plain = (X @ (M - product(*truncated_svd(M, RANK))).mT).square().sum()
    assert loss < 0.9 * plain


def test_every_factor_of_one_gram_matrix_gives_one_product(M, X):
    """Cholesky (lower and upper), eigenvectors, symmetric root, and the inputs themselves."""
    H = X.mT @ X
    values, Q = torch.linalg.eigh(H)
    L = torch.linalg.cholesky(H)
    reference = product(*weighted_svd(M, RANK, right=L))
    flip = torch.arange(IN - 1, -1, -1)
    upper = torch.linalg.cholesky(H[flip][:, flip])[flip][:, flip]  # H = R Rᵀ with R upper triangular
    assert torch.equal(upper, upper.triu())
    for R in (Q * values.sqrt(), (Q * values.sqrt()) @ Q.mT, upper, X.mT):
        torch.testing.assert_close(product(*weighted_svd(M, RANK, right=R)), reference, atol=1e-10, rtol=0)


def test_a_gram_matrix_proportional_to_the_identity_gives_the_plain_svd(M):
    plain = product(*truncated_svd(M, RANK))
    for weight in (3.0 * torch.eye(IN, dtype=torch.float64), torch.full((IN,), 3.0, dtype=torch.float64)):
        torch.testing.assert_close(product(*weighted_svd(M, RANK, right=weight)), plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(product(*weighted_svd(M, RANK)), plain, atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4))
def test_two_sided_diagonal_weights(seed, rank):
    """Weighted loss at most, plain loss at least, that of the plain SVD; equal to the tail; scaling changes nothing."""
    M = Random("M", seed).normal((OUT, IN), dtype=torch.float64)
    d, e = (Random(k, seed).uniform((n,), 0.1, 3.0, torch.float64) for k, n in (("d", OUT), ("e", IN)))
    ours, plain = product(*weighted_svd(M, rank, d, e)), product(*truncated_svd(M, rank))
    weigh = lambda E: (d.unsqueeze(1) * E * e).norm()
    tail = torch.linalg.svdvals(d.unsqueeze(1) * M * e)[rank:].norm()
    torch.testing.assert_close(weigh(M - ours), tail, rtol=1e-9, atol=1e-12)
    assert weigh(M - ours) <= weigh(M - plain) * (1 + 1e-12)
    assert (M - plain).norm() <= (M - ours).norm() * (1 + 1e-12)
    torch.testing.assert_close(product(*weighted_svd(M, rank, 5 * d, e / 7)), ours, atol=1e-10, rtol=0)


def test_left_matrix_weights_the_outputs(M):
    """A transposed left factor would pass with symmetric weights, so this one is triangular."""
    Y = Random("Y").normal((30, OUT), dtype=torch.float64) @ Random("mixY").normal((OUT, OUT), dtype=torch.float64)
    L = torch.linalg.cholesky(Y.mT @ Y).mT  # LᵀL = YᵀY
    ours = product(*weighted_svd(M, RANK, left=L))
    torch.testing.assert_close((Y @ (M - ours)).norm(), torch.linalg.svdvals(L @ M)[RANK:].norm(), rtol=1e-9, atol=0)
    torch.testing.assert_close(product(*weighted_svd(M, RANK, left=Y)), ours, atol=1e-10, rtol=0)


def test_no_other_matrix_of_that_rank_does_better(M, X):
    """The definition itself: random perturbations of the factors never lower the loss."""
    B, A = split(*weighted_svd(M, RANK, right=X.mT))
    loss = lambda B, A: (X @ (M - B @ A).mT).square().sum()
    for i in range(30):
        dB, dA = (Random("perturb", i, k).normal(t.shape, 1e-3, torch.float64) for k, t in (("B", B), ("A", A)))
        assert loss(B + dB, A + dA) > loss(B, A)


class TestSingularWeights:
    def test_a_zero_weight_zeroes_its_column_and_keeps_the_rest_optimal(self, M):
        d = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5], dtype=torch.float64)
        ours = product(*weighted_svd(M, RANK, right=d))
        assert ours.isfinite().all()
        assert ours[:, 1].tolist() == [0.0] * OUT
        torch.testing.assert_close(((M - ours) * d).norm(), torch.linalg.svdvals(M * d)[RANK:].norm(), rtol=1e-9, atol=0)

    def test_fewer_tokens_than_inputs(self, M):
        X = Random("few").normal((3, IN), dtype=torch.float64)
        onto = torch.linalg.pinv(X) @ X
        ours = product(*weighted_svd(M, 3, right=X.mT))
        torch.testing.assert_close(ours, M @ onto, atol=1e-10, rtol=0)  # exact on the span of X, zero beside it
        H = X.mT @ X
        root = torch.linalg.eigh(H)
        R = root.eigenvectors * root.eigenvalues.clamp_min(0).sqrt()
        torch.testing.assert_close(product(*weighted_svd(M, 3, right=R)), ours, atol=1e-6, rtol=0)

    def test_rank_above_that_of_the_weight_is_padded_with_zeros(self, M):
        X = Random("few").normal((2, IN), dtype=torch.float64)
        U, S, Vh = weighted_svd(M, 4, right=X.mT)
        assert (U.shape, S.shape, Vh.shape) == ((OUT, 4), (4,), (4, IN))
        assert S[2:].tolist() == [0.0, 0.0]

    def test_a_singular_triangle_is_not_solved(self, M):
        R = torch.eye(IN, dtype=torch.float64)
        R[2, 2] = 0.0
        R[3, 2] = 1.0
        ours = product(*weighted_svd(M, IN - 1, right=R))
        torch.testing.assert_close(ours @ R, M @ R, atol=1e-10, rtol=0)

    def test_all_zero(self, M):
        assert product(*weighted_svd(M, RANK, right=torch.zeros(IN))).norm() == 0
        assert product(*weighted_svd(torch.zeros(OUT, IN), RANK, right=torch.ones(IN))).norm() == 0


def test_an_object_with_matmul_and_solve(M):
    R = Random("R").normal((IN, IN), dtype=torch.float64)

    class Factor:
        def matmul(self, x):
            return x @ R

        def solve(self, x):
            return x @ torch.linalg.inv(R)

    ours = product(*weighted_svd(M, RANK, right=Factor()))
    torch.testing.assert_close(ours, product(*weighted_svd(M, RANK, right=R)), atol=1e-10, rtol=0)
    ours = product(*weighted_svd(M.mT, RANK, left=Factor()))
    torch.testing.assert_close(ours, product(*weighted_svd(M.mT, RANK, left=R.mT)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_worked_in_float64_and_returned_in_float32(M, X, dtype):
    short = M.to(dtype)
    factors = weighted_svd(short, RANK, right=X.mT.float())
    assert {t.dtype for t in factors} == {torch.float32}
    oracle = weighted_svd(short.double(), RANK, right=X.mT.float().double())
    torch.testing.assert_close(product(*factors).double(), product(*oracle), atol=1e-5, rtol=0)


def test_refusals(M):
    with pytest.raises(OptionError, match=r"right has shape \[7\]; use a vector \[5\] or a matrix \[5, k\]"):
        weighted_svd(M, RANK, right=torch.ones(OUT))
    with pytest.raises(OptionError, match=r"left has shape \[5, 5\]; use a vector \[7\] or a matrix \[k, 7\]"):
        weighted_svd(M, RANK, left=torch.eye(IN))
    with pytest.raises(OptionError, match="rank 6"):
        weighted_svd(M, 6)
    with pytest.raises(NumericError, match=r"^right: "):
        weighted_svd(M, RANK, right=torch.full((IN,), float("nan")))
    with pytest.raises(NumericError, match=r"^M: "):
        weighted_svd(M * float("inf"), RANK)
