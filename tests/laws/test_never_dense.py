"""Law 7, what is never built: where every structure of a chain declares `never_dense`, no forward or backward pass makes a tensor
of out·in entries. A tracker sees every tensor that an operation gives out, those inside autograd functions too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rankfold as rf
from rankfold.core import never_dense, planner
from rankfold.errors import CompositionError
from rankfold.kernels import lowrank
from rankfold.linalg import Kronecker, Operator

from .checks import Checks
from .subjects import decorators, plain_structures, refused_by, shake, small, subjects

OUT, IN = 352, 80
TOKENS = (257, 2053)
"""Primes: what is as large as the weight and no multiple of the tokens is no activation. The positions that a dropout of 0.1
drops at 2053 tokens are fewer than the entries of the weight."""


class Tracker(TorchDispatchMode):
    """Remembers the tensors that operations made of at least `size` entries, other than activations; views of what was there
    before are nothing made."""

    def __init__(self, size: int, tokens: int) -> None:
        super().__init__()
        self.size, self.tokens = size, tokens
        self.seen = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                self.seen += 1
                entries = t.untyped_storage().nbytes() // t.element_size()
                if entries >= self.size and entries % self.tokens:
                    self.found.append(f"{func} {list(t.shape)}")
        return out


def chains() -> list[str]:
    """Chains whose every layer declares the trait: the laws' subjects, and each decorator around each plain structure."""
    pairs = [f"{d}+{s}" for d in decorators() for s in plain_structures()]
    made = [s for s in dict.fromkeys([*subjects(), *pairs]) if composes(s)]
    return [s for s in made if not rf.method(s).is_side and never_dense(rf.method(s).structure)]


def composes(text: str) -> bool:
    try:
        rf.method(text)
    except CompositionError:
        return False
    return True


def make(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT) if kind == "linear" else nn.Embedding(IN, OUT)).to(dtype)


def check_never_dense(text: str, tokens: int, dtype: torch.dtype, kind: str = "linear", plan: str = "auto", memory: str = "auto"):
    method = small(text)
    with Checks(f"law 7, {method}, nothing dense, {tokens} tokens, {dtype}, memory {memory}") as check:
        model = make(kind, dtype)
        x = torch.randn(1, tokens, IN).to(dtype).requires_grad_() if kind == "linear" else torch.randint(IN, (1, tokens))
        loss = lambda model, batch: model(batch).float().square().mean()
        data = {"batches": [x.detach()], "loss": loss} if method.init.needs & {"activations", "gradients"} else {}
        a = rf.adapt(model, method, targets=["0"], seed=1, plan=plan, memory=memory, **data)
        shake(a)
        model.train()
        with Tracker(OUT * IN, tokens) as tracker:
            model(x).float().square().mean().backward()
        check.that(tracker.seen > 10, "the tracker saw no step")
        check.that(all(p.grad is not None for p in a.parameters()), "a tensor got no gradient")
        check.that(not tracker.found, "made " + "; ".join(tracker.found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("text", chains())
def test_no_tensor_of_the_weights_size(text, tokens, dtype):
    check_never_dense(text, tokens, dtype)


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("text", chains())
def test_nor_whatever_is_kept(text, memory):
    check_never_dense(text, TOKENS[0], torch.bfloat16, memory=memory)


@pytest.mark.parametrize("text", [s for s in chains() if refused_by(rf.method(s), "embedding") is None])
def test_nor_at_an_embedding(text):
    check_never_dense(text, TOKENS[0], torch.float32, kind="embedding")


def test_the_trait_is_declared_by_those_that_the_benchmarks_name():
    held = {"lora", "magnitude+lora", "kron", "hra", "vera", "mixture", "miss", "dropout+lora", "gate+lora", "magnitude+kron"}
    assert held <= set(chains())
    assert not {"hira", "full", "shira", "bone", "magnitude+hira"} & set(chains())


# What the law must reject


def builds_the_weight(monkeypatch):
    """The planner takes the plan that builds W', as it does for structures that declare nothing."""
    monkeypatch.setattr(planner, "_choose", lambda program, expr, tokens, memory, prices: ("effective", memory))
    monkeypatch.setattr(planner, "_fused_form", lambda expr, base: None)


def forms_the_change(monkeypatch):
    """A low-rank product that multiplies its factors first."""
    monkeypatch.setattr(lowrank, "combine", lambda y, x, Bs, As, scale, p: (y.addmm_(x, (scale * Bs @ As).mT), x @ As.mT)[1])


def forms_it_in_backward(monkeypatch):
    native = lowrank.gradients

    def gradients(g, gx, x, h, Bs, As, *rest):
        (Bs @ As).sum()
        return native(g, gx, x, h, Bs, As, *rest)

    monkeypatch.setattr(lowrank, "gradients", gradients)


def sums_the_rows(monkeypatch):
    """Row lengths from the dense sum."""

    def row_norms(base, B, A, scale, B0=None, A0=None, floor=1e-12):
        return (base.dense() + scale * (B @ A)).norm(dim=-1).detach()

    monkeypatch.setattr(planner, "row_norms", row_norms)


def multiplies_entries(monkeypatch):
    """Products with the rows of W by way of both matrices."""
    monkeypatch.setattr(Kronecker, "row_dot", Operator.row_dot)


MUTANTS = [
    (builds_the_weight, "lora"),
    (builds_the_weight, "kron"),
    (builds_the_weight, "magnitude+lora"),
    (forms_the_change, "lora"),
    (forms_it_in_backward, "lora"),
    (sums_the_rows, "magnitude+lora"),
    (multiplies_entries, "magnitude+kron"),
]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("mutant", "text"), MUTANTS, ids=[f"{f.__name__}-{text}" for f, text in MUTANTS])
def test_the_law_rejects(mutant, text, tokens, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="law 7"):
        check_never_dense(text, tokens, torch.float32)


@pytest.mark.parametrize("text", [s for s in chains() if not any(t in s for t in ("dropout", "mixture"))])
def test_the_law_rejects_the_effective_plan_under_every_method(text):
    with pytest.raises(AssertionError, match="law 7"):
        check_never_dense(text, TOKENS[0], torch.float32, plan="effective")


def test_the_tracker_sees_inside_autograd_functions_and_ignores_views_and_activations():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            torch.ones(7, 5)
            return x * 2

        @staticmethod
        def backward(ctx, g):
            torch.ones(5, 7)
            return g * 2

    x = torch.ones(11, 5, requires_grad=True)
    with Tracker(35, 11) as tracker:
        Doubled.apply(x).view(5, 11).sum().backward()
    assert len(tracker.found) == 2
