"""Law 3: the definition is every plan, the fused kernel and the folded weight: forward and all gradients."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rankfold as rf
from rankfold.core import base as base_module
from rankfold.core import folding, host, planner
from rankfold.core.kinds import convolution, experts
from rankfold.core.kinds import kind as kind_module
from rankfold.core.structure import trait
from rankfold.errors import CompositionError, LayoutError
from rankfold.kernels import lowrank, magnitude
from rankfold.linalg import LowRank

from . import oracles
from .checks import Checks
from .definition import Definition, gradients
from .models import BLOCK, tiny
from .subjects import adapt, cells, refused_by, refuses, shake, small, subjects, train
from .tolerances import TOLERANCES

RUNS = [
    ("auto", "auto"),
    ("fused", "auto"),
    ("structured", "keep"),
    ("structured", "recompute"),
    ("effective", "auto"),
    ("plain", "auto"),
]


def kind_of(method):
    return BLOCK if rf.method(method).is_side else "linear"


def probe_of(y):
    """A fixed cotangent without symmetry."""
    return torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)


def outcome(case, adaptation, x, wanted=None):
    """(y, {gradient}) of the adapted model: with respect to its input and every tensor that trains."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    keys = {k: t for name in adaptation.active for k, t in adaptation.tensors(name).items() if t.requires_grad}
    y = case.model(x)
    return y.detach(), gradients(y, probe_of(y), {**({"x": x} if x.is_floating_point() else {}), **keys, **(wanted or {})})


def defined(definition, x, wanted=None):
    """The same by definition, in float64."""
    x = x.detach().clone()
    x = x.double().requires_grad_() if x.is_floating_point() else x
    keys = {k: t for k, t in definition.leaves.items() if t.requires_grad}
    y = definition(x)
    return y.detach(), gradients(y, probe_of(y), {**({"x": x} if x.is_floating_point() else {}), **keys, **(wanted or {})})


def compare(check, found, expected, dtype, where):
    (y, grads), (y0, grads0) = found, expected
    tolerance = TOLERANCES[dtype]
    check.close(y, y0, tolerance.value, f"{where}: output")
    check.that(grads.keys() == grads0.keys(), f"{where}: gradients of {sorted(grads)}, expected {sorted(grads0)}")
    largest = max((g.norm().item() for g in grads0.values()), default=0.0)
    for name, g0 in grads0.items():
        # a gradient that nearly cancels is compared with the largest of the model
        gap, size = (grads[name].double() - g0).norm().item(), max(g0.norm().item(), 0.02 * largest) or 1.0
        check.that(gap <= tolerance.grad * size, f"{where}: gradient of {name} is off by {gap / size:.3g} > {tolerance.grad:.1g}")


def check_definition(method, kind, dtype=torch.float64, oracle=None, x=None, runs=RUNS):
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 3, {m}, {kind}, {dtype}") as check:
        case = tiny(kind, dtype)
        if refused_by(m, kind):
            check.that(refuses(case, m), f"trait {refused_by(m, kind)} was not refused")
            return
        a = adapt(case, m)
        case.output()  # whatever is remembered from here is out of date below
        shake(a)
        x = case.batch if x is None else x.to(dtype) if x.is_floating_point() else x
        expected = defined(Definition(case, a, oracle), x)
        ran = 0
        for plan, memory in runs if not (m.is_side or (case.takes_tokens and kind != "tied")) else runs[:1]:
            a.store.plan, a.store.memory = plan, memory
            try:
                found = outcome(case, a, x)
            except LayoutError:
                check.that(plan not in ("auto", "plain"), f"plan {plan} must run everything")
                continue
            ran += 1
            compare(check, found, expected, dtype, f"plan {plan}, memory {memory}")
        check.that(ran >= min(2, len(runs)) or m.is_side or case.takes_tokens, "fewer than two plans ran")
        a.store.plan, a.store.memory = "auto", "auto"
        if not (m.is_side or trait(m.structure, "input_dependent")):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fold: .* shared its weight")
                a.fold()
            check.close(case.model(x).detach(), expected[0], TOLERANCES[dtype].value, "folded: output")


@pytest.mark.parametrize(("method", "kind"), cells())
def test_every_plan_is_the_definition(method, kind):
    check_definition(method, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", subjects())
def test_every_plan_is_the_definition_in_every_dtype(method, dtype):
    check_definition(method, kind_of(method), dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "kind"), cells())
def test_every_kind_is_the_definition_in_every_dtype(method, kind, dtype):
    check_definition(method, kind, dtype)


@pytest.mark.parametrize("method", [s for s in subjects() if oracles.has_formula(rf.method(s).structure)])
def test_the_definition_is_the_formula(method):
    formula = lambda slot, W, t: oracles.weight(W, t, slot.structure)
    for kind in ("linear", "rows"):
        check_definition(method, kind, oracle=formula, runs=RUNS[:1])


def test_formulas_cover_the_structures_of_the_first_issue():
    with Checks("law 3, formulas") as check:
        names = {part.name for s in subjects() for part in rf.method(s).parts if part.axis == "structure"}
        check.that(names >= oracles.FORMULAS.keys(), f"formulas of nobody: {sorted(oracles.FORMULAS.keys() - names)}")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_whole_tensors_that_belong_to_the_adapter(dtype):
    """A head that trains whole beside an adapted layer, in the dtype of the model, folded or not."""
    with Checks(f"law 3, extras, {dtype}") as check:
        case = tiny("linear", dtype)
        a = rf.adapt(case.model, small("lora"), targets=["first"], extras=["second"])
        shake(a)
        expected = defined(Definition(case, a), case.batch)
        compare(check, outcome(case, a, case.batch), expected, dtype, "live")
        a.fold()
        check.close(case.output().detach(), expected[0], TOLERANCES[dtype].value, "folded: output")


SHAPES = {
    "2-D": torch.linspace(-1, 1, 24).view(3, 8),
    "1-D": torch.linspace(-1, 1, 8),
    "4-D": torch.linspace(-1, 1, 96).view(2, 3, 2, 8).sin(),
    "strided": torch.linspace(-1, 1, 96).view(8, 4, 3).sin().permute(2, 1, 0)[:, ::2],
    "expanded": torch.linspace(-1, 1, 8).expand(3, 5, 8),
    "empty": torch.zeros(0, 5, 8),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [s for s in subjects() if not rf.method(s).is_side])
def test_every_shape_of_input(method, shape):
    check_definition(method, "linear", x=SHAPES[shape])


def check_autocast(method):
    """A float32 base under autocast, against the float64 definition: the products are bf16's."""
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 3, {m}, autocast") as check:
        case = tiny(BLOCK if m.is_side else "linear", torch.float32)
        a = adapt(case, m)
        shake(a)
        expected = defined(Definition(case, a), case.batch)
        for plan, memory in RUNS if not m.is_side else RUNS[:1]:
            a.store.plan, a.store.memory = plan, memory
            try:
                with torch.autocast("cpu", torch.bfloat16):
                    found = outcome(case, a, case.batch)
            except LayoutError:
                continue
            check.that(
                found[0].dtype == torch.bfloat16, f"plan {plan}: {found[0].dtype} under autocast, where nn.Linear gives bf16"
            )
            compare(check, found, expected, torch.bfloat16, f"plan {plan}, memory {memory}, autocast")


@pytest.mark.parametrize("method", subjects())
def test_autocast_changes_only_the_rounding(method):
    check_autocast(method)


def check_recomputation(method, dtype=torch.float64):
    """In training mode: gradient checkpointing gives the same bits, and the plans agree under one seed of dropout."""
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 3, {m}, checkpointing") as check:
        case = tiny(BLOCK if m.is_side else "linear", dtype)
        a = adapt(case, m)
        shake(a)
        case.model.train()
        model, plain = case.model, None
        for plan, memory in RUNS[::-1] if not m.is_side else RUNS[:1]:  # "plain" first
            a.store.plan, a.store.memory = plan, memory
            try:
                torch.manual_seed(3)
                direct = outcome(case, a, case.batch)
            except LayoutError:
                continue
            torch.manual_seed(3)
            case.model = lambda x: checkpoint(model, x, use_reentrant=False)
            again = outcome(case, a, case.batch)
            case.model = model
            check.bitwise(again[0], direct[0], f"plan {plan}, memory {memory}: output under checkpointing")
            for name, g in direct[1].items():
                check.bitwise(again[1][name], g, f"plan {plan}, memory {memory}: gradient of {name} under checkpointing")
            plain = plain or direct
            compare(check, direct, (plain[0], {k: g.double() for k, g in plain[1].items()}), dtype, f"training mode, plan {plan}")


@pytest.mark.parametrize("method", subjects())
def test_checkpointing_and_dropout_agree_over_the_plans(method):
    check_recomputation(method)


def check_copies(method):
    """deepcopy gives an independent model of the same function; `.to` there and back gives the same bits."""
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 3, {m}, copies") as check:
        case = tiny(BLOCK if m.is_side else "linear", torch.float32)
        a = adapt(case, m)
        shake(a)
        y = case.output().detach()
        twin = case.again()
        twin.model = copy.deepcopy(case.model)
        check.bitwise(twin.output().detach(), y, "deepcopy: output")
        handle = rf.adaptation(twin.model)
        check.that(handle.model is twin.model, "deepcopy: the handle still holds the first model")
        own = {p.data_ptr() for p in case.model.parameters()}
        check.that(not own & {p.data_ptr() for p in handle.parameters()}, "deepcopy: tensors are shared")
        train(twin, handle)
        check.bitwise(case.output().detach(), y, "training a deepcopy moved the first model")
        check.that(not torch.equal(twin.output().detach(), y), "training a deepcopy moved nothing")
        case.model.to(torch.float64)
        wide = case.model(case.batch.double()).detach()
        check.close(wide, y, TOLERANCES[torch.float32].value, ".to(float64): output")
        check.that(all(p.dtype == torch.float64 for p in a.parameters()), ".to(float64) left tensors behind")
        case.model.to(torch.float32)
        check.bitwise(case.output().detach(), y, ".to(float64) and back: output")
        check.that(len(train(case, a)) == 2, "training after .to failed")


@pytest.mark.parametrize("method", subjects())
def test_copies_and_casts_change_nothing(method):
    check_copies(method)


def check_sum(method):
    """Two adapters at once, one at a weight that trains: W + w₁ (W₁ − W) + w₂ (W₂ − W)."""
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 3, {m}, two adapters") as check:
        case = tiny(BLOCK if m.is_side else "linear")
        a = adapt(case, m)
        if trait(m.structure, "owns"):
            with pytest.raises(CompositionError):
                a.use("default", weight=0.5)
            check.that(True, "an adapter that owns whole tensors was refused a weight")
            return
        shake(a)
        adapt(case, m, name="second")
        shake(a, seed=8, name="second")
        first, second = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), -1.5
        a.use("default", "second", weight=[first, second])
        expected = defined(Definition(case, a), case.batch, {"weight": first})
        for plan, memory in RUNS if not m.is_side else RUNS[:1]:
            a.store.plan, a.store.memory = plan, memory
            try:
                found = outcome(case, a, case.batch, {"weight": first})
            except LayoutError:
                check.that(plan not in ("auto", "plain"), f"plan {plan} must run everything")
                continue
            compare(check, found, expected, torch.float64, f"two adapters, plan {plan}, memory {memory}")


@pytest.mark.parametrize("method", subjects())
def test_several_adapters_are_the_sum_of_their_changes(method):
    check_sum(method)


def check_second_derivatives(method):
    """∂²: by plan "plain" as defined; by every other plan the same, or an error, never something else."""
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 3, {m}, second derivatives") as check:
        case = tiny(BLOCK if m.is_side else "linear")
        a = adapt(case, m)
        shake(a)
        definition = Definition(case, a)
        x = case.batch.clone().requires_grad_()

        def curvature(forward, tensors):
            first = torch.autograd.grad(
                (forward(x).sin() * probe_of(case.output())).sum(), tensors, create_graph=True, allow_unused=True
            )
            return torch.autograd.grad(sum((g * g).sum() for g in first if g is not None), x)[0]

        expected = curvature(definition, [t for t in definition.leaves.values() if t.requires_grad])
        for plan, memory in RUNS if not m.is_side else RUNS[:1]:
            a.store.plan, a.store.memory = plan, memory
            try:
                found = curvature(case.model, a.parameters())
            except LayoutError:
                check.that(plan != "plain", "plan plain has no second derivative")
                continue
            check.close(found, expected, TOLERANCES[torch.float64].grad, f"plan {plan}, memory {memory}: second derivative")


@pytest.mark.parametrize("method", subjects())
def test_second_derivatives_are_right_or_refused(method):
    check_second_derivatives(method)


def check_small_gain(method):
    """A bf16 base whose row lengths grow by 0.6 %. A bf16 gain would be 0.78 %; over many tokens the mean tells which it was."""
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 3, {m}, gain in bf16") as check:
        case = tiny("linear", torch.bfloat16)
        case.targets = ["first"]
        x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
        before = case.model.first(x).float()
        a = adapt(case, m)
        with torch.no_grad():
            for trainable in a.trainables():
                if trainable.role == "magnitude":
                    trainable.param.mul_(1.006)
        change = case.model.first(x).float() - before
        unbiased = before - case.model.first.bias.float()
        slope = ((change * unbiased).sum() / unbiased.square().sum()).item()
        check.that(abs(slope - 0.006) < 0.0012, f"gain of 0.6 % arrives as {100 * slope:.3f} %")


def magnitudes():
    return [s for s in subjects() if any(p.name == "magnitude" for p in rf.method(s).parts if p.axis == "structure")]


@pytest.mark.parametrize("method", magnitudes())
def test_a_small_gain_survives_bf16(method):
    check_small_gain(method)


def test_context_weights_take_the_place_of_a_gate():
    with Checks("law 3, context weights") as check:
        for method in subjects():
            m = small(method)
            if not trait(m.structure, "input_dependent"):
                continue
            case = tiny("linear")
            a = adapt(case, m)
            shake(a)
            free = case.output().detach()
            weights = torch.tensor([0.9, -0.4], dtype=torch.float64)
            with a.context(weights=weights):
                expected = defined(Definition(case, a, weights=weights), case.batch)
                found = outcome(case, a, case.batch)
                check.close(found[0], expected[0], TOLERANCES[torch.float64].value, f"{m}: output under context weights")
                check.that(not torch.equal(found[0], free), f"{m}: context weights changed nothing")
            check.bitwise(case.output().detach(), free, f"{m}: output after the context")


# What the law must reject


def doubles_the_scale(monkeypatch):
    native = lowrank.combine
    monkeypatch.setattr(lowrank, "combine", lambda y, x, B, A, scale, p: native(y, x, B, A, 2.0 * scale, p))


def forgets_the_gradient_scale(monkeypatch):
    native = lowrank.gradients

    def gradients_(g, gx, x, h, B, A, scale, rank, p):
        gB, gA = native(g, gx, x, h, B, A, scale, rank, p)
        return gB, gA / scale

    monkeypatch.setattr(lowrank, "gradients", gradients_)


def forgets_the_input_gradient(monkeypatch):
    native = lowrank.gradients
    monkeypatch.setattr(lowrank, "gradients", lambda g, gx, *rest: native(g, None, *rest))


def transposes_a_factor(monkeypatch):
    monkeypatch.setattr(LowRank, "dense", lambda self: (self.factors()[0] @ self.factors()[1]).mT.reshape(self.shape))


def drops_the_bias(monkeypatch):
    native = base_module.DenseBase.matmul
    monkeypatch.setattr(base_module.DenseBase, "matmul", lambda self, x, bias=None: native(self, x))


def drops_the_offset(monkeypatch):
    monkeypatch.setattr(lowrank, "stack_factors", lambda B, A, B0, A0, dtype: (B.to(dtype), A.to(dtype)))


def reads_other_rows(monkeypatch):
    native = base_module.DenseBase.W.fget

    def W(self):
        rows = self.site.rows
        if rows is None or rows[0] == 0:
            return native(self)
        return native(dataclasses.replace(self, site=dataclasses.replace(self.site, rows=(rows[0] - 1, rows[1] - 1))))

    monkeypatch.setattr(base_module.DenseBase, "W", property(W))


def biases_of_other_rows(monkeypatch):
    monkeypatch.setattr(kind_module, "rows_of", lambda bias, rows: None if bias is None else bias[: rows[1] - rows[0]])


def folds_the_base(monkeypatch):
    monkeypatch.setattr(folding, "fold_weight", lambda program: program.base.dense())


def columns_without_scale(monkeypatch):
    monkeypatch.setattr(LowRank, "columns", lambda self, index: self.A.mT[..., index, :] @ self.B.mT)


def effective_without_change(monkeypatch):
    native = planner._pullback
    monkeypatch.setattr(planner, "_pullback", lambda y, gy, inputs: [g if g is None else 0.0 * g for g in native(y, gy, inputs)])


def only_the_first_adapter(monkeypatch):
    native = host.site_program
    monkeypatch.setattr(host, "site_program", lambda store, slots, training: native(store, slots[:1], training))


def draws_dropout_anew(monkeypatch):
    anew = lambda drop, gone: None if drop is None else (drop[0], int(torch.randint(0, 2**62, ())))
    monkeypatch.setattr(lowrank, "kept_drop", anew)


def rounds_the_gain(monkeypatch):
    monkeypatch.setattr(magnitude, "amplify", lambda u, gain: u * gain.to(u.dtype))


def remembers_the_norm(monkeypatch):
    """Row norms formed once, and never again when tensors move."""
    first: dict = {}
    monkeypatch.setattr(planner, "_norm", lambda program, op, f: first.setdefault(id(program), op.norm()))


def differentiates_twice(monkeypatch):
    """The fused function without its mark: second derivatives come out, and are wrong."""
    monkeypatch.setattr(lowrank._LowRankLinear, "backward", staticmethod(lowrank._LowRankLinear.backward.__wrapped__))


def forgets_the_dilation(monkeypatch):
    native = convolution.Convolving.product
    narrow = lambda how: dataclasses.replace(how, dilation=(1,) * len(how.kernel))

    def product(self, x, W, bias=None):
        rows, columns = native(self, x, W).shape[-2:]
        return native(narrow(self), x, W, bias)[..., :rows, :columns]

    monkeypatch.setattr(convolution.Convolving, "product", product)


def swaps_the_groups(monkeypatch):
    native = convolution.Convolving.product
    turn = lambda how, W: W.flip(0) if W.ndim == 3 and how.after == how else W
    monkeypatch.setattr(convolution.Convolving, "product", lambda self, x, W, bias=None: native(self, x, turn(self, W), bias))


def asks_another_expert(monkeypatch):
    native = experts.Routed.product
    monkeypatch.setattr(
        experts.Routed, "product", lambda self, x, W, bias=None: native(self, x, W.roll(1, 0) if W.shape[-2] == 2 else W, bias)
    )


def gradients_of_another_expert(monkeypatch):
    native = experts.Routed.weight_gradient
    monkeypatch.setattr(experts.Routed, "weight_gradient", lambda self, g, x: native(self, g, x).roll(1, 0))


lora = "lora"
with_scale = {"rank": 2, "alpha": 3.0}
MUTANTS = [
    (doubles_the_scale, lambda: check_definition(lora, "linear")),
    (forgets_the_gradient_scale, lambda: check_definition(rf.method(lora, **with_scale), "linear")),
    (forgets_the_input_gradient, lambda: check_definition(lora, "linear")),
    (transposes_a_factor, lambda: check_definition(lora, "linear")),
    (drops_the_bias, lambda: check_definition(lora, "linear")),
    (drops_the_bias, lambda: check_definition(lora, "conv1d")),
    (drops_the_offset, lambda: check_definition("lora+init:pissa", "linear")),
    (forgets_the_dilation, lambda: check_definition(lora, "convolution")),
    (swaps_the_groups, lambda: check_definition(lora, "grouped")),
    (asks_another_expert, lambda: check_definition(lora, "experts")),
    (gradients_of_another_expert, lambda: check_definition(lora, "experts")),
    (gradients_of_another_expert, lambda: check_definition("hira", "experts")),
    (reads_other_rows, lambda: check_definition(lora, "rows")),
    (biases_of_other_rows, lambda: check_definition(lora, "rows")),
    (folds_the_base, lambda: check_definition(lora, "linear")),
    (columns_without_scale, lambda: check_definition(rf.method(lora, **with_scale), "embedding")),
    (effective_without_change, lambda: check_definition("hira", "linear")),
    (only_the_first_adapter, lambda: check_sum(lora)),
    (draws_dropout_anew, lambda: check_recomputation("dropout+lora")),
    (rounds_the_gain, lambda: check_small_gain("magnitude+lora")),
    (remembers_the_norm, lambda: check_definition("magnitude+lora", "linear")),
    (differentiates_twice, lambda: check_second_derivatives(lora)),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=[f"{k}-{f.__name__}" for k, (f, _) in enumerate(MUTANTS)])
def test_the_law_rejects(mutant, law, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="law 3"):
        law()


@pytest.mark.parametrize(("method", "kind"), [(s, kind_of(s)) for s in subjects()])
def test_the_law_rejects_a_wrong_forward_of_every_method(method, kind, monkeypatch):
    """Every site's output is off by one part in a thousand."""
    native = host.Host.forward

    def forward(self, *args):
        y = native(self, *args)
        on = self.store.enabled and self.store.active and not self.store.is_folded
        return host._first(y, lambda h: 1.001 * h) if on else y

    monkeypatch.setattr(host.Host, "forward", forward)
    with pytest.raises(AssertionError, match="law 3"):
        check_definition(method, kind)
