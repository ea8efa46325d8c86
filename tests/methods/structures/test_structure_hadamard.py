"""Hadamard (LoHa): the entrywise product of two low-rank matrices; rank, start, peft."""

import pytest
import torch
from structure_checks import (
    attached,
    check_against_peft,
    check_definition,
    check_start,
    gradients,
    inputs,
    move,
    same,
    slots,
    tensors,
)

from rankfold.methods.structures.hadamard import Hadamard


@pytest.mark.parametrize(
    "structure", [Hadamard(rank=1, alpha=2.5), Hadamard(rank=3, alpha=7.5), Hadamard(rank=6, alpha=15)], ids=str
)
def test_is_the_entrywise_product(structure):
    weight = lambda W, t: W + 2.5 * (t.B1 @ t.A1) * (t.B2 @ t.A2)
    check_definition(structure, weight, runs=("structured", "effective", "plain"), size=0.5)
    check_start(structure)


def test_first_gradient_reaches_the_zero_factor_alone():
    model, store = attached(Hadamard(rank=2))
    for t in tensors(store):
        g = dict(zip(t._fields, gradients(model(inputs()), list(t))))
        assert [n for n, v in g.items() if v.abs().max() > 0] == ["A2"]


def test_rank_is_squared():
    _, store = attached(Hadamard(rank=2))
    move(store)
    slot, t = slots(store)[0], tensors(store)[0]
    assert torch.linalg.matrix_rank(slot.weight(t).dense() - slot.base.W) == 4


def test_agrees_with_peft():
    from peft import LoHaConfig

    def pair(t, layer):
        names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
        return [(getattr(t, ours), getattr(layer, theirs)["default"], same) for ours, theirs in names.items()]

    check_against_peft(Hadamard(rank=3, alpha=6), LoHaConfig(r=3, alpha=6, target_modules=["0", "2"]), pair, size=0.5)
