"""HiRA: W + W ∘ (s·B A); start, offset, high rank, peft."""

import pytest
import torch
from structure_checks import attached, check_against_peft, check_definition, check_start, inputs, move, same, slots, tensors

from rankfold.core import Offset
from rankfold.linalg import difference
from rankfold.methods.structures.hira import HiRA


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_is_w_times_one_plus_s_b_a(alpha):
    s = 1.0 if alpha is None else 2.0
    check_definition(HiRA(rank=3, alpha=alpha), lambda W, t: W + W * (s * t.B @ t.A), runs=("effective", "plain"))


def test_starts_at_the_base():
    check_start(HiRA(rank=4))


def test_as_an_offset_it_starts_at_the_base_and_moves_by_the_difference():
    structure = Offset(inner=HiRA(rank=3))
    model, store = attached(structure)
    base = model(inputs())
    with torch.no_grad():
        for t in tensors(store):
            for now, then in ((t.B, t.B0), (t.A, t.A0)):
                now.normal_()
                then.copy_(now)
    for plan in ("effective", "plain"):
        store.plan = plan
        torch.testing.assert_close(model(inputs()), base, rtol=0, atol=1e-15)
    change = difference(slots(store)[0].weight(tensors(store)[0]), slots(store)[0].base).dense()
    assert torch.equal(change, torch.zeros_like(change))
    check_definition(structure, lambda W, t: W + W * (t.B @ t.A - t.B0 @ t.A0), runs=("effective", "plain"), size=0.6)


def test_change_of_rank_one_factors_has_full_rank_and_keeps_zeros():
    model, store = attached(HiRA(rank=1))
    with torch.no_grad():
        model[0].weight[:, 3] = 0
    move(store)
    slot, t = slots(store)[0], tensors(store)[0]
    change = slot.weight(t).dense() - model[0].weight
    assert torch.linalg.matrix_rank(change) == 11  # the zero column stays
    assert change[:, 3].abs().max() == 0


def test_agrees_with_peft():
    from peft import HiraConfig

    def pair(t, layer):
        return [(t.A, layer.hira_A["default"], same), (t.B, layer.hira_B["default"], same)]

    check_against_peft(HiRA(rank=4), HiraConfig(r=4, target_modules=["0", "2"]), pair)
