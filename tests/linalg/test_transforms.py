"""Cosine and Hadamard bases."""

import pytest
import torch
from scipy.fft import dct
from scipy.linalg import hadamard

from rankfold.errors import OptionError
from rankfold.linalg.random import Random
from rankfold.linalg.transforms import dct_matrix, hadamard_transform


@pytest.mark.parametrize("n", [1, 2, 7, 64, 513])
def test_dct_matrix_is_scipys_and_orthonormal(n):
    C = dct_matrix(n, torch.float64)
    x = Random("x").normal((n,), dtype=torch.float64)
    torch.testing.assert_close(C @ x, torch.from_numpy(dct(x.numpy(), norm="ortho")), atol=1e-12, rtol=0)
    torch.testing.assert_close(C @ C.mT, torch.eye(n, dtype=torch.float64), atol=1e-13, rtol=0)
    assert dct_matrix(0).shape == (0, 0)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_hadamard_is_scipys(n):
    X = Random("X").normal((3, 2, n), dtype=torch.float64)
    H = torch.from_numpy(hadamard(n)).double()
    torch.testing.assert_close(hadamard_transform(X), X @ H, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [0, 3, 12])
def test_hadamard_needs_a_power_of_two(n):
    with pytest.raises(OptionError, match=f"{n} entries"):
        hadamard_transform(torch.zeros(2, n))
