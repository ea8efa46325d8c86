"""Law 7: honest cost. Parameters from unique storage, shared tensors once, bytes kept by autograd within what a plan states."""

from __future__ import annotations

import dataclasses
import math
import weakref

import pytest
import torch
from safetensors import safe_open

import rankfold as rf
from rankfold.core import attaching, planner
from rankfold.core.host import site_program
from rankfold.errors import LayoutError
from rankfold.training.adaptation import Adaptation

from .checks import Checks
from .models import BLOCK, tiny
from .subjects import adapt, cells, refused_by, refuses, shake, small, subjects

TOKENS = 64


def declared(a):
    """{name: numbers} of every tensor that the structures declare, those of the model or a group once, at the joined shape."""
    requests = {}
    for slot in a.slots():
        for name, spec in slot.structure.tensors(slot.site).items():
            owner = {"model": "model", "group": f"group {slot.site.group or slot.site.name}"}.get(spec.scope, slot.site.key)
            if spec.scope != "emitted":
                shape = (slot.site.batch, *spec.shape) if slot.site.batch and spec.scope == "site" else spec.shape
                requests.setdefault((owner, name), []).append(dataclasses.replace(spec, shape=shape))
    sizes = {}
    for key, specs in requests.items():
        shapes = [s.shape for s in specs]
        if specs[0].join == "max":
            size = math.prod(max(d) for d in zip(*shapes))
        else:
            size = sum(math.prod(s) for s in shapes) if specs[0].join == "cat" else math.prod(shapes[0])
        sizes[key] = (size, specs[0].trainable)
    return sizes


def check_count(method, kind, folder):
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 7, {m}, {kind}") as check:
        case = tiny(kind)
        if refused_by(m, kind):
            check.that(refuses(case, m), f"trait {refused_by(m, kind)} was not refused")
            return
        a = adapt(case, m)
        sizes = declared(a)
        extras = sum(a.store.tensor(e.key).numel() for e in a._get(None).member.extras.values())
        trained = extras + sum(size for size, trains in sizes.values() if trains)
        everything = extras + sum(size for size, _ in sizes.values())
        check.that(a.parameter_count() == trained, f"counts {a.parameter_count()} numbers that train; declared are {trained}")
        tensors = list(a.tensors().values())
        storages = {t.untyped_storage().data_ptr(): t for t in tensors if t.numel()}
        held = sum(t.untyped_storage().nbytes() // t.element_size() for t in storages.values())
        check.that(held == everything, f"{held} numbers in memory; declared are {everything}")
        registered = [p for n, p in case.model.named_parameters() if n.startswith("rankfold.") and p.requires_grad]
        check.that(sum(p.numel() for p in registered) == trained, "the model's own parameters say otherwise")
        optimizer = a.optimizer(lr=0.1, total_steps=4 if m.rank.steps else None)
        given = [p for group in optimizer.param_groups for p in group["params"]]
        check.that(len({id(p) for p in given}) == len(given), "the optimizer holds a tensor twice")
        check.that(
            sum(p.numel() for p in given) == trained,
            f"the optimizer holds {sum(p.numel() for p in given)} numbers, not {trained}",
        )
        a.save(folder / "adapter")
        with safe_open(folder / "adapter" / "adapter.safetensors", "pt") as file:
            names = [n for n in file.keys() if not n.startswith("base:")]  # noqa: SIM118 - not a dict
            stored = sum(math.prod(file.get_slice(n).get_shape()) for n in names)
        check.that(stored == everything, f"{stored} numbers in the file; declared are {everything}")


class Held:
    """A saved tensor; alive for as long as the graph that saved it."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept_bytes(case, module, x):
    """Bytes that autograd keeps for the backward pass of one module: each storage once, without parameters, input and output."""
    saved = []

    def pack(t):
        held = Held(t)
        saved.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        y = module(x)
    own = [*case.model.parameters(), *case.model.buffers(), x, y]
    known = {t.untyped_storage().data_ptr() for t in own}
    alive = [held.tensor.untyped_storage() for ref in saved if (held := ref()) is not None]
    return sum({s.data_ptr(): s.nbytes() for s in alive if s.data_ptr() not in known}.values()), y


def stated(a, plan, size, out, in_):
    """Bytes that a plan states to keep at a site beside its input, its output, the base and the adapter's own tensors.

    fused: h = x Aᵀ [tokens, R], factors where the structure forms them from its tensors, the norm and the gain [out], with R the
    inner width of the product (2·rank where it is a deviation); structured with recompute: what enters and leaves its terms, at
    most one more [tokens, in] and two more [tokens, out]; effective: nothing.
    """
    if plan == "effective":
        return 0
    lengths = 8 * 4 * out
    if plan == "structured":
        return size * TOKENS * (in_ + 2 * out) + lengths
    program = site_program(a.store, a.slots(), training=False)
    form = planner._fused_form(program.expression(), program.base)
    width = 0 if form.A is None else form.A.shape[0] * (1 if form.A0 is None else 2)
    return size * TOKENS * width + 3 * 4 * width * (out + in_) + lengths


def check_kept(method, dtype=torch.float32):
    m = small(method) if isinstance(method, str) else method
    with Checks(f"law 7, {m}, kept bytes, {dtype}") as check:
        case = tiny("linear", dtype)
        case.targets = ["first"]
        a = adapt(case, m)
        shake(a)
        x = torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        ran = 0
        for plan, memory in (("fused", "auto"), ("structured", "recompute"), ("effective", "auto")):
            a.store.plan, a.store.memory = plan, memory
            try:
                found, y = kept_bytes(case, case.model.first, x)
            except LayoutError:
                continue
            ran += 1
            allowed = stated(a, plan, x.element_size(), 12, 8)
            check.that(found <= allowed, f"plan {plan}, memory {memory}: keeps {found} bytes, states {allowed}")
            y.sum().backward()
        check.that(ran > 0, "no plan with a stated bound runs this")


@pytest.mark.parametrize(("method", "kind"), cells())
def test_numbers_are_counted_once(method, kind, tmp_path):
    check_count(method, kind, tmp_path)


def weights_only():
    return [s for s in subjects() if not rf.method(s).is_side]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", weights_only())
def test_a_plan_keeps_what_it_states(method, dtype):
    check_kept(method, dtype)


# What the law must reject


def copies_what_is_shared(monkeypatch):
    """Every site gets a tensor of its own where one for the model was declared."""
    monkeypatch.setattr(attaching, "_key", lambda member, site, name, spec: f"{member.name}/{site.key}/{name}")


def counts_twice(monkeypatch):
    native = Adaptation.parameter_count
    monkeypatch.setattr(Adaptation, "parameter_count", lambda self, name=None: 2 * native(self, name))


def trains_the_frozen(monkeypatch):
    from rankfold.core.store import Store

    native = Store.put
    monkeypatch.setattr(Store, "put", lambda self, key, value, trainable: native(self, key, value, True))


def keeps_casts(monkeypatch):
    """A low-rank path in plain autograd, which keeps bf16 copies of its factors and every intermediate."""

    def lowrank_linear(x, base, bias, B, A, scale=1.0, B0=None, A0=None, drop=None, path=None, memory="auto"):
        y = base.matmul(x, bias)
        return (y * 1.0) * torch.ones_like(y) + scale * ((x @ A.to(x.dtype).mT) @ B.to(x.dtype).mT)

    monkeypatch.setattr(planner, "lowrank_linear", lowrank_linear)


def keeps_the_weight(monkeypatch):
    """The effective plan in plain autograd: W' lives until backward."""

    class Kept:
        @staticmethod
        def apply(program, x, bias, *leaves):
            return torch.nn.functional.linear(x, program.expression().dense().to(x.dtype), bias)

    monkeypatch.setattr(planner, "_Effective", Kept)


MUTANTS = [
    (copies_what_is_shared, lambda folder: check_count("vera", "linear", folder)),
    (counts_twice, lambda folder: check_count("lora", "linear", folder)),
    (trains_the_frozen, lambda folder: check_count("vera", "linear", folder)),
    (trains_the_frozen, lambda folder: check_count("lora+init:pissa", "linear", folder)),
    (keeps_casts, lambda folder: check_kept("lora", torch.bfloat16)),
    (keeps_the_weight, lambda folder: check_kept("hira")),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=[f"{k}-{f.__name__}" for k, (f, _) in enumerate(MUTANTS)])
def test_the_law_rejects(mutant, law, monkeypatch, tmp_path):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="law 7"):
        law(tmp_path)


@pytest.mark.parametrize("method", subjects())
def test_the_law_rejects_a_second_copy_under_every_method(method, monkeypatch, tmp_path):
    """Every tensor is held twice."""
    native = Adaptation.tensors
    doubled = lambda tensors: {**tensors, **{f"{name} again": t.detach().clone() for name, t in tensors.items()}}
    monkeypatch.setattr(Adaptation, "tensors", lambda self, name=None: doubled(native(self, name)))
    with pytest.raises(AssertionError, match="law 7"):
        check_count(method, BLOCK if rf.method(method).is_side else "linear", tmp_path)
