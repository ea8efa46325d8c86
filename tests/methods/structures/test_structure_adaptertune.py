"""AdapterTune: a bottleneck after a block; formula, start, places, counts, removal."""

import pytest
import torch
from structure_checks import gradients, loss_of
from torch import nn
from torch.nn.functional import gelu

from rankfold.core import Targets, attach, detach, find_blocks, fold, store_of
from rankfold.errors import LayoutError
from rankfold.methods.structures.adaptertune import AdapterTune

WIDTH = 6


class Block(nn.Module):
    def __init__(self, pair=False):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.pair = pair

    def forward(self, h):
        h = h + torch.tanh(self.mix(h))
        return (h, "cache") if self.pair else h


class Stack(nn.Module):
    def __init__(self, depth=4, pair=False):
        super().__init__()
        self.layers = nn.ModuleList(Block(pair) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, h):
        for block in self.layers:
            h = block(h)[0] if block.pair else block(h)
        return self.head(h)


def adapted(structure, pair=False, dtype=torch.float64, depth=4):
    torch.manual_seed(0)
    model = Stack(depth, pair).to(dtype)
    sites = structure.places(find_blocks(model, Targets.of()))
    attach(model, "a", sites, {s.key: structure for s in sites})
    store = store_of(model)
    store.switch({"a": 1.0})
    return model, store


def oracle(model, store, h, alpha):
    sides = {slot.site.name: slot.t(store) for slot in store.members["a"].slots.values()}
    for k, block in enumerate(model.layers):
        h = h + torch.tanh(h @ block.mix.weight.T + block.mix.bias)
        if f"layers.{k}" in sides:
            t = sides[f"layers.{k}"]
            h = h + alpha * (gelu(h @ t.D.T + t.d) @ t.U.T) + alpha * t.u
    return h @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("every", "names"), [(1, ["0", "1", "2", "3"]), (2, ["0", "2"]), (3, ["0", "3"])])
def test_is_the_bottleneck_after_each_chosen_block(every, names, pair):
    model, store = adapted(AdapterTune(rank=2, alpha=0.7, every=every), pair)
    assert [s.site.name for s in store.members["a"].slots.values()] == [f"layers.{k}" for k in names]
    for p in store.parameters():
        p.data.normal_()
    x = torch.randn(4, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = [x, *store.parameters()]
    y, truth = model(x), oracle(model, store, x, 0.7)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(y, wanted), gradients(truth, wanted)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_starts_at_the_base_bitwise_and_leaves_it_as_it_was(dtype):
    torch.manual_seed(0)
    plain = Stack().to(dtype)
    x = torch.randn(4, WIDTH).to(dtype)
    before = plain(x)
    model, store = adapted(AdapterTune(rank=2), dtype=dtype)
    assert torch.equal(model(x), before)
    for p in store.parameters():
        p.data.normal_()
    assert not torch.equal(model(x), before)
    with store.disabled():
        assert torch.equal(model(x), before)
    detach(model, "a")
    assert torch.equal(model(x), before)
    assert type(model.layers[0]) is Block


def test_first_gradient_reaches_u_alone_and_counts_are_those_of_the_formula():
    model, store = adapted(AdapterTune(rank=2))
    t = next(iter(store.members["a"].slots.values())).t(store)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    grads = dict(zip(t._fields, torch.autograd.grad(loss_of(model(x)), list(t))))
    assert [n for n, g in grads.items() if g.abs().max() > 0] == ["U", "u"]
    assert sum(p.numel() for p in store.parameters()) == 4 * (2 * 2 * WIDTH + 2 + WIDTH)
    assert t.D.abs().max() <= (6 / (2 + WIDTH)) ** 0.5


def test_half_weight_is_half_the_way_and_it_cannot_be_folded():
    model, store = adapted(AdapterTune(rank=2), depth=1)
    for p in store.parameters():
        p.data.normal_()
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    whole = model(x)
    with store.disabled():
        none = model(x)
    store.switch({"a": 0.5})
    torch.testing.assert_close(model(x), (whole + none) / 2, rtol=1e-12, atol=1e-12)
    with pytest.raises(LayoutError, match="side module"):
        fold(store)
