"""Folding builds each W' once: counted, not timed."""

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.core import folding
from rankfold.core.base import DenseBase


@pytest.fixture
def adaptation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9))
    adaptation = rf.adapt(model, "lora", rank=2, targets=["0", "2[q]", "2[v]"])
    for k, p in enumerate(adaptation.parameters()):
        p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(k))
    return adaptation


@pytest.fixture
def counts(monkeypatch):
    """How often a site's W' was built, and how often a dense W was asked for."""
    found = {"built": 0, "dense": 0}

    def counted(owner, name, what):
        native = getattr(owner, name)

        def call(*args, **kwargs):
            found[what] += 1
            return native(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(folding, "fold_weight", "built")
    counted(DenseBase, "dense", "dense")
    return found


def test_fold_builds_each_changed_weight_once(adaptation, counts):
    errors = adaptation.fold()
    assert counts["built"] == 3  # the first site, and two slices of the second
    assert counts["dense"] <= 4, "W is read once to build W' and, where it is not a slice, once for the size of the change"
    assert set(errors) == {"0", "2"}


def test_folded_weights_are_those_that_fold_puts_in(adaptation, counts):
    weights = adaptation.folded_weights()
    assert counts["built"] == 3
    adaptation.fold()
    assert {name: torch.equal(adaptation.model.get_parameter(name), W) for name, W in weights.items()} == {
        "0.weight": True,
        "2.weight": True,
    }


def test_the_error_is_measured_over_the_rows_that_change():
    """‖W'_stored − W'‖ / ‖W' − W‖ of a bf16 weight of which a third changes, by hand in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9).bfloat16())
    adaptation = rf.adapt(model, "lora", rank=2, targets=["0[k]"])
    for k, p in enumerate(adaptation.parameters()):
        p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(k))
    slot = adaptation.slots()[0]
    t = slot.t(adaptation.store)
    original = model[0].weight.detach()
    W = original.double()[3:6]
    change = slot.structure.scale * t.B.double() @ t.A.double()
    (error,) = adaptation.fold().values()
    stored = model[0].weight.detach().double()
    assert torch.equal(stored[:3], original.double()[:3])
    expected = ((stored[3:6] - (W + change)).norm() / change.norm()).item()
    assert error == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-4  # bf16 rounds


def test_u20_ten_folds_of_a_half_precision_base_change_no_bit():
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8)).bfloat16()
    before = {name: p.clone() for name, p in model.named_parameters()}
    adaptation = rf.adapt(model, "lora", rank=2)
    for p in adaptation.parameters():
        p.data += 0.3
    for _ in range(10):
        adaptation.fold()
        adaptation.unfold()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
