"""Signs, splits and rank accounting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.errors import OptionError
from rankfold.linalg.factors import break_even, rank_for_ratio, sign_fix, split
from rankfold.linalg.random import Random


@pytest.mark.parametrize("side", ["U", "V"])
def test_sign_fix_keeps_the_product_and_undoes_any_flip(side):
    U, Vh = Random("U").normal((3, 7, 4)), Random("V").normal((3, 4, 5))
    fixed = sign_fix(U, Vh, side)
    torch.testing.assert_close(fixed[0] @ fixed[1], U @ Vh)
    flips = Random("flip").signs((3, 1, 4))
    for ours, other in zip(fixed, sign_fix(U * flips, Vh * flips.mT, side)):
        assert torch.equal(ours, other)
    looked_at = fixed[0].mT if side == "U" else fixed[1]
    assert (looked_at.gather(-1, looked_at.abs().argmax(-1, keepdim=True)) > 0).all()


def test_sign_fix_of_nothing_and_of_zero():
    assert sign_fix(torch.zeros(4, 0), torch.zeros(0, 3))[0].shape == (4, 0)
    U, Vh = sign_fix(torch.zeros(4, 1), torch.tensor([[-1.0]]))
    assert Vh.tolist() == [[-1.0]]
    assert U.abs().sum() == 0
    with pytest.raises(OptionError, match="side 'left'"):
        sign_fix(U, Vh, "left")


@pytest.mark.parametrize("balance", ["UV", "U", "V"])
def test_split(balance):
    U, S, Vh = Random("U").haar(6, 3), torch.tensor([4.0, 1.0, 0.0]), Random("V").haar(3, 5)
    B, A = split(U, S, Vh, balance)
    torch.testing.assert_close(B @ A, U * S @ Vh)
    norms = {"UV": (S.sqrt(), S.sqrt()), "U": (S, torch.ones(3)), "V": (torch.ones(3), S)}[balance]
    torch.testing.assert_close(B.norm(dim=0), norms[0])
    torch.testing.assert_close(A.norm(dim=1), norms[1])
    with pytest.raises(OptionError, match="balance"):
        split(U, S, Vh, "W")


@settings(deadline=None, max_examples=60)
@given(ratio=st.floats(0.01, 2), out=st.integers(1, 500), in_=st.integers(1, 500), align=st.sampled_from([1, 8, 64]))
def test_rank_for_ratio_keeps_its_budget_or_the_matrix(ratio, out, in_, align):
    rank = rank_for_ratio(ratio, out, in_, align)
    if rank is None:
        nearest = max(1, int(ratio * break_even(out, in_)))
        assert (nearest + align - 1) * (out + in_) >= out * in_
        return
    assert rank >= 1
    assert rank % align == 0
    assert rank * (out + in_) < out * in_  # it pays
    if align == 1 and rank > 1:
        assert rank * (out + in_) <= ratio * out * in_ < (rank + 1) * (out + in_)


def test_rank_for_ratio_refuses():
    with pytest.raises(OptionError, match="ratio 0"):
        rank_for_ratio(0, 4, 4)
    with pytest.raises(OptionError, match="ratio nan"):
        rank_for_ratio(float("nan"), 4, 4)
    with pytest.raises(OptionError, match="align 0"):
        rank_for_ratio(0.5, 4, 4, align=0)
