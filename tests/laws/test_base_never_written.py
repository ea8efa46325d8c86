"""Law 1: the loaded base and its checkpoint are never written. Disabled is bitwise the base; unfolding is bitwise."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.adapters.fingerprint import compare
from rankfold.core.host import Host
from rankfold.core.store import Store
from rankfold.core.structure import trait
from rankfold.training import adaptation as adaptation_module
from rankfold.training.saving import load

from .checks import Checks
from .models import tiny
from .subjects import adapt, cells, refused_by, refuses, shake, small, subjects, train


@contextmanager
def quiet_fold():
    """Folding one of two tied modules warns that it unties them; here that is expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fold: .* shared its weight")
        yield


def check_base(method, kind, folder, dtype=torch.float64):
    """Everything that is done to an adapted model, and after each step: is the base what it was?"""
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 1, {m}, {kind}") as check:
        case = tiny(kind, dtype)
        if refused_by(m, kind):
            check.that(refuses(case, m), f"trait {refused_by(m, kind)} was not refused")
            return
        model = case.model
        objects = dict(model.named_parameters(remove_duplicate=False))
        values = {n: t.clone() for n, t in model.state_dict().items()}
        classes = [type(module) for module in model.modules()]
        trained = {n: p.requires_grad for n, p in model.named_parameters()}
        print_ = rf.fingerprint(model)
        y = case.output()

        def unchanged(when):
            state = model.state_dict()
            check.that(list(state) == list(values), f"{when}: state_dict has other keys: {sorted(state.keys() ^ values.keys())}")
            for n, value in values.items():
                check.bitwise(state[n], value, f"{when}: {n}")
            now = dict(model.named_parameters(remove_duplicate=False))
            check.that(all(now[n] is p for n, p in objects.items()), f"{when}: a parameter of the base is another object")
            check.that(rf.fingerprint(model) == print_, f"{when}: the fingerprint changed")
            with a.disabled():
                check.bitwise(case.output(), y, f"{when}: disabled output")

        a = adapt(case, m)
        unchanged("after adapt")
        train(case, a)
        unchanged("after training")
        shake(a)
        check.that(not torch.equal(case.output(), y), "tensors moved and the output did not: nothing is adapted")
        a.save(folder / "adapter")
        unchanged("after save")
        a.use()
        check.bitwise(case.output(), y, "no adapter on: output")
        a.use("default")
        other = case.again()
        load(other.model, folder / "adapter")
        for n, value in values.items():
            check.bitwise(other.model.state_dict()[n], value, f"after load: {n}")
        if not (m.is_side or trait(m.structure, "input_dependent")):
            with quiet_fold():
                a.fold()
            check.that(rf.fingerprint(model) == print_, "folded: the fingerprint is no longer the base's")
            check.that(list(model.state_dict()) == list(values), "folded: state_dict has other keys")
            a.unfold()
            unchanged("after unfold")
        a.remove()
        check.bitwise(case.output(), y, "after remove: output")
        check.that([type(module) for module in model.modules()] == classes, "after remove: a module kept its other class")
        check.that({n: p.requires_grad for n, p in model.named_parameters()} == trained, "after remove: requires_grad changed")
        check.that(list(model.state_dict()) == list(values), "after remove: state_dict has other keys")


@pytest.mark.parametrize(("method", "kind"), cells())
def test_the_base_is_never_written(method, kind, tmp_path):
    check_base(method, kind, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "kind"), cells())
def test_the_base_is_never_written_in_other_dtypes(method, kind, dtype, tmp_path):
    check_base(method, kind, tmp_path, dtype)


def test_tied_weights_stay_tied(tmp_path):
    with Checks("law 1, ties") as check:
        case = tiny("tied")
        a = rf.adapt(case.model, small("lora"), targets=["head"])
        check.that(case.model.head.weight is case.model.embed.weight, "adapting untied the head")
        shake(a)
        with pytest.warns(UserWarning, match="shared its weight"):
            a.fold()
        check.that(case.model.head.weight is not case.model.embed.weight, "a folded head can't share its weight")
        check.bitwise(case.model.embed.weight, case.original.embed.weight, "the embedding was folded along with the head")
        a.unfold()
        check.that(case.model.head.weight is case.model.embed.weight, "unfolding did not restore the tie")
        twin = copy.deepcopy(case.model)
        check.that(twin.head.weight is twin.embed.weight, "deepcopy untied the head")


def test_a_fingerprint_tells_storage_from_training():
    with Checks("law 1, fingerprint") as check:
        case = tiny("linear", torch.float32)
        source = rf.fingerprint(case.model)
        stored = rf.fingerprint(case.pristine().to(torch.bfloat16))
        tuned_model = case.pristine()
        with torch.no_grad():
            for p in tuned_model.parameters():
                p.mul_(1.001)
        tuned = rf.fingerprint(tuned_model.to(torch.bfloat16))
        check.that(compare(source, rf.fingerprint(case.pristine())).verdict == "same", "a copy is not the same")
        check.that(compare(source, stored).verdict == "same source, other storage", "a bf16 copy is not recognised")
        check.that(compare(source, rf.fingerprint(tuned_model.float())).verdict == "different", "bf16 of a tuned copy passes")
        check.that(tuned != stored, "a tuned copy has the fingerprint of its source")


# What the law must reject


def bakes(monkeypatch):
    """The forward pass writes to the weights of the module that it runs."""
    native = Host.forward

    def forward(self, module, *rest):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1e-6)
        return native(self, module, *rest)

    monkeypatch.setattr(Host, "forward", forward)


def stays_on(monkeypatch):
    """`disabled()` disables nothing."""
    monkeypatch.setattr(Store, "disabled", lambda self: nullcontext())


def unfolds_by_arithmetic(monkeypatch):
    """W' − Δ instead of the original W."""

    def unfold(store):
        for path, kept in store.folded.items():
            module = store.model.get_submodule(path)
            for name, original in kept:
                folded = module._parameters[name]
                module._parameters[name] = nn.Parameter(folded - (folded - original), requires_grad=False)
        store.folded.clear()

    monkeypatch.setattr(adaptation_module, "unfold", unfold)


def leaks_keys(monkeypatch):
    """The model's state_dict holds the adapter's tensors too."""
    monkeypatch.setattr(Store, "state_dict", nn.Module.state_dict)


def keeps_the_class(monkeypatch):
    """`remove` leaves the hosts' classes behind."""
    from rankfold.core import attaching

    monkeypatch.setattr(attaching, "release_module", lambda module: None)


def prints_the_folded(monkeypatch):
    """The fingerprint reads whatever weights stand there, folded ones too."""
    from rankfold.training import prints

    monkeypatch.setattr(prints, "store_of", lambda model: None)


MUTANTS = [bakes, stays_on, unfolds_by_arithmetic, leaks_keys, keeps_the_class, prints_the_folded]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__)
def test_the_law_rejects(mutant, monkeypatch, tmp_path):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="law 1"):
        check_base("lora", "linear", tmp_path)


@pytest.mark.parametrize("method", subjects())
def test_the_law_rejects_a_baked_base_under_every_method(method, monkeypatch, tmp_path):
    bakes(monkeypatch)
    with pytest.raises(AssertionError, match="law 1"):
        check_base(method, "block" if rf.method(method).is_side else "linear", tmp_path)
