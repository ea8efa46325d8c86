"""The default starts: the base's function, the first gradient of LoRA, the laws' variances."""

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.core import Site
from rankfold.errors import CompositionError
from rankfold.linalg.random import Random
from rankfold.methods.inits.gaussian import Gaussian
from rankfold.training.contracts import InitContext, Roles


def net(width=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 6)).double()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_it_starts_at_the_base_with_the_gradient_of_b_alone(init):
    model, x = net(), torch.randn(7, 10, dtype=torch.float64)
    before = model(x)
    handle = rf.adapt(model, f"lora+init:{init}", rank=3, alpha=6)
    assert torch.equal(model(x), before)
    A, B = (handle.store.tensor(f"default/2/{n}") for n in "AB")
    h = model[1](model[0](x))
    model(x).square().sum().backward()
    G = 2 * before.detach().mT @ h.detach()  # ∂L/∂W of the last layer
    torch.testing.assert_close(B.grad, 2.0 * G @ A.detach().mT, rtol=1e-10, atol=0)
    assert A.grad.abs().sum() == 0
    assert A.abs().min() > 0


def test_variances():
    model = nn.Sequential(nn.Linear(512, 600))
    A = rf.adapt(model, "lora", rank=16).tensors()["default/0/A"].detach()
    assert 0.9 < float(A.var()) * 3 * 512 < 1.1
    assert float(A.abs().max()) <= 512**-0.5
    model = nn.Sequential(nn.Linear(512, 600))
    A = rf.adapt(model, "lora+init:gaussian", rank=16).tensors()["default/0/A"].detach()
    assert 0.95 < float(A.std()) * 16 < 1.05


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_an_embedding_starts_the_other_way_round(init):
    model = nn.Sequential(nn.Embedding(50, 12))
    ids = torch.arange(50)
    before = model(ids)
    handle = rf.adapt(model, f"lora+init:{init}", rank=4, targets=["0"])
    tensors = handle.tensors()
    assert tensors["default/0/A"].abs().sum() == 0
    assert 0.7 < float(tensors["default/0/B"].detach().std()) < 1.3
    assert torch.equal(model(ids), before)


def test_sites_start_differently_and_runs_alike():
    first, second = (rf.adapt(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), "lora", rank=3).tensors() for _ in range(2))
    assert torch.equal(first["default/0/A"], second["default/0/A"])
    assert not torch.equal(first["default/0/A"], first["default/1/A"])


def test_a_start_off_zero_needs_a_gate_and_closes_it():
    with pytest.raises(CompositionError, match="gate"):
        rf.method("lora+init:gaussian", **{"gaussian.std_b": 0.1})
    model, x = net(), torch.randn(7, 10, dtype=torch.float64)
    before = model(x)
    handle = rf.adapt(model, "gate+lora+init:gaussian", rank=3, **{"gate.per": "rank", "gaussian.std_b": 0.1})
    assert torch.equal(model(x), before)
    assert 0.03 < float(handle.tensors()["default/0/B"].detach().std()) < 0.3
    model(x).square().sum().backward()
    assert handle.store.tensor("default/0/gate").grad.abs().min() > 0, "the gate learns from the first step"


def test_a_gaussian_of_its_own_width():
    roles = Roles({"B": (400, 50), "A": (50, 300)}, rank=50, scale=1.0)
    A = Gaussian(std=0.3).fill(Site("s", (400, 300)), None, roles, InitContext(Random(0)))["A"]
    assert 0.29 < float(A.std()) < 0.31
