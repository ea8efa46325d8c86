"""Hosted modules as users find them: copies, pickles, casts, writes through `.data`, and a model that keeps its shape."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import rankfold as rf

METHODS = ["lora", "dora", "magnitude+hra", "lora+init:pissa"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))


@pytest.fixture
def x():
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


def shake(adaptation):
    for k, p in enumerate(adaptation.parameters()):
        p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(k))


@pytest.mark.parametrize("method", METHODS)
def test_writes_through_data_are_seen(model, x, method):
    adaptation = rf.adapt(model, method, rank=2)
    model(x)  # whatever could be kept from this pass must not outlive the write
    shake(adaptation)
    live = model(x)
    adaptation.fold()
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_is_a_model_of_its_own(model, x, method):
    adaptation = rf.adapt(model, method, rank=2)
    shake(adaptation)
    twin = copy.deepcopy(model)
    before = model(x)
    assert torch.equal(twin(x), before)
    rf.adaptation(twin).parameters()[0].data.add_(1.0)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    assert rf.adaptation(twin).model is twin


def test_a_pickled_model_comes_back_hosted(model, x):
    shake(rf.adapt(model, "dora", rank=2))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    assert type(again[0]).__name__ == "Linear"
    assert isinstance(again[0], nn.Linear)


def test_the_model_keeps_its_shape(model, x):
    names, text = list(model.state_dict()), [type(m).__name__ for m in model]
    adaptation = rf.adapt(model, "lora", rank=2)
    assert list(model.state_dict()) == names
    assert [type(m).__name__ for m in model][: len(text)] == text
    assert inspect.signature(model[0].forward) is not None
    optimizer_sees = {id(p) for p in model.parameters() if p.requires_grad}
    assert optimizer_sees == {id(p) for p in adaptation.parameters()}
    adaptation.remove()
    assert type(model[0]) is nn.Linear
    assert not hasattr(model, "rankfold")
    assert all(p.requires_grad for p in model.parameters())


def test_casts_reach_the_adapter(model, x):
    shake(rf.adapt(model, "dora", rank=2))
    single = model(x)
    double = model.double()(x.double())
    torch.testing.assert_close(double.float(), single, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.float()(x), single, rtol=1e-6, atol=1e-6)
