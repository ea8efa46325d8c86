"""Nyström factors."""

import pytest
import torch

from rankfold.errors import NumericError, OptionError
from rankfold.linalg.nystrom import nystrom
from rankfold.linalg.random import Random

M_, N_, R = 12, 9, 3


def low_rank(noise=0.0):
    left, right = Random("l").normal((M_, R), dtype=torch.float64), Random("r").normal((R, N_), dtype=torch.float64)
    return left @ right + noise * Random("noise").normal((M_, N_), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["pinv", "pivoted"])
def test_a_matrix_of_that_rank_is_recovered(mode):
    W = low_rank()
    B, N, A = nystrom(W, R, mode)
    assert (B.shape, N.shape, A.shape) == ((M_, R), (R, R), (R, N_))
    torch.testing.assert_close(B @ N @ A, W, atol=1e-8, rtol=0)


def test_block_mode_is_the_published_code():
    W = Random("W").normal((M_, N_))
    B, N, A = nystrom(W, R, "block")
    assert torch.equal(B, W[:, :R])
    assert torch.equal(N, W[:R, :R])
    assert torch.equal(A, W[:R])
    B.zero_(), A.zero_(), N.zero_()
    assert W.abs().min() > 0  # the factors are copies: writing to them leaves W alone


def test_a_truncated_pseudo_inverse_is_better_on_noise():
    """Rank 3 plus noise, cut at 6: the small singular values of the block are noise, and inverting them is worse."""
    W = low_rank(noise=1e-2)
    error = lambda rcond: float((lambda B, N, A: (B @ N @ A - W).norm())(*nystrom(W, 6, rcond=rcond)))
    assert error(2e-2) < 0.7 * error(0.0)


def test_pivots_choose_better_rows_than_the_first():
    W = low_rank(noise=1e-2)
    W[:R] *= 1e-2  # the first rows say little
    error = lambda mode: float((lambda B, N, A: (B @ N @ A - W).norm())(*nystrom(W, R, mode)))
    assert error("pivoted") < 0.2 * error("pinv")
    assert error("pivoted") < 4 * float(torch.linalg.svdvals(W)[R:].norm())


def test_odd_input():
    B, N, A = nystrom(torch.zeros(4, 3), 2)
    assert (B @ N @ A).abs().sum() == 0
    assert [t.shape for t in nystrom(torch.ones(4, 3), 0)] == [(4, 0), (0, 0), (0, 3)]
    assert nystrom(torch.ones(4, 3, dtype=torch.bfloat16), 1)[1].dtype == torch.float32
    with pytest.raises(OptionError, match="rank 4 of a 5 x 3"):
        nystrom(torch.ones(5, 3), 4)
    with pytest.raises(OptionError, match='use "pinv"'):
        nystrom(torch.ones(5, 3), 1, "svd")
    with pytest.raises(NumericError, match="W: "):
        nystrom(torch.full((5, 3), float("nan")), 1)
