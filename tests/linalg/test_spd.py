"""Functions of positive definite matrices."""

import pytest
import torch

from rankfold.errors import NumericError, OptionError
from rankfold.linalg.random import Random
from rankfold.linalg.spd import cholesky_damped, inverse_sqrt, spd_power, spd_sqrt


def gram(n=6, tokens=20, dtype=torch.float64):
    X = Random("X").normal((tokens, n), dtype=dtype)
    return X.mT @ X


def test_powers():
    H = gram()
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(spd_sqrt(H) @ spd_sqrt(H), H, atol=1e-10, rtol=0)
    torch.testing.assert_close(inverse_sqrt(H) @ H @ inverse_sqrt(H), eye, atol=1e-10, rtol=0)
    torch.testing.assert_close(spd_power(H, -1), torch.linalg.inv(H), atol=1e-10, rtol=0)
    torch.testing.assert_close(spd_power(H, 1.5), H @ spd_sqrt(H), atol=1e-8, rtol=0)
    torch.testing.assert_close(spd_power(torch.stack([H, 2 * H]), 0.5)[1], 2**0.5 * spd_sqrt(H), atol=1e-10, rtol=0)


def test_float32_input_is_worked_in_float64():
    H = gram(dtype=torch.float32)
    root = spd_sqrt(H)
    assert root.dtype == torch.float32
    torch.testing.assert_close(root, spd_sqrt(H.double()).float(), atol=1e-5, rtol=1e-5)
    assert spd_sqrt(H.bfloat16().mT.add(H.bfloat16()) / 2).dtype == torch.float32


def test_floor_bounds_and_pseudo_inverts():
    """Three tokens in six dimensions: floor·λ_max replaces the zeros; floor 0 gives the pseudo-inverse."""
    H = gram(tokens=3)
    largest = torch.linalg.eigvalsh(H)[-1]
    torch.testing.assert_close(torch.linalg.eigvalsh(spd_power(H, -1, floor=1e-4))[-1], 1e4 / largest, rtol=1e-6, atol=0)
    torch.testing.assert_close(spd_power(H, -1, floor=0), torch.linalg.pinv(H, hermitian=True), atol=1e-9, rtol=0)
    torch.testing.assert_close(spd_sqrt(H) @ spd_sqrt(H), H, atol=1e-9, rtol=0)


def test_cholesky_damped():
    H = gram()
    L, used = cholesky_damped(H, 1e-3)
    assert used == 1e-3
    torch.testing.assert_close(L @ L.mT, H + 1e-3 * H.trace() / 6 * torch.eye(6, dtype=torch.float64), atol=1e-10, rtol=0)
    assert torch.equal(L, L.tril())
    assert cholesky_damped(H, 0)[1] == 0.0
    scaled, again = cholesky_damped(1e9 * H, 1e-3)  # relative: nothing changes but the scale
    assert again == 1e-3
    torch.testing.assert_close(scaled, 1e9**0.5 * L, rtol=1e-9, atol=1e-6)


def test_damping_grows_until_it_suffices():
    H = torch.diag(torch.tensor([1.0, 1.0, -1e-3], dtype=torch.float64))
    L, used = cholesky_damped(H, 1e-6)
    assert used == pytest.approx(1e-2)
    assert L.isfinite().all()
    with pytest.raises(NumericError, match="indefinite"):
        cholesky_damped(torch.diag(torch.tensor([3.0, -2.0])))


@pytest.mark.parametrize("call", [spd_sqrt, cholesky_damped])
def test_bad_input(call):
    with pytest.raises(OptionError, match="not symmetric"):
        call(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(OptionError, match="must be square"):
        call(torch.ones(2, 3))
    with pytest.raises(NumericError, match="H: 1 of 4"):
        call(torch.tensor([[1.0, 0.0], [0.0, float("nan")]]))


def test_zero_and_empty():
    assert spd_sqrt(torch.zeros(3, 3)).abs().sum() == 0
    assert spd_sqrt(torch.zeros(0, 0)).shape == (0, 0)
    assert cholesky_damped(torch.zeros(0, 0))[0].shape == (0, 0)
    with pytest.raises(NumericError, match=r"power -0\.5"):
        inverse_sqrt(torch.zeros(3, 3))
    with pytest.raises(NumericError, match="trace 0"):
        cholesky_damped(torch.zeros(3, 3))
    with pytest.raises(OptionError, match="damping"):
        cholesky_damped(torch.eye(3), -1.0)
