"""Law 2: the same function at the start, as every member declares it: "base", "near(tol)" or "elsewhere"."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import rankfold as rf
from rankfold.core import attaching, registry
from rankfold.core.host import fold_weight, site_program
from rankfold.core.structure import Offset, trait
from rankfold.errors import CompositionError

from .checks import Checks
from .models import tiny
from .subjects import adapt, cells, decorators, plain_structures, refused_by, refuses, small, subjects
from .tolerances import TOLERANCES, distance

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def check_start(method, kind, dtype=torch.float64, case=None):
    """The output at step zero against the base's; where offsets enter, W' against W, bit by bit."""
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 2, {m}, {kind}, {dtype}") as check:
        case = case or tiny(kind, dtype)
        if refused_by(m, kind):
            check.that(refuses(case, m), f"trait {refused_by(m, kind)} was not refused")
            return
        y = case.output().detach()
        a = adapt(case, m)
        check.that(len(a.sites) > 0, "no site is adapted")
        for training in (False, True):  # in training mode too: dropout on a change that is zero is zero
            case.model.train(training)
            now = case.output().detach()
            if m.starts == "base":
                check.close(now, y, TOLERANCES[dtype].start, f"output at the start (training={training})")
            elif m.starts == "elsewhere":
                check.that(distance(now, y) > 0.0, 'declares starts="elsewhere" and starts at the base: declare that')
            else:
                allowed = float(re.fullmatch(r"near\((.+)\)", m.starts)[1])
                check.close(now, y, max(allowed, TOLERANCES[dtype].start), f"output at the start (training={training})")
        case.model.eval()
        if m.init.offset and not m.is_side:
            for slot in a.slots():
                program = site_program(a.store, [slot], training=False)
                check.bitwise(
                    fold_weight(program), program.base.dense(), f"{slot.site.key}: an offset is zero, bitwise, at the start"
                )


@pytest.mark.parametrize(("method", "kind"), cells())
def test_every_method_starts_where_it_says(method, kind):
    check_start(method, kind)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("method", subjects())
def test_every_method_starts_there_in_every_dtype(method, dtype):
    check_start(method, "block" if rf.method(method).is_side else "linear", dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("method", "kind"), cells())
def test_every_kind_starts_there_in_every_dtype(method, kind, dtype):
    check_start(method, kind, dtype)


def compositions():
    """Every init with every structure, alone and decorated, that takes it."""
    base = plain_structures()
    chains = [*base, *(f"{d}+{s}" for d in decorators() for s in base)]
    return [(chain, e.key) for chain in chains for e in registry.entries("init")]


def check_pair(chain, init):
    try:
        m = small(f"{chain}+{init}")
    except CompositionError as refusal:
        with Checks(f"law 2, {chain}+{init}") as check:
            check.that(len(str(refusal)) > 40, f"refused without a reason: {refusal}")
        return
    for dtype in DTYPES:
        check_start(m, "block" if m.is_side else "linear", dtype)


@pytest.mark.parametrize(("chain", "init"), compositions())
def test_every_structure_starts_there_with_every_init(chain, init):
    check_pair(chain, init)


# What the law must reject


def draws_all(monkeypatch):
    """Every tensor that trains starts up to 0.1 away from where it should."""
    native = attaching._stored

    def stored(start, spec, base):
        value = native(start, spec, base)
        noise = torch.linspace(0.05, 0.1, value.numel()).view(value.shape)
        return value + noise.to(value.dtype) if spec.trainable and value.is_floating_point() else value

    monkeypatch.setattr(attaching, "_stored", stored)


def ones_for_zeros(monkeypatch):
    """B starts at one."""
    monkeypatch.setitem(attaching.ROLE_STARTS, "B", 1.0)


def drops_the_offset(monkeypatch):
    """An init with an offset whose offset is left out: W + s·B A."""
    monkeypatch.setattr(Offset, "weight", lambda self, W, t, site, ctx=None: self.inner.weight(W, t, site, ctx))


def rounds_the_offset(monkeypatch):
    """W − s·B₀A₀ + s·B A, rounded like a stored residual."""
    from rankfold.linalg import Dense

    def weight(self, W, t, site, ctx=None):
        start = t._replace(**{n: getattr(t, n + "0") for n in self.names(site)})
        residual = (2.0 * W.dense() - self.inner.weight(W, start, site, ctx).dense()).to(torch.bfloat16).to(W.dense().dtype)
        return self.inner.weight(Dense(residual), t, site, ctx)

    monkeypatch.setattr(Offset, "weight", weight)


def offset_methods():
    return [e.key for e in registry.entries("init") if registry.resolve(e).offset]


@pytest.mark.parametrize("mutant", [draws_all, ones_for_zeros], ids=lambda f: f.__name__)
def test_the_law_rejects(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="law 2"):
        check_start("lora", "linear")


@pytest.mark.parametrize("mutant", [drops_the_offset, rounds_the_offset], ids=lambda f: f.__name__)
@pytest.mark.parametrize("init", offset_methods())
def test_the_law_rejects_under_every_offset(init, mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="law 2"):
        check_start(f"lora+{init}", "linear")


@pytest.mark.parametrize("method", [s for s in subjects() if rf.method(s).starts != "elsewhere"])
def test_the_law_rejects_another_start_of_every_method(method, monkeypatch):
    draws_all(monkeypatch)
    with pytest.raises(AssertionError, match="law 2"):
        check_start(method, "block" if rf.method(method).is_side else "linear")


def test_the_law_rejects_a_wrong_declaration(monkeypatch):
    m = small("lora")
    elsewhere = type("Elsewhere", (type(m.structure),), {"starts": "elsewhere"})
    lies = dataclasses.replace(m, structure=elsewhere(rank=2))
    with pytest.raises(AssertionError, match="declares starts"):
        check_start(lies, "linear")


def test_a_stochastic_method_is_among_them():
    with Checks("law 2, the registry") as check:
        check.that(any(trait(small(s).structure, "stochastic") for s in subjects()), "no stochastic method is under test")
