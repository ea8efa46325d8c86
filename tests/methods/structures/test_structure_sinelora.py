"""SineLoRA and LoRAN: a sine of the product, entry by entry; rank, slopes, starts."""

import pytest
import torch
from structure_checks import attached, check_definition, check_start, gradients, inputs, tensors

import rankfold as rf
from rankfold.methods.structures.sinelora import SineLoRA


@pytest.mark.parametrize("gain", [None, 0.2])
def test_is_the_sine_of_the_product(gain):
    def weight(W, t):
        return W + (len(W) ** -0.5 if gain is None else gain) * torch.sin(3.0 * t.B @ t.A)

    check_definition(SineLoRA(rank=3, frequency=3, gain=gain), weight, runs=("effective", "plain"))


def test_loran_bends_the_product():
    weight = lambda W, t: W + t.B @ t.A + 0.3 * torch.sin(4.0 * t.B @ t.A) * (t.B @ t.A)
    check_definition(SineLoRA(rank=3, form="loran", frequency=4, gain=0.3), weight, runs=("effective", "plain"))
    assert rf.method("loran").structure.frequency == 1000


@pytest.mark.parametrize("form", ["sine", "loran"])
def test_starts_at_the_base_and_the_first_gradient_reaches_b_alone(form):
    check_start(SineLoRA(rank=4, form=form))
    model, store = attached(SineLoRA(rank=4, form=form))
    for t in tensors(store):
        gB, gA = gradients(model(inputs()), [t.B, t.A])
        assert gB.abs().max() > 0
        assert gA.abs().max() == 0


def test_its_rank_is_not_that_of_the_factors_and_no_gain_is_lora():
    _, store = attached(SineLoRA(rank=1, frequency=30))
    slot, t = next(iter(store.members["a"].slots.values())), tensors(store)[0]
    t.B.data.normal_(generator=torch.Generator().manual_seed(0))
    change = slot.weight(t).terms[1]
    assert int(torch.linalg.matrix_rank(change.dense())) >= 10
    bare = SineLoRA(rank=1, form="loran", gain=0.0).delta(t, slot.site)
    torch.testing.assert_close(bare.dense(), t.B @ t.A)
