"""Law 5: export tells its error. Exact where the change is a LoRA, a deviation or a rotation; reported as measured elsewhere."""

from __future__ import annotations

import pytest
import torch

import rankfold as rf
from rankfold.core.structure import layers, trait
from rankfold.errors import CompositionError
from rankfold.training import saving

from .checks import Checks
from .definition import Definition, as_map
from .models import BLOCK, tiny
from .subjects import adapt, cells, refused_by, refuses, shake, small, subjects

EXACT = {"lora", "miss", "vera", "hra", "gate", "dropout", "magnitude"}
"""Structures, alone or around each other, whose change is a product of factors: declared exact, at their natural rank."""


def rebuilt(entry, W):
    """W' by what another tool does with the entry: W + s·B A, its rows set to the magnitude where there is one."""
    V = W + entry.scale * entry.B.double() @ entry.A.double()
    return V if entry.magnitude is None else (entry.magnitude.double() / V.norm(dim=-1))[..., None] * V


def check_export(method, kind, rank=None):
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 5, {m}, {kind}, rank {rank}") as check:
        case = tiny(kind)
        if refused_by(m, kind):
            check.that(refuses(case, m), f"trait {refused_by(m, kind)} was not refused")
            return
        a = adapt(case, m)
        shake(a)
        if m.is_side or trait(m.structure, "input_dependent"):
            with pytest.raises(CompositionError):
                rf.normal_form(a)
            check.that(True, "what is no matrix was refused")
            return
        adapter, errors = rf.normal_form(a, rank=rank)
        definition = Definition(case, a)
        weights = definition.weights()
        check.that(len(adapter.entries) == len(a.slots()), f"{len(adapter.entries)} entries for {len(a.slots())} sites")
        check.that(set(errors) == {s.site.key for s in a.slots()}, f"errors of {sorted(errors)}")
        for entry, slot in zip(adapter.entries.values() if isinstance(adapter.entries, dict) else adapter.entries, a.slots()):
            module = definition.model.get_submodule(slot.site.module)
            stored = definition.model.get_parameter(slot.site.weight).detach()
            W, W1 = (as_map(module, t) for t in (stored, weights[slot.site.weight].detach()))
            rows = slice(*(slot.site.rows or (0, W.shape[-2])))
            W, W1 = W[..., rows, :], W1[..., rows, :]
            B, A = entry.B, entry.A
            check.that(
                (B.shape[-2], A.shape[-1]) == tuple(slot.site.shape),
                f"{slot.site.key}: factors {tuple(B.shape)}, {tuple(A.shape)}",
            )
            check.that(rank is None or A.shape[-2] <= rank, f"{slot.site.key}: rank {A.shape[-2]}, asked for {rank}")
            measured = float((rebuilt(entry, W) - W1).norm() / (W1 - W).norm())
            said = errors[slot.site.key]
            if entry.magnitude is None:
                check.that(abs(measured - said) <= 1e-9, f"{slot.site.key}: reports {said:.3g}, is off by {measured:.3g}")
            else:  # the cut is below the magnitude: what is reported is its own error
                check.that((said > 0) == (measured > 1e-9), f"{slot.site.key}: reports {said:.3g}, is off by {measured:.3g}")
            if rank is None:
                check.that(measured <= 1e-9, f"{slot.site.key}: not whole at the rank that holds it whole: {measured:.3g}")
            if rank is None and {p.name for p in layers(m.structure)} <= EXACT:
                check.that(said == 0.0, f"{slot.site.key}: declared exact and reports {said:.3g}")


@pytest.mark.parametrize(("method", "kind"), cells())
def test_the_normal_form_is_the_method(method, kind):
    check_export(method, kind)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("method", subjects())
def test_what_is_cut_is_reported(method, rank):
    check_export(method, BLOCK if rf.method(method).is_side else "linear", rank)


def test_the_scale_stays_a_number():
    """s is not folded into the factors, so that a tool with alpha gets the bytes that were trained."""
    with Checks("law 5, scale") as check:
        case = tiny("linear")
        a = adapt(case, rf.method("lora", rank=2, alpha=3.0))
        shake(a)
        adapter, _ = rf.normal_form(a)
        entries = list(adapter.entries.values() if isinstance(adapter.entries, dict) else adapter.entries)
        check.that(all(e.scale == 1.5 for e in entries), f"scales {[e.scale for e in entries]}, expected 1.5")
        B = next(t for k, t in a.tensors().items() if k.endswith("first/B"))
        check.bitwise(entries[0].B, B.detach(), "B as trained")


# What the law must reject


def never_off(monkeypatch):
    """Reports no error whatever it cuts."""
    native = saving._entry
    monkeypatch.setattr(saving, "_entry", lambda *a: (native(*a)[0], 0.0))


def off_in_silence(monkeypatch):
    """Factors off by one part in a thousand."""
    native = saving._entry

    def entry(*a):
        made, error = native(*a)
        object.__setattr__(made, "B", 1.001 * made.B)
        if made.magnitude is not None:
            object.__setattr__(made, "magnitude", 1.001 * made.magnitude)
        return made, error

    monkeypatch.setattr(saving, "_entry", entry)


def transposed(monkeypatch):
    native = saving._entry

    def entry(*a):
        made, error = native(*a)
        B, A = made.A.mT.contiguous(), made.B.mT.contiguous()
        object.__setattr__(made, "B", B)
        object.__setattr__(made, "A", A)
        return made, error

    monkeypatch.setattr(saving, "_entry", entry)


MUTANTS = [
    (never_off, lambda: check_export("lora", "linear", rank=1)),
    (never_off, lambda: check_export("hira", "linear", rank=1)),
    (off_in_silence, lambda: check_export("lora", "linear")),
    (transposed, lambda: check_export("lora", "linear")),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=[f"{k}-{f.__name__}" for k, (f, _) in enumerate(MUTANTS)])
def test_the_law_rejects(mutant, law, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="law 5"):
        law()


@pytest.mark.parametrize(
    "method", [s for s in subjects() if not (rf.method(s).is_side or trait(rf.method(s).structure, "input_dependent"))]
)
def test_the_law_rejects_silent_errors_of_every_method(method, monkeypatch):
    off_in_silence(monkeypatch)
    with pytest.raises(AssertionError, match="law 5"):
        check_export(method, "linear")


def test_the_law_rejects_an_export_without_its_offset(monkeypatch):
    check_export("lora+init:pissa", "linear")
    native = saving._low

    def low(expr, base):
        found = native(expr, base)
        if found is not None and found.B.shape[1] == 4:  # rank 2, stacked with its start
            return type(found)(found.B[:, :2] + found.B[:, 2:], found.A[:2], scale=found.scale)
        return found

    monkeypatch.setattr(saving, "_low", low)
    with pytest.raises(AssertionError, match="law 5"):
        check_export("lora+init:pissa", "linear")


def test_exact_means_every_dtype():
    """In float32 storage the exact forms stay exact: what is exported is what is trained, not a decomposition of it."""
    with Checks("law 5, float32") as check:
        case = tiny("linear", torch.float32)
        a = adapt(case, "lora")
        shake(a)
        _, errors = rf.normal_form(a)
        check.that(set(errors.values()) == {0.0}, f"errors {errors}")
