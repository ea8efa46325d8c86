"""Sketches and sketched least squares."""

import pytest
import torch

from rankfold.errors import NumericError, OptionError
from rankfold.linalg.random import Random
from rankfold.linalg.sketches import lstsq_sketched, sketch

KINDS = ["gaussian", "srht", "countsketch", "sparse"]


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_matrix(kind):
    S = sketch(kind, 6, 21, Random("S"))
    dense = S.dense().double()
    assert S.shape == tuple(dense.shape) == (6, 21)
    A, X = Random("A").normal((21, 4), dtype=torch.float64), Random("X").normal((2, 3, 21), dtype=torch.float64)
    G = Random("G").normal((2, 3, 6), dtype=torch.float64)
    torch.testing.assert_close(S.apply(A), dense @ A, atol=1e-6, rtol=0)
    torch.testing.assert_close(S.matmul(X), X @ dense.mT, atol=1e-6, rtol=0)
    torch.testing.assert_close(S.rmatmul(G), G @ dense, atol=1e-6, rtol=0)
    torch.testing.assert_close(S.dense(), sketch(kind, 6, 21, Random("S")).dense())


@pytest.mark.parametrize("kind", KINDS)
def test_expectation_of_the_gram_matrix_is_the_identity(kind):
    grams = torch.stack([(lambda S: S.mT @ S)(sketch(kind, 8, 12, Random("E", i)).dense()) for i in range(600)])
    deviation = (grams.mean(0) - torch.eye(12)).abs()
    error = grams.std(0) / 600**0.5
    assert (deviation <= 5 * error + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_subspace_keeps_its_norms(kind):
    Q = torch.linalg.qr(Random("Q").normal((2000, 5), dtype=torch.float64)).Q
    S = torch.linalg.svdvals(sketch(kind, 400, 2000, Random("embed")).apply(Q))
    assert 0.7 < S[-1] < S[0] < 1.3


def test_srht_of_full_size_is_an_isometry():
    S = sketch("srht", 16, 12, Random("full")).dense()
    torch.testing.assert_close(S.mT @ S, torch.eye(12), atol=1e-6, rtol=0)


def test_srht_keeps_a_vector_that_is_itself_a_row_of_the_hadamard_matrix():
    """Without the random signs all of it falls into one row, which is seldom kept."""
    constant = torch.full((256, 1), 1 / 16.0)
    norms = torch.tensor([float(sketch("srht", 64, 256, Random("row", i)).apply(constant).norm()) for i in range(20)])
    assert ((norms > 0.6) & (norms < 1.4)).all()


def test_counts_of_nonzeros():
    assert (sketch("countsketch", 9, 100).dense() != 0).sum(0).tolist() == [1] * 100
    assert int((sketch("sparse", 9, 100).dense() != 0).sum()) == 90  # 9·√100
    assert set(sketch("countsketch", 9, 100).dense().unique().tolist()) == {-1.0, 0.0, 1.0}


def test_dense_sketches_bound_the_largest_entry_and_countsketch_does_not():
    """A = [I; 0], b = e_{d+1}: the true x is 0; one collision in a count sketch puts an error of 1 into one entry."""
    n, d, m = 1024, 8, 128
    A, b = torch.eye(n, d, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    b[d] = 1.0
    worst = {"srht": 0.0, "countsketch": 0.0}
    for kind in worst:
        for draw in range(60):
            S = sketch(kind, m, n, Random("linf", draw))
            x = torch.linalg.lstsq(S.apply(A), S.apply(b.unsqueeze(1))).solution
            worst[kind] = max(worst[kind], float(x.abs().max()))
    assert worst["srht"] < 0.45
    assert worst["countsketch"] >= 0.45


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [(), (3,)])
def test_lstsq_reaches_full_accuracy_whatever_the_condition(kind, columns):
    A = Random("A").normal((300, 8), dtype=torch.float64) * torch.logspace(0, -6, 8, dtype=torch.float64)
    b = Random("b").normal((300, *columns), dtype=torch.float64)
    x = lstsq_sketched(A, b, kind)
    oracle = torch.linalg.lstsq(A, b.reshape(300, -1)).solution.reshape(8, *columns)
    torch.testing.assert_close(x, oracle, rtol=1e-6, atol=1e-6)


def test_conjugate_directions_need_few_products():
    """The preconditioned condition number is about 3: conjugate gradients halve the error at least, steepest descent does not."""
    A, b = Random("A").normal((400, 20), dtype=torch.float64), Random("b").normal((400,), dtype=torch.float64)
    lstsq_sketched(A, b, max_iterations=60)


def test_rank_deficient_gives_the_least_norm_solution():
    A = Random("l").normal((60, 3), dtype=torch.float64) @ Random("r").normal((3, 6), dtype=torch.float64)
    b = Random("b").normal((60,), dtype=torch.float64)
    torch.testing.assert_close(lstsq_sketched(A, b), torch.linalg.pinv(A) @ b, atol=1e-8, rtol=0)


def test_an_operator_needs_products_only():
    from rankfold.linalg import Dense

    A, b = Random("A").normal((80, 5), dtype=torch.float64), Random("b").normal((80,), dtype=torch.float64)
    torch.testing.assert_close(lstsq_sketched(Dense(A), b), torch.linalg.lstsq(A, b.unsqueeze(1)).solution[:, 0])


def test_lstsq_odd_input():
    assert lstsq_sketched(torch.zeros(5, 2), torch.ones(5)).tolist() == [0.0, 0.0]
    assert lstsq_sketched(torch.eye(3, 2), torch.zeros(3)).tolist() == [0.0, 0.0]
    assert lstsq_sketched(torch.ones(4, 1, dtype=torch.bfloat16), torch.ones(4)).tolist() == [1.0]
    assert lstsq_sketched(torch.zeros(4, 0), torch.ones(4)).shape == (0,)
    with pytest.raises(OptionError, match="A must be tall"):
        lstsq_sketched(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(OptionError, match=r"b \[4\]"):
        lstsq_sketched(torch.ones(3, 2), torch.ones(4))
    with pytest.raises(NumericError, match="b: "):
        lstsq_sketched(torch.ones(3, 2), torch.full((3,), float("nan")))
    with pytest.raises(NumericError, match="raise factor or tol"):
        lstsq_sketched(Random("A").normal((50, 6)), torch.ones(50), max_iterations=1)


def test_sketch_refusals():
    with pytest.raises(OptionError, match='use "gaussian"'):
        sketch("magic", 2, 3)
    with pytest.raises(OptionError, match="at most 4 rows"):
        sketch("srht", 5, 3)
    with pytest.raises(OptionError, match="0 x 3"):
        sketch("gaussian", 0, 3)
