"""Law 4: save, load, the same function, bit by bit, without re-running an init; and only on the base that it was made for."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
import torch

import rankfold as rf
from rankfold.adapters.fingerprint import Comparison
from rankfold.core import attaching, registry
from rankfold.errors import FingerprintError
from rankfold.training import saving
from rankfold.training.saving import load

from .checks import Checks
from .models import BLOCK, tiny
from .subjects import adapt, cells, refused_by, refuses, shake, small, subjects, train


@contextlib.contextmanager
def nothing_starts():
    """Within the block no init fills and no start law is asked."""

    def refuse(*args, **kwargs):
        raise AssertionError("law 4: a start was made anew while loading")

    with pytest.MonkeyPatch.context() as patch:
        for entry in registry.entries("init"):
            patch.setattr(registry.resolve(entry), "fill", refuse)
        patch.setattr(attaching, "StartContext", refuse)
        yield


def check_reload(method, kind, folder, dtype=torch.float64):
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 4, {m}, {kind}, {dtype}") as check:
        case = tiny(kind, dtype)
        if refused_by(m, kind):
            check.that(refuses(case, m), f"trait {refused_by(m, kind)} was not refused")
            return
        a = adapt(case, m)
        shake(a)
        train(case, a)
        a.save(folder / "one")
        twin = case.again()
        with nothing_starts():
            b = load(twin.model, folder / "one")
        check.that(b.method == a.method or str(b.method) == str(a.method), f"loaded as {b.method}")
        check.that(b.method.parts == a.method.parts, f"loaded with other options: {b.method.describe()}")
        check.that([s.key for s in b.sites] == [s.key for s in a.sites], "loaded at other sites")
        ours, theirs = a.tensors(), b.tensors()
        check.that(list(ours) == list(theirs), f"loaded tensors {sorted(theirs)}, saved {sorted(ours)}")
        for name, tensor in ours.items():
            check.bitwise(theirs[name].detach(), tensor.detach(), name)
            check.that(theirs[name].requires_grad == tensor.requires_grad, f"{name}: trains before and not after, or the reverse")
        for training in (False, True):
            for side in (case, twin):
                side.model.train(training)
            torch.manual_seed(2)
            y = case.output().detach()
            torch.manual_seed(2)
            check.bitwise(twin.output().detach(), y, f"output after loading (training={training})")
        b.save(folder / "two")
        for file in sorted((folder / "one").iterdir()):
            same = file.read_bytes() == (folder / "two" / file.name).read_bytes()
            check.that(same, f"saved again, {file.name} has other bytes")
        for side, handle in ((case, a), (twin, b)):
            torch.manual_seed(4)
            train(side, handle)
        for name, tensor in a.tensors().items():
            check.bitwise(b.tensors()[name].detach(), tensor.detach(), f"trained on after loading: {name}")


def check_base_is_asked(method, folder):
    """Same base: no word. Its bf16 copy: allowed, and said. A tuned copy: refused, unless told."""
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 4, {m}, fingerprint") as check:
        kind = BLOCK if m.is_side else "linear"
        case = tiny(kind, torch.float32)
        a = adapt(case, m)
        a.save(folder / "adapter")
        tuned = case.pristine()
        with torch.no_grad():
            for p in tuned.parameters():
                p.mul_(1.01)
        try:
            load(tuned, folder / "adapter")
        except FingerprintError as error:
            check.that("force" in str(error), f"the refusal does not say what to type: {error}")
        else:
            check.that(False, "an adapter went onto another base")
        load(tuned, folder / "adapter", force=True)
        stored = case.pristine().to(torch.bfloat16)
        with pytest.warns(UserWarning, match="other storage"):
            load(stored, folder / "adapter")


@pytest.mark.parametrize(("method", "kind"), cells())
def test_a_loaded_adapter_is_the_saved_one(method, kind, tmp_path):
    check_reload(method, kind, tmp_path)


@pytest.mark.parametrize("method", subjects())
def test_a_loaded_adapter_is_the_saved_one_over_bf16(method, tmp_path):
    check_reload(method, BLOCK if rf.method(method).is_side else "linear", tmp_path, torch.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "kind"), cells())
def test_a_loaded_adapter_is_the_saved_one_in_every_dtype(method, kind, dtype, tmp_path):
    check_reload(method, kind, tmp_path, dtype)


@pytest.mark.parametrize("method", subjects())
def test_an_adapter_asks_for_its_base(method, tmp_path):
    check_base_is_asked(method, tmp_path)


def test_a_name_chosen_at_load_is_only_a_name(tmp_path):
    """Two adapters in two files come onto one model under names of their own."""
    with Checks("law 4, names") as check:
        made = []
        for seed in (1, 2):
            case = tiny("linear")
            a = adapt(case, "lora")
            shake(a, seed=seed)
            a.save(tmp_path / str(seed))
            made.append(case.output().detach())
        both = tiny("linear")
        load(both.model, tmp_path / "1", name="one")
        handle = load(both.model, tmp_path / "2", name="two")
        for name, y in zip(("one", "two"), made):
            handle.use(name)
            check.bitwise(both.output().detach(), y, name)


# What the law must reject


def starts_anew(monkeypatch):
    """Loading attaches as adapting does, and pays no heed to the file."""
    native = saving.attach
    monkeypatch.setattr(
        saving, "attach", lambda model, name, sites, structures, fill, seed: native(model, name, sites, structures, None, seed)
    )


def loses_a_tensor(monkeypatch):
    """What is frozen is not in the file: it will be drawn again."""
    native = saving.attach

    def attach(model, name, sites, structures, fill, seed):
        keep = lambda specs, values: {n: v for n, v in values.items() if specs[n].trainable}
        return native(model, name, sites, structures, lambda s, st, b, specs: keep(specs, fill(s, st, b, specs)), seed)

    monkeypatch.setattr(saving, "attach", attach)


def saves_in_bf16(monkeypatch):
    native = saving.save_native

    def save_native(path, record):
        tensors = {
            k: {n: t.bfloat16().to(t.dtype) if t.is_floating_point() else t for n, t in own.items()}
            for k, own in record.tensors.items()
        }
        native(path, dataclasses.replace(record, tensors=tensors))

    monkeypatch.setattr(saving, "save_native", save_native)


def forgets_options(monkeypatch):
    """The method is saved by name alone: alpha is lost."""
    native = saving.save_native

    def save_native(path, record):
        native(path, dataclasses.replace(record, options={k: v for k, v in record.options.items() if not k.endswith("alpha")}))

    monkeypatch.setattr(saving, "save_native", save_native)


def takes_any_base(monkeypatch):
    monkeypatch.setattr(saving, "compare", lambda a, b: Comparison("same", 0.0, None, "surely"))


ALPHA = {"rank": 2, "alpha": 3.0}
MUTANTS = [
    (starts_anew, lambda folder: check_reload("lora", "linear", folder)),
    (loses_a_tensor, lambda folder: check_reload("vera", "linear", folder)),
    (loses_a_tensor, lambda folder: check_reload("shira", "linear", folder)),
    (loses_a_tensor, lambda folder: check_reload("lora+init:pissa", "linear", folder)),
    (saves_in_bf16, lambda folder: check_reload("lora", "linear", folder)),
    (forgets_options, lambda folder: check_reload(rf.method("lora", **ALPHA), "linear", folder)),
    (takes_any_base, lambda folder: check_base_is_asked("lora", folder)),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=[f"{k}-{f.__name__}" for k, (f, _) in enumerate(MUTANTS)])
def test_the_law_rejects(mutant, law, monkeypatch, tmp_path):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="law 4"):
        law(tmp_path)


@pytest.mark.parametrize("method", subjects())
def test_the_law_rejects_a_start_made_anew_under_every_method(method, monkeypatch, tmp_path):
    starts_anew(monkeypatch)
    with pytest.raises(AssertionError, match="law 4"):
        check_reload(method, BLOCK if rf.method(method).is_side else "linear", tmp_path)


def test_no_path_of_this_machine_is_in_the_file(tmp_path):
    with Checks("law 4, contents") as check:
        case = tiny("linear")
        adapt(case, "lora").save(tmp_path / "adapter")
        text = json.dumps(json.loads((tmp_path / "adapter" / "adapter.json").read_text()))
        check.that(str(tmp_path) not in text, "the folder's own path is in the file")
