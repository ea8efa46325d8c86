"""HRA: reflections one after the other; exact start, lengths, export, peft."""

from types import SimpleNamespace

import pytest
import torch
from structure_checks import attached, check_against_peft, check_definition, check_start, inputs, move, same, slots, tensors

from rankfold.core import Site
from rankfold.errors import OptionError
from rankfold.linalg import Dense, Householder, difference
from rankfold.methods.structures.hra import HRA


def reflected(W, t):
    for u in t.U.T:
        W = W - 2 * (W @ u)[:, None] * u / u.dot(u)
    return W


@pytest.mark.parametrize("rank", [2, 6, 8])
def test_is_w_reflected_column_by_column(rank):
    check_definition(HRA(rank=rank), reflected, runs=("structured", "effective", "plain"))


def test_starts_at_the_base_bitwise():
    check_start(HRA(rank=8))


def test_equal_pairs_are_the_identity_bitwise_and_others_are_not():
    U = torch.randn(40, 3).repeat_interleave(2, 1)
    x = torch.randn(9, 40)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(Householder(U).matmul(x.to(dtype)), x.to(dtype))
    shuffled = Householder(U[:, [0, 2, 1, 3, 4, 5]])
    assert not torch.equal(shuffled.matmul(x), x)


def test_a_small_turn_is_exact_relative_to_its_angle():
    """In float32 the change itself, not only the result, is right to seven digits."""
    generator = torch.Generator().manual_seed(3)
    U = torch.randn(30, 4, generator=generator, dtype=torch.float64).repeat_interleave(2, 1)
    U = (U + 1e-4 * torch.randn(U.shape, generator=generator, dtype=torch.float64)).float()
    W = Dense(torch.randn(5, 30, generator=generator))
    truth = reflected(W.W.double(), SimpleNamespace(U=U.double())) - W.W.double()
    assert truth.norm() < 1e-2
    assert (difference(W @ Householder(U), W).dense() - truth).norm() < 1e-6 * truth.norm()


def test_keeps_the_length_of_rows_and_exports_as_a_lora_of_its_rank():
    _, store = attached(HRA(rank=4))
    move(store)
    slot, t = slots(store)[0], tensors(store)[0]
    expr = slot.weight(t)
    torch.testing.assert_close(expr.dense().norm(dim=1), slot.base.W.norm(dim=1), rtol=1e-12, atol=0)
    B, A, error = difference(expr, slot.base).to_lowrank()
    assert (B.shape[1], error) == (4, 0.0)
    torch.testing.assert_close(slot.base.W + B @ A, reflected(slot.base.W, t), rtol=1e-11, atol=1e-11)


def test_odd_rank_is_refused():
    with pytest.raises(OptionError, match="multiple of 2"):
        HRA(rank=3)


def test_orthogonality_term_is_the_gap_to_orthonormal_columns():
    _, store = attached(HRA(rank=4, orthogonality=0.5))
    move(store)
    t = {slot.site.key: slot.t(store) for slot in slots(store)}
    structure, sites = HRA(rank=4, orthogonality=0.5), [slot.site for slot in slots(store)]
    units = [u.U / u.U.norm(dim=0) for u in t.values()]
    expected = 0.5 * sum((torch.eye(4) - U.T @ U).square().sum() for U in units)
    torch.testing.assert_close(structure.objectives(t, sites)["orthogonality"], expected)
    assert HRA(rank=4).objectives(t, [Site("0", (20, 12))]) == {}


def test_agrees_with_peft():
    from peft import HRAConfig

    config = HRAConfig(r=4, target_modules=["0", "2"])
    check_against_peft(HRA(rank=4), config, lambda t, layer: [(t.U, layer.hra_u["default"], same)])


def test_first_gradient_reaches_every_column():
    model, store = attached(HRA(rank=4))
    (g,) = torch.autograd.grad(model(inputs()).square().sum(), [tensors(store)[0].U])
    assert (g.norm(dim=0) > 0).all()
