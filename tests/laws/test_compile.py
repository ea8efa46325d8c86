"""Law 8: compiles. One graph for every structure, forward and backward, and switching among adapters compiles nothing anew."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from dataclasses import dataclass

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import Unsupported

import rankfold as rf
from rankfold.core import planner
from rankfold.core.store import Slot, Store
from rankfold.core.structure import layers
from rankfold.errors import LayoutError
from rankfold.methods.structures.lora import LoRA

from .checks import Checks
from .models import BLOCK, tiny
from .subjects import adapt, cells, refused_by, refuses, shake, small, subjects
from .test_definition import kind_of, outcome
from .tolerances import TOLERANCES

LAW = "compile"
BACKEND = "aot_eager"
"""Traces forward and backward and runs both without code generation: needs no compiler."""

SMALL_KINDS = ("conv1d", "embedding", "rows", "tied", "convolution", "grouped", "experts", "multihead")


def exempt(method):
    """The reason by which a layer of the method is let off this law, or None."""
    return next((layer.exempt[LAW] for layer in layers(method.structure) if LAW in layer.exempt), None)


@contextlib.contextmanager
def compiled(case, backend=BACKEND, fullgraph=True):
    """The case with its model compiled, and nothing remembered from earlier compilations."""
    torch._dynamo.reset()
    model = case.model
    case.model = torch.compile(model, backend=backend, fullgraph=fullgraph)
    try:
        yield case
    finally:
        case.model = model


def check_compiles(method, kind, training=True, backend=BACKEND, dtype=torch.float64):
    """The model is compiled before it ever ran: what an eager pass leaves behind must not be needed."""
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 8, {m}, {kind}") as check:
        case = tiny(kind, dtype)
        if refused_by(m, kind):
            check.that(refuses(case, m), f"trait {refused_by(m, kind)} was not refused")
            return
        a = adapt(case, m)
        shake(a)
        case.model.train(training)
        with compiled(case, backend, fullgraph=exempt(m) is None):
            torch.manual_seed(3)
            try:
                found = outcome(case, a, case.batch)
            except Unsupported as error:
                raise AssertionError(f"law 8, {m}, {kind}: not one graph: {str(error).splitlines()[0]}") from error
        torch.manual_seed(3)
        expected = outcome(case, a, case.batch)
        tolerance = TOLERANCES[dtype]
        check.close(found[0], expected[0], tolerance.value, "compiled: output")
        check.that(found[1].keys() == expected[1].keys(), "compiled: other gradients")
        for name, g in expected[1].items():
            check.close(found[1][name], g, tolerance.grad, f"compiled: gradient of {name}")


@pytest.mark.parametrize("method", subjects())
def test_every_structure_is_one_graph(method):
    check_compiles(method, kind_of(method))


@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_kinds_of_sites_are_one_graph(kind):
    check_compiles("lora", kind)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, of graphs in pieces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("method", "kind"), cells())
def test_every_kind_of_site_is_one_graph(method, kind, training):
    check_compiles(method, kind, training)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(
    ("method", "kind"), [(m, "linear") for m in ("lora", "dora", "hra", "gate+lora")] + [("lora", "experts"), ("dora", "experts")]
)
def test_generated_code_is_the_same_function(method, kind):
    check_compiles(method, kind, training=False, backend="inductor", dtype=torch.float32)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts_are_one_graph_around_torch_s_grouped_product(method, dtype):
    """In float64, where the law runs, the operator holds a loop."""
    check_compiles(method, "experts", dtype=dtype)


# switching


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)


def check_switching(method, adapters=8):
    """`adapters` of one method, used in turn, then one more: each its own function and gradients, all by one graph."""
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 8, {m}, switching") as check:
        case = tiny(BLOCK if m.is_side else "linear")
        for k in range(adapters):
            a = adapt(case, m, name=f"a{k}", seed=k)
            shake(a, seed=k, name=f"a{k}")
        counting, names, model = Counting(), [f"a{k}" for k in range(adapters)], case.model

        def visit(name, expected_graphs):
            a.use(name)
            found = outcome(case, a, case.batch)
            check.that(counting.graphs == expected_graphs, f"{name}: {counting.graphs} graphs, expected {expected_graphs}")
            return found

        with compiled(case, counting):
            seen = {name: visit(name, 1) for name in [*names, "a3", "a0"]}
            adapt(dataclasses.replace(case, model=model), m, name="new", seed=99)  # while the compiled one is in use
            shake(a, seed=99, name="new")
            seen["new"] = visit("new", 1)
            a.remove("a5")
            seen["a6"] = visit("a6", 1)
        for name, (y, grads) in seen.items():
            if name == "a5":
                continue
            a.use(name)
            expected = outcome(case, a, case.batch)
            check.close(y, expected[0], TOLERANCES[torch.float64].value, f"{name}: output")
            for key, g in expected[1].items():
                check.close(grads[key], g, TOLERANCES[torch.float64].grad, f"{name}: gradient of {key}")
        outputs = [y for y, _ in seen.values()]
        check.that(
            all(not torch.equal(y, z) for k, y in enumerate(outputs) for z in outputs[:k]), "two adapters are one function"
        )


QUICK = ["lora", "dora", "pissa", "gate+lora"]


@pytest.mark.parametrize("method", QUICK)
def test_switching_among_eight_adapters_and_adding_one_compiles_nothing(method):
    check_switching(method)


@pytest.mark.full
@pytest.mark.parametrize("method", [s for s in subjects() if s not in QUICK and small(s).structure.core.name != "full"])
def test_switching_adapters_of_every_method_compiles_nothing(method):
    check_switching(method)


def test_on_and_off_compile_once_each():
    with Checks("law 8, on and off") as check:
        case, counting = tiny("linear"), Counting()
        before = case.output()
        a = adapt(case, "lora")
        shake(a)
        on = case.output()
        with compiled(case, counting):
            for _ in range(3):
                check.close(case.output(), on, 1e-12, "on")
                with a.disabled():
                    check.close(case.output(), before, 0.0, "off")
        check.that(counting.graphs == 2, f"{counting.graphs} graphs for on and off")


def test_a_replaced_tensor_reaches_the_compiled_model():
    """What a graph reads is never out of date: a tensor of another rank, a cast, a fold."""
    with Checks("law 8, replaced tensors") as check:
        case = tiny("linear")
        a = adapt(case, "lora")
        shake(a)
        with compiled(case) as c:
            plain = c.output().detach()
            for key, t in a.tensors().items():
                a.store.replace(key, 2.0 * t.detach())
            doubled = c.output().detach()
            check.that(not torch.equal(plain, doubled), "the old tensors are still in use")
            a.fold()
            check.close(c.output().detach(), doubled, 1e-12, "folded")
            a.unfold()
            check.close(c.output().detach(), doubled, 1e-12, "unfolded")
        check.close(case.output().detach(), doubled, 1e-12, "eager")


def test_the_first_pass_of_a_compiled_model_is_watched():
    """A model that is compiled at once keeps its watch open, and the first eager pass closes it."""
    with Checks("law 8, watch") as check:
        case = tiny("linear")
        a = adapt(case, "lora")
        watching = len(a.store.watchers)
        with compiled(case):
            case.output()
        check.that(len(a.store.watchers) == watching, "a traced pass closed the watch, though it counts no calls")
        for training in (True, False):
            case.model.train(training)
            case.output()
        check.that(len(a.store.watchers) < watching, "eager passes of both modes leave the watch open")


# export


@pytest.mark.parametrize("method", ["lora", "dora", "hra", "gate+lora"])
def test_torch_export_takes_an_adapted_model(method):
    with Checks(f"law 8, {method}, export") as check:
        case = tiny("linear")
        a = adapt(case, method)
        shake(a)
        exported = torch.export.export(case.model, (case.batch,))
        other = torch.linspace(-1, 1, case.batch.numel(), dtype=torch.float64).view(case.batch.shape)
        check.close(exported.module()(other).detach(), case.model(other).detach(), 1e-12, "exported program")
        check.close(exported.module()(case.batch).detach(), case.output().detach(), 1e-12, "exported program, its own input")


# What the law must reject


@dataclass(frozen=True, kw_only=True)
class Breaking(LoRA):
    """Decides by a value while the expression is made."""

    def delta(self, t, site, ctx=None):
        op = super().delta(t, site, ctx)
        return op if t.A.sum() > 0 else -1.0 * op


def test_the_law_rejects_a_structure_that_breaks_the_graph():
    method = small("lora")
    mutant = dataclasses.replace(method, structure=Breaking(rank=2))
    with pytest.raises(AssertionError, match="law 8"):
        check_compiles(mutant, "linear")


def drops_the_bias(monkeypatch):
    native = planner._plain
    monkeypatch.setattr(planner, "_plain", lambda program, x, bias: native(program, x, None))


def never_settles(monkeypatch):
    monkeypatch.setattr(Store, "settle", lambda self: None)


def keeps_old_tensors(monkeypatch):
    """A graph goes on reading what it was traced with, whatever was switched since."""
    native = Slot.t
    first = lambda self, store: next(iter(store.members.values())).slots[self.site.key]
    monkeypatch.setattr(Slot, "t", lambda self, store: native(first(self, store), store))


MUTANTS = [
    (drops_the_bias, lambda: check_compiles("lora", "linear")),
    (never_settles, lambda: check_switching("lora")),
    (keeps_old_tensors, lambda: check_switching("lora")),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=[f.__name__ for f, _ in MUTANTS])
def test_the_law_rejects(mutant, law, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="law 8"):
        law()


def test_a_compiled_model_knows_its_adaptation():
    case = tiny("linear")
    model = torch.compile(case.model, backend=BACKEND)
    with pytest.raises(LayoutError, match="_orig_mod"):
        rf.adapt(model, "lora", rank=2)
    a = adapt(case, "lora")
    assert rf.adaptation(model) is a
