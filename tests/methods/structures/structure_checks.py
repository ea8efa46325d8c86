"""What every structure is held to: start, definition in every plan, fold, and the same tensors in peft.

The oracles are dense formulas in plain torch, given by each test; nothing here asks the planner or an operator for the truth.
"""

import copy

import torch
from torch import nn

from rankfold.core import PLANS, attach, find_sites, fold, store_of, unfold
from rankfold.errors import LayoutError

IN, HIDDEN, OUT = 12, 20, 8


def tiny(dtype=torch.float64, seed=0, bias=True):
    """Two linear layers of different shapes, in = 12, out = 8: every size is a multiple of 4."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(IN, HIDDEN, bias=bias), nn.Tanh(), nn.Linear(HIDDEN, OUT, bias=bias)).to(dtype)


def attached(structure, model=None, seed=0):
    """(model, its store) with the structure at both layers, switched on."""
    model = tiny() if model is None else model
    sites = find_sites(model)
    attach(model, "a", sites, {site.key: structure for site in sites}, seed=seed)
    store = store_of(model)
    store.switch({"a": 1.0})
    return model, store


def slots(store):
    return list(store.members["a"].slots.values())


def tensors(store):
    """The namedtuple of every site, in order."""
    return [slot.t(store) for slot in slots(store)]


def move(store, size=0.4, seed=1):
    """Trained tensors somewhere else, so that nothing is zero by accident."""
    generator = torch.Generator().manual_seed(seed)
    for p in store.parameters():
        if p.requires_grad:
            with torch.no_grad():
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * size)


def trained(store):
    return [p for p in store.parameters() if p.requires_grad]


def inputs(dtype=torch.float64):
    x = torch.randn(3, 5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return x.to(dtype).requires_grad_()


def loss_of(y):
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.square().sum()


def gradients(y, wanted):
    return torch.autograd.grad(loss_of(y), wanted, allow_unused=True)


def oracle(model, store, weight, x):
    """The two layers by dense W'(W, t) in plain torch."""
    W = [model[0].weight, model[2].weight]
    changed = [weight(w, t) for w, t in zip(W, tensors(store))]
    return torch.nn.functional.linear(
        torch.tanh(torch.nn.functional.linear(x, changed[0], model[0].bias)), changed[1], model[2].bias
    )


def check_start(structure, dtypes=(torch.float32, torch.float64, torch.bfloat16), bias=True, model=tiny):
    """The same function at the start, bitwise, in every dtype; the base's tensors are untouched."""
    for dtype in dtypes:
        base = model(dtype, bias=bias)
        x = inputs(dtype)
        before = base(x)
        state = {k: v.clone() for k, v in base.state_dict().items()}
        changed, store = attached(structure, base)
        for plan in ("auto", "plain"):
            store.plan = plan
            assert torch.equal(changed(x), before), (dtype, plan)
        assert all(torch.equal(v, state[k]) for k, v in changed.state_dict().items())


def check_definition(structure, weight, runs=("structured", "plain"), size=0.4, tol=1e-10):
    """Forward and every gradient in float64, by every plan, beside autograd through the dense formula; `runs` are due."""
    model, store = attached(structure)
    move(store, size)
    x = inputs()
    wanted = [x, *trained(store)]
    y = oracle(model, store, weight, x)
    truth = gradients(y, wanted)
    base = nn.functional.linear(
        torch.tanh(nn.functional.linear(x, model[0].weight, model[0].bias)), model[2].weight, model[2].bias
    )
    assert (y - base).abs().max() > 1e-3, "the tensors change nothing: the comparison would be empty"
    ran = set()
    for plan in PLANS:
        for memory in ("keep", "recompute") if plan == "structured" else ("auto",):
            store.plan, store.memory = plan, memory
            try:
                got = model(x)
            except LayoutError:
                continue
            ran.add(plan)
            torch.testing.assert_close(got, y, rtol=tol, atol=tol)
            for p, a, b in zip(wanted, gradients(got, wanted), truth):
                assert None not in (a, b), f"{plan}: a tensor {tuple(p.shape)} gets no gradient"
                torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    assert {"auto", *runs} <= ran, ran
    store.plan, store.memory = "auto", "auto"
    check_fold(model, store, x, y)


def check_fold(model, store, x, y):
    original = model[0].weight
    before = original.clone()
    fold(store)
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    unfold(store)
    assert model[0].weight is original
    assert torch.equal(original, before)


def check_against_peft(structure, config, pair, tol=1e-10, dtype=torch.float64, size=0.4, prepare=None):
    """The same forward and the same gradients as peft at the same tensors.

    pair(t, layer) -> [(our tensor, their tensor, the map from ours to theirs)].
    """
    from peft import get_peft_model

    theirs = get_peft_model(nn.ModuleDict({"net": tiny(dtype)}), config).to(dtype)
    net = theirs.base_model.model["net"]
    model, store = attached(structure, tiny(dtype))
    move(store, size)
    if prepare is not None:
        prepare(store, net)
    pairs = [p for t, layer in zip(tensors(store), (net[0], net[2])) for p in pair(t, layer)]
    with torch.no_grad():
        for ours, other, to_theirs in pairs:
            assert other.shape == to_theirs(ours).shape
            other.data = to_theirs(ours).to(other.dtype).clone()
    x = inputs(dtype)
    z = copy.deepcopy(x)
    y, y_theirs = model(x), net(z)
    base = tiny(dtype)(x)
    assert (y_theirs - base).abs().max() > 1e-3
    torch.testing.assert_close(y, y_theirs, rtol=tol, atol=tol)
    pairs = [p for p in pairs if p[0].requires_grad]
    assert len(pairs) == len(trained(store))
    ours = gradients(y, [x, *(p[0] for p in pairs)])
    other = gradients(y_theirs, [z, *(p[1] for p in pairs)])
    for a, b, f in zip(ours, other, [lambda g: g, *(p[2] for p in pairs)]):
        torch.testing.assert_close(f(a), b, rtol=tol, atol=tol)


def same(t):
    return t
