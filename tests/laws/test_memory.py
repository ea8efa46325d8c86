"""Law 7, memory: "keep", "auto" and "recompute" give the same numbers, and each keeps less than the one before where there is
something to save."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rankfold as rf
from rankfold.kernels import inputs, lowrank, watching

from .checks import Checks
from .subjects import shake, small

MODES = ("keep", "auto", "recompute")
FUSED = ("lora", "dora", "pissa", "dropout+lora", "magnitude+lora+init:pissa", "vera", "miss")
STRUCTURED = ("kron", "hra", "gate+hra", "mixture", "magnitude+kron")


class Gated(nn.Module):
    """The shape of a Llama's second half of a block: down(silu(gate(x)) ∘ up(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def run(method, memory, dtype=torch.float32, tokens=64, model=None, through=lambda model, x: model(x)):
    """(bytes kept beside parameters and input, output and gradients)."""
    torch.manual_seed(0)
    model = (model or Gated()).to(dtype)
    a = rf.adapt(model, method if not isinstance(method, str) else small(method), targets="all-linear", seed=1, memory=memory)
    shake(a)
    model.train()
    x = torch.randn(2, tokens // 2, 24).to(dtype).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *a.tensors().values())}
    held = {}

    def look(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage

    torch.manual_seed(5)  # of dropout
    with watching(look):
        y = through(model, x)
    kept = sum(s.nbytes() for s in held.values())
    held.clear()
    return kept, [y.detach(), *torch.autograd.grad(y.float().square().mean(), [x, *a.parameters()])]


def check_modes(method, dtype, bitwise):
    with Checks(f"law 7, {method}, memory, {dtype}") as check:
        (most, expected), *others = (run(method, memory, dtype) for memory in MODES)
        for memory, (_, found) in zip(MODES[1:], others):
            for k, (one, other) in enumerate(zip(found, expected)):
                if bitwise:
                    check.bitwise(one, other, f"memory {memory}, tensor {k}")
                else:
                    check.close(one, other, 1e-6 if dtype == torch.float32 else 2e-2, f"memory {memory}, tensor {k}")
        return check, [most, *(kept for kept, _ in others)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", FUSED)
def test_a_fused_plan_gives_the_same_bits_from_fewer_bytes(method, dtype):
    check, (most, auto, least) = check_modes(method, dtype, bitwise=True)
    size = torch.finfo(dtype).bits // 8
    if method not in ("miss", "vera"):  # whose A is frozen: no input is kept at all, and h is then all there is
        product = 64 * 40 * size
        check.that(auto <= most - product, f"auto keeps {auto} bytes of {most}: the input of `down` is a product")
        check.that(least < auto, f"recompute keeps {least} bytes, auto {auto}: h is left")


@pytest.mark.parametrize("method", STRUCTURED)
def test_structured_terms_give_the_same_numbers_from_fewer_bytes(method):
    check, (most, _, least) = check_modes(method, torch.float32, bitwise=False)
    check.that(least < most, f"recompute keeps {least} bytes of {most}")


def test_the_floor_alone_keeps_nearly_as_much_as_lora():
    """Of a gated block LoRA keeps x of gate and up, and h."""
    torch.manual_seed(0)
    frozen = Gated().requires_grad_(False)
    x = torch.randn(2, 32, 24, requires_grad=True)
    held = {}
    with watching(lambda t: held.update({t.untyped_storage().data_ptr(): t.untyped_storage()})):
        y = frozen(x)
    known = {t.untyped_storage().data_ptr() for t in (x, *frozen.parameters())}
    floor = sum(s.nbytes() for p, s in held.items() if p not in known)
    del y
    kept, _ = run("lora", "auto")
    assert floor < kept <= floor + 3 * 64 * 2 * 4  # three sites' h of rank 2; x is the block's input


def test_watching_counts_what_the_graph_holds():
    """The tensors that each node gives out when asked, without any hook: the same storages as `watching` saw."""
    torch.manual_seed(0)
    model = Gated()
    rf.adapt(model, "dora", rank=2)
    x = torch.randn(2, 32, 24, requires_grad=True)
    seen = set()
    with watching(lambda t: seen.add((tuple(t.shape), t.dtype))):
        model(x)
    y = model(x)
    found, nodes, done = set(), [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in done:
            continue
        done.add(node)
        values = node.saved_tensors if hasattr(node, "saved_tensors") else ()
        values = [*values, *(getattr(node, n) for n in dir(node) if n.startswith("_saved_"))]
        found |= {(tuple(t.shape), t.dtype) for t in values if isinstance(t, torch.Tensor)}
        nodes += [n for n, _ in node.next_functions]
    assert found == seen
    assert ((2, 32, 40), torch.float32) in found


@pytest.mark.parametrize("method", ["lora", "dora", "dropout+lora"])
def test_checkpointing_and_offloading_are_left_alone(method):
    """Hooks on saved tensors may compute or copy when read: under them the input itself is kept."""
    _, expected = run(method, "auto")
    for through in (
        lambda model, x: checkpoint(model, x, use_reentrant=False),
        lambda model, x: offloaded(model, x),
    ):
        torch.manual_seed(0)
        model = Gated()
        a = rf.adapt(model, small(method), targets="all-linear", seed=1)
        shake(a)
        x = torch.randn(2, 32, 24, requires_grad=True)
        torch.manual_seed(5)
        y = through(model.train(), x)
        found = [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *a.parameters()])]
        assert all(torch.equal(one, other) for one, other in zip(found, expected))


def offloaded(model, x):
    with torch.autograd.graph.save_on_cpu():
        return model(x)


def test_a_factor_that_was_changed_in_place_is_no_factor():
    a, b = torch.ones(3, 2, requires_grad=True) * 1.0, torch.ones(3, 2, requires_grad=True) * 1.0
    x = a * b
    assert inputs.factors_of(x) is not None
    a.add_(1.0)
    assert inputs.factors_of(x) is None


def test_explain_says_what_is_recomputed():
    model = Gated()
    rf.adapt(model, "lora", memory="recompute")
    assert {row["memory"] for row in rf.explain(model)} == {"recompute"}
    model = Gated()
    rf.adapt(model, "lora")
    assert {row["memory"] for row in rf.explain(model)} == {"keep"}


# What the law must reject


def test_the_law_rejects_a_mode_that_computes_another_thing(monkeypatch):
    monkeypatch.setattr(lowrank, "kept_input", lambda a, b: None if a is None else (a if b is None else a + b).flatten(0, -2))
    with pytest.raises(AssertionError, match="law 7"):
        check_modes("lora", torch.float32, bitwise=True)


def test_the_law_rejects_a_mode_that_keeps_all(monkeypatch):
    monkeypatch.setattr(lowrank, "factors_of", lambda x: None)
    with pytest.raises(AssertionError, match="is a product"):
        test_a_fused_plan_gives_the_same_bits_from_fewer_bytes("lora", torch.float32)


class Marker:
    """Something whose life can be seen."""


class Marked(torch.autograd.Function):
    """x, with a marker that lives as long as the graph."""

    @staticmethod
    def forward(ctx, x, marker):
        ctx.marker = marker
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


def test_what_is_watched_is_freed():
    """exp keeps its own output: kept as it is, output and graph would hold each other for ever."""
    marker = Marker()
    alive = weakref.ref(marker)
    with watching(lambda t: None):
        y = Marked.apply(torch.ones(3, requires_grad=True), marker).exp()
    del y, marker
    gc.collect()
    assert alive() is None
