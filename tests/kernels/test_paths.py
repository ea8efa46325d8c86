"""Which form runs where, and that no form waits for the device."""

import pytest
import torch

import rankfold as rf
from rankfold.core import planner
from rankfold.kernels import path_for
from rankfold.linalg import flags


def adapted(method, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.Tanh(), torch.nn.Linear(33, 18))
    adaptation = rf.adapt(model, method, **options)
    with torch.no_grad():
        for p in adaptation.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, adaptation


def outcome(model, adaptation, x):
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *adaptation.parameters()])]


def test_a_cpu_runs_the_reference():
    assert path_for(torch.device("cpu")) is None
    assert path_for(torch.device("meta")) is None


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "magnitude+lora+init:pissa"])
def test_a_model_on_the_triton_path(method, monkeypatch):
    """Chosen when the programs are made, and the same function with the same gradients."""
    pytest.importorskip("triton")
    from rankfold.kernels.triton import magnitude as path

    if torch.cuda.is_available():
        pytest.skip("not interpreted here: a model on the GPU takes this path by itself")
    model, adaptation = adapted(method, rank=5)
    x = torch.randn(3, 7, 20)
    expected = outcome(model, adaptation, x)
    chosen = []
    monkeypatch.setattr(planner, "path_for", lambda device: chosen.append(device) or path)
    adaptation.store.version += 1
    found = outcome(model, adaptation, x)
    outcome(model, adaptation, x)
    assert len(chosen) == 2, "once for each site"
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert not other.any() or not torch.equal(one, 2.0 * other)


def refuse_to_wait(monkeypatch):
    """A tensor that is asked for its values, as any host that waits for a device does."""

    def asked(self, *args):
        raise AssertionError("asked for a value")

    for name in ("nonzero", "__bool__", "item", "tolist", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, asked)


@pytest.mark.parametrize("vanish", [0, 3, 16])
def test_an_accelerator_is_asked_nothing(vanish, monkeypatch):
    """Rows that cancel and gains that vanish, up to 16: the same numbers as on a device that may be asked."""
    model, adaptation = adapted("dora", rank=18, targets=["2"])
    t = adaptation.slots()[0].t(adaptation.store)
    with torch.no_grad():
        W = model[2].weight
        t.m[:vanish] = 0.0
        t.A.copy_(torch.randn(18, 33))
        t.B[:vanish] = -torch.linalg.lstsq(t.A.T, W[:vanish].T).solution.T  # the part of W in the row space of A is gone
    x = torch.randn(40, 20)
    expected = outcome(model, adaptation, x)
    monkeypatch.setattr(flags, "ASKED", frozenset())
    refuse_to_wait(monkeypatch)
    found = outcome(model, adaptation, x)
    monkeypatch.undo()
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_more_rows_than_can_be_seen_to_learn_in_turn(monkeypatch):
    """Where all 18 gains are zero, 16 get their gradient in the first step and none is NaN."""
    model, adaptation = adapted("dora", rank=4, targets=["2"])
    m = adaptation.slots()[0].t(adaptation.store).m
    with torch.no_grad():
        m.zero_()
    x, g = torch.randn(40, 20), torch.randn(40, 18)
    whole = torch.autograd.grad(model(x), m, g)[0]
    monkeypatch.setattr(flags, "ASKED", frozenset())
    some = torch.autograd.grad(model(x), m, g)[0]
    assert (some != 0).sum() == 16
    torch.testing.assert_close(some[some != 0], whole[some != 0])
