"""LDU with a permutation vector."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.errors import NumericError
from rankfold.linalg.lu import lu
from rankfold.linalg.random import Random


@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_ldu_form(m, n, seed):
    M = Random("lu", seed).normal((m, n), dtype=torch.float64)
    f = lu(M)
    torch.testing.assert_close((f.L * f.d) @ f.U, M[f.permutation], atol=1e-12, rtol=0)
    torch.testing.assert_close(f.dense(), M, atol=1e-12, rtol=0)
    torch.testing.assert_close((f.unpermuted() * f.d) @ f.U, M, atol=1e-12, rtol=0)
    assert f.permutation.sort().values.tolist() == list(range(m))
    assert torch.equal(f.L, f.L.tril())
    assert torch.equal(f.U, f.U.triu())
    assert (f.L.diagonal() == 1).all()
    assert f.L.abs().max() <= 1
    assert f.regular.all()
    assert (f.U.diagonal() == 1).all()


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_rank_deficient_keeps_the_product_and_marks_the_pivots(shape):
    M = Random("l").normal((shape[0], 3), dtype=torch.float64) @ Random("r").normal((3, shape[1]), dtype=torch.float64)
    f = lu(M)
    torch.testing.assert_close(f.dense(), M, atol=1e-12, rtol=0)
    assert f.regular.tolist() == [True] * 3 + [False] * 3
    assert f.U.abs().max() < 1e6


def test_a_zero_pivot_beside_entries():
    M = torch.tensor([[0.0, 2.0, 4.0], [0.0, 0.0, 8.0]])
    f = lu(M)
    torch.testing.assert_close(f.dense(), M)
    assert f.U.abs().max() <= 1


def test_odd_input():
    assert lu(torch.zeros(3, 2)).dense().tolist() == [[0.0, 0.0]] * 3
    assert lu(torch.zeros(0, 2)).dense().shape == (0, 2)
    assert lu(torch.zeros(2, 0)).permutation.tolist() == [0, 1]
    assert lu(torch.tensor([[2.0, 4.0]])).U.tolist() == [[1.0, 2.0]]
    half = Random("half").normal((5, 4)).to(torch.bfloat16)
    torch.testing.assert_close(lu(half).dense(), half.float())
    with pytest.raises(NumericError, match="M: 1 of 4"):
        lu(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
