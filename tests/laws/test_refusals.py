"""Every class of refusal, once: it is refused with its reason; then the pair is forced, and the law shown that would break.

A refusal without such a law would be a whim. Forcing means building the method by hand, or switching one check off.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankfold as rf
from rankfold.core import attaching, folding
from rankfold.core.host import fold_weight, site_program
from rankfold.core.kinds import linear
from rankfold.core.structure import Offset, Stack
from rankfold.errors import CompositionError, LayoutError, OptionError, TargetError
from rankfold.training import method as method_module

from .checks import Checks
from .models import BLOCK, tiny
from .subjects import adapt, shake, small, train
from .test_base_never_written import quiet_fold
from .test_definition import check_definition
from .test_start import check_start


def part(name, **options):
    """The structure of a method, by name."""
    return small(name, **options).structure


def decorator(name, **options):
    """A decorator's class around nothing yet: `decorator("magnitude")(inner=...)`."""
    cls = type(small(f"{name}+lora").structure)
    return lambda inner: cls(inner=inner, **options)


def forced(structure, like="lora", **axes):
    """A method as no chain would give it."""
    made = small(like)
    return dataclasses.replace(made, structure=structure, text=f"forced {type(structure).__name__}", **axes)


def unchecked(monkeypatch):
    """Composition without its checks."""
    monkeypatch.setattr(method_module, "_check", lambda *a, **k: None)


def test_a_decorated_side_module(monkeypatch):
    """A side module is no weight. Forced, law 3 has no definition: there is no weight to rescale."""
    with pytest.raises(CompositionError, match="a side module is no weight"):
        rf.method("magnitude+adaptertune")
    monkeypatch.setattr(attaching, "_kind_refusal", lambda structure, site: None)
    with pytest.raises(NotImplementedError):
        adapt(tiny("linear"), forced(decorator("magnitude")(part("adaptertune"))))


def test_an_owned_weight_around_another_change():
    """The owned copy discards what stands inside it. Forced, law 6: the inner tensors never get a gradient."""
    with pytest.raises(CompositionError, match="discards what stands inside"):
        rf.method("full+lora")
    case = tiny("linear")
    a = adapt(case, forced(Stack(outer=part("full"), inner=part("lora"))))
    train(case, a)
    with Checks("law 6 breaks") as check:
        for name, tensor in a.tensors().items():
            if name.endswith(("/B", "/A")):
                check.that(tensor.grad is None or not tensor.grad.any(), f"{name} had a gradient after all")


def test_roles_that_the_structure_does_not_have(monkeypatch):
    """An init fills roles. Forced onto a structure without them, law 6: it fills nothing, and nobody would know."""
    with pytest.raises(CompositionError, match="works on trainable A, B"):
        rf.method("kron+init:pissa")
    unchecked(monkeypatch)
    plain, filled = tiny("linear"), tiny("linear")
    with monkeypatch.context() as patch:
        patch.setattr(Offset, "weight", lambda self, W, t, site, ctx=None: self.inner.weight(W, t, site, ctx))
        first = adapt(plain, small("kron"))
        second = adapt(filled, small("kron+init:pissa"))
    with Checks("law 6 breaks") as check:
        for (name, t), other in zip(first.tensors().items(), second.tensors().values()):
            check.bitwise(other.detach(), t.detach(), f"{name}: init:pissa changed nothing")


def test_an_offset_over_another_structure(monkeypatch):
    """Offsets are measured at the innermost structure. Forced over another, law 2: the start is not the base."""
    with pytest.raises(CompositionError, match="belongs to the innermost structure"):
        rf.method("lora+shira+init:pissa")
    unchecked(monkeypatch)
    with pytest.raises(AssertionError, match="law 2"):
        check_start("lora+shira+init:pissa", "linear")


def test_components_of_more_than_one_structure():
    """A gate per component weighs b_k a_k. Forced around a sum, law 3: the algebra has no such components."""
    with pytest.raises(CompositionError, match="components of one structure"):
        rf.method("gate+lora+shira", **{"gate.per": "rank"})
    gate = dataclasses.replace(decorator("gate")(part("lora")), per="rank")
    case = tiny("linear")
    a = adapt(case, forced(gate))
    for slot in a.slots():
        slot.structure = dataclasses.replace(gate, inner=Stack(outer=part("lora"), inner=part("miss")))
        slot.binding |= {"D": slot.binding["B"]}
        slot.fields = (*slot.fields, "D")
    a.store.version += 1
    with pytest.raises(OptionError, match="rank-one components"):
        case.output()


def test_a_weight_that_is_read_where_none_exists(monkeypatch):
    """HiRA multiplies entries of W. Forced over a change that depends on the input, law 3: no plan can run it."""
    with pytest.raises(CompositionError, match="depends on the input"):
        rf.method("bone+mixture")
    unchecked(monkeypatch)
    with pytest.raises(LayoutError, match="no dense form"):
        check_definition("bone+mixture", "linear")


def test_row_lengths_that_depend_on_the_input():
    """One length per row needs one weight. Forced, law 2 has no start: there are no lengths to begin with."""
    with pytest.raises(CompositionError, match="depends on the input"):
        rf.method("magnitude+mixture")
    magnitude = decorator("magnitude")(part("lora"))
    object.__setattr__(magnitude, "inner", part("mixture"))
    with pytest.raises(LayoutError):
        adapt(tiny("linear"), forced(magnitude))


def test_a_budget_without_ranks_or_scores(monkeypatch):
    """Spreading needs a rank to spread and scores to spread by. Forced, law 6: the policy has nothing to act on."""
    with pytest.raises(CompositionError, match="no scores"):
        rf.method("lora+rank:eva")
    with pytest.raises(CompositionError, match="rank"):
        rf.method("full+rank:eva")
    unchecked(monkeypatch)
    case = tiny("linear")
    a = adapt(case, small("lora+rank:eva"))
    ranks = {s.site.key: s.structure.core.rank for s in a.slots()}
    with Checks("law 6 breaks") as check:
        check.that(set(ranks.values()) == {2}, f"ranks {ranks}: a policy that was asked for spread nothing")


def test_one_name_for_two_tensors():
    """Two structures with tensors of one name. Forced, law 7: one tensor serves both, and half of what is declared is missing."""
    with pytest.raises(CompositionError, match="both own tensors named"):
        rf.method("lora+hira")

    class Clash(Stack):
        def tensors(self, site):
            return {**self.inner.tensors(site), **self.outer.tensors(site)}

    a = adapt(tiny("linear"), forced(Clash(outer=part("hira"), inner=part("lora"))))
    alone = [adapt(tiny("linear"), small(name)).parameter_count() for name in ("hira", "lora")]
    with Checks("law 7 breaks") as check:
        check.that(a.parameter_count() < sum(alone), "both structures have tensors of their own after all")


def test_the_same_member_twice():
    """Two of one axis. Forced, the second would be dropped in silence (law 6)."""
    for chain in ("lora+lora", "lora+init:pissa+init:gaussian", "lora+update:adamw+update:loraplus"):
        with pytest.raises(CompositionError, match=r"twice|a method has one (init|update)"):
            rf.method(chain)


def test_a_later_member_replaces_the_one_that_a_composition_brought(monkeypatch):
    from rankfold.methods.catalogue import COMPOSITIONS, Composition
    from rankfold.training import method

    known = {**COMPOSITIONS, "both": Composition("magnitude+lora+init:pissa")}
    monkeypatch.setattr(method, "compositions", lambda: known)
    assert rf.method("both").init.name == "pissa"
    assert rf.method("both+init:gaussian").text == "magnitude+lora+init:gaussian"
    with pytest.raises(CompositionError, match="a method has one init"):
        rf.method("both+init:gaussian+init:eva")


class Largest(TorchDispatchMode):
    """The largest number of entries that any operation made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.entries = max(self.entries, made.numel() if isinstance(made, torch.Tensor) else 0)
        return made


def test_a_transform_of_a_vocabulary(monkeypatch):
    """Rotating the input of an embedding rotates its vocabulary. Forced, law 7: a look-up makes [tokens, vocabulary]."""
    case = tiny("embedding")
    with pytest.raises(TargetError, match="makes no sense on a vocabulary"):
        adapt(case, "hra")
    monkeypatch.setattr(attaching, "_kind_refusal", lambda structure, site: None)
    made = {}
    for method in ("hra", "lora"):
        case = tiny("embedding")
        a = adapt(case, method)
        ids = case.batch.repeat(8, 1)
        with Largest() as largest:
            case.model.embed(ids)
        made[method] = largest.entries
    with Checks("law 7 breaks") as check:
        check.that(len(a.sites) == 1, "not forced")
        check.that(made["lora"] <= ids.numel() * 6, f"an honest look-up makes {made['lora']} numbers")
        check.that(
            made["hra"] >= ids.numel() * 10, f"the rotated one makes {made['hra']} numbers for {ids.numel()} tokens of 10 words"
        )


def test_a_gate_on_token_indices(monkeypatch):
    """What looks at its input can't look at indices. Forced, law 3: there is no input to weigh by."""
    case = tiny("embedding")
    with pytest.raises(TargetError, match="token indices"):
        adapt(case, "mixture")
    monkeypatch.setattr(attaching, "_kind_refusal", lambda structure, site: None)
    adapt(case, "mixture")
    with pytest.raises(LayoutError, match="by the input"):
        case.output()


def test_dropout_on_token_indices(monkeypatch):
    """Indices can't be dropped. Forced, law 6: it does nothing, and training looks as if it did."""
    case = tiny("embedding")
    with pytest.raises(TargetError, match="token indices"):
        adapt(case, "dropout+lora")
    monkeypatch.setattr(attaching, "_kind_refusal", lambda structure, site: None)
    a = adapt(case, "dropout+lora")
    shake(a)
    y = case.output().detach()
    case.model.train()
    with Checks("law 6 breaks") as check:
        gaps = {(case.output().detach() - y).norm().item() > 0.01 for _ in range(8)}
        check.that(gaps == {False}, "something was dropped")


def test_a_change_that_cannot_fold(monkeypatch):
    """A gate that looks at the input has no one weight. Forced, law 3: a weight folded for one input is wrong for the next."""
    case = tiny("linear")
    a = adapt(case, "mixture")
    shake(a)
    with pytest.raises(LayoutError, match="depends on the input"):
        a.fold()
    y = case.output().detach()

    def for_the_first_token(program):
        x = case.batch[:1, :1].to(program.base.dtype)
        x = x if x.shape[-1] == program.base.shape[1] else x.new_ones(1, 1, program.base.shape[1])
        units = torch.eye(program.base.shape[1], dtype=torch.float64)[:, None]
        return program.expression(x=x).matmul(units).squeeze(1).mT.detach()

    monkeypatch.setattr(folding, "fold_weight", for_the_first_token)
    with quiet_fold():
        a.fold()
    with Checks("law 3 breaks") as check:
        check.that(not torch.allclose(case.output().detach(), y), "one folded weight serves every input after all")


def test_a_side_module_that_cannot_fold():
    """A network beside a block is no weight: folded, law 3 would lose it."""
    case = tiny(BLOCK)
    a = adapt(case, "adaptertune")
    shake(a)
    y = case.output().detach()
    with pytest.raises(LayoutError, match="side module"):
        a.fold()
    with Checks("law 3 breaks") as check, a.disabled():
        check.that(not torch.equal(case.output().detach(), y), "without the module the function is the same")


def test_whole_tensors_at_half_weight(monkeypatch):
    """A head is whole: at weight ½ law 3's sum of changes would still use all of it."""
    case = tiny("linear")
    a = rf.adapt(case.model, small("lora"), targets=["first"], extras=["second"])
    shake(a)
    with pytest.raises(CompositionError, match="no weight but 1"):
        a.use("default", weight=0.5)
    y = case.output().detach()
    with a.disabled():
        base = case.output().detach()
    a.store.switch({"default": 1e-9})
    with Checks("law 3 breaks") as check:
        check.that(not torch.allclose(case.output().detach(), base, atol=1e-6), "the head follows the weight after all")
        check.that(not torch.equal(y, base), "the head was not moved")


def test_a_rank_above_the_matrix(monkeypatch):
    """Law 7: rank 20 at a map of 12 x 8 counts 400 numbers for a change that 96 would hold."""
    case = tiny("linear")
    with pytest.raises(TargetError, match="larger than the matrix"):
        rf.adapt(case.model, "lora", rank=20, targets=["first"])
    monkeypatch.setattr(type(part("lora")), "fits", lambda self, site: None)
    a = rf.adapt(tiny("linear").model, "lora", rank=20, targets=["first"])
    with Checks("law 7 breaks") as check:
        check.that(a.parameter_count() > 12 * 8, "fewer numbers than the weight has")


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 2.0 * self.weight, self.bias)


def test_a_module_with_a_forward_of_its_own(monkeypatch):
    """Its weight means something else there. Forced, law 1: even an adapter that changes nothing changes the function."""
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(8, 6))
    x = torch.randn(3, 8)
    y = model(x).detach()
    with pytest.raises(TargetError, match="forward of its own"):
        rf.adapt(model, "lora", rank=2, targets=["0"])
    monkeypatch.setattr(linear, "own_forward", lambda module, library: None)
    rf.adapt(model, "lora", rank=2, targets=["0"])
    with Checks("law 2 breaks") as check:
        check.that(not torch.allclose(model(x), y), "the function is the base's after all")


def test_dropout_where_the_library_multiplies(monkeypatch):
    """nn.MultiheadAttention takes one W'. Forced, law 3: one mask for all tokens, where each should draw its own."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model, x = Model(), torch.ones(1, 6, 8)
    with pytest.raises(TargetError, match="on one weight"):
        rf.adapt(model, "dropout+lora", rank=2, targets=["out_proj"])
    monkeypatch.setattr(attaching, "_kind_refusal", lambda structure, site: None)
    a = rf.adapt(model, "dropout+lora", rank=2, targets=["out_proj"], p=0.5)
    shake(a)
    with Checks("law 3 breaks") as check:
        y = model.train()(x)[0]
        check.that(torch.allclose(y, y[:1].expand(6, 8)), "equal tokens had masks of their own after all")


def test_shapes_that_do_not_join():
    """One tensor for sites of one group must have one shape. Forced, law 7: there is no size that both declare."""
    with pytest.raises(CompositionError, match="different shapes"):
        attaching.joined_shape("same", [(2, 8), (2, 12)], "A")
    with Checks("law 7 breaks") as check:
        check.that(attaching.joined_shape("max", [(2, 8), (2, 12)], "A") == (2, 12), "the larger is not the join of both")


def test_a_second_adapter_on_a_folded_model():
    """Folded weights stand where the base stood. Forced, law 1: the second adapter would take W' for its base."""
    case = tiny("linear")
    a = adapt(case, "lora")
    shake(a)
    program = site_program(a.store, [a.slots()[0]], training=False)
    W = program.base.dense().clone()
    a.fold()
    with pytest.raises(LayoutError, match="folded"):
        adapt(case, "lora", name="second")
    with Checks("law 1 breaks") as check:
        check.that(not torch.equal(program.base.dense(), W), "the base is still in its place")
        check.that(not torch.equal(fold_weight(program), program.base.dense()), "the change is not made twice")
