"""Law 6: a method that is not active raises. Sites, inits, policies and updates count what they touched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankfold as rf
from rankfold.core import probing, readers
from rankfold.errors import InactiveError
from rankfold.training.engine import Engine
from rankfold.training.own_update import OwnUpdate

from .checks import Checks
from .models import BLOCK, Blocks, Linear, tiny
from .subjects import adapt, shake, small, subjects, train


class BypassedLinear(Linear):
    """Reads the weight of its second layer without calling it, as fused kernels do."""

    def forward(self, x):
        return F.linear(torch.tanh(self.first(x)), self.second.weight)


class BypassedBlocks(Blocks):
    """Skips its second block."""

    def forward(self, h):
        return self.read(self.blocks[0](h))


def bypassed(kind):
    case = tiny(kind)
    cls = BypassedBlocks if kind == BLOCK else BypassedLinear
    for model in (case.model, case.original):
        model.__class__ = cls
    return case


def kind_of(method):
    return BLOCK if small(method).is_side else "linear"


def check_bypass(method):
    """A site whose module is not called: said at `adapt` where batches are given, in the first forward pass where not."""
    m = small(method)
    with Checks(f"law 6, {m}, bypass") as check:
        name = "blocks.1" if m.is_side else "second"
        for batches in (True, False):
            case = bypassed(kind_of(method))
            data = {"batches": [case.batch], "loss": case.loss} if batches else {}
            try:
                adapt(case, m, **data)
                case.output()
            except InactiveError as error:
                check.that(
                    name in str(error) and "exclude" in str(error), f"the error does not name the site or the way out: {error}"
                )
            else:
                check.that(False, f"{name} is bypassed, and nobody said so (batches={batches})")


def check_own_update(method):
    """A method with an update or a policy of its own, under somebody else's optimizer: the next forward pass raises."""
    m = small(method)
    with Checks(f"law 6, {m}, another optimizer") as check:
        case = tiny(kind_of(method))
        a = adapt(case, m)
        case.model.train()
        optimizer = torch.optim.SGD(a.parameters(), lr=0.1)
        case.loss(case.model, case.batch).backward()
        optimizer.step()
        needs_ours = m.update.own or m.rank.steps
        try:
            case.output()
        except InactiveError as error:
            check.that(needs_ours, "plain AdamW over all tensors may be any optimizer")
            check.that("adaptation.optimizer" in str(error), f"the error does not say what to type: {error}")
        else:
            check.that(not needs_ours, "update or policy did nothing, and nobody said so")


def check_steps(method):
    """Our optimizer: no gradient at the first step raises; with one, something moves and the end of the run is content."""
    m = small(method)
    with Checks(f"law 6, {m}, steps") as check:
        case = tiny(kind_of(method))
        a = adapt(case, m)
        optimizer = a.optimizer(lr=0.1, total_steps=4 if m.rank.steps else None)
        with pytest.raises(InactiveError, match="no gradient reached"):
            optimizer.step()
        before = {n: t.detach().clone() for n, t in a.tensors().items()}
        train(case, a, steps=4)
        moved = {
            n for n, t in a.tensors().items() if n not in before or t.shape != before[n].shape or not torch.equal(t, before[n])
        }
        check.that(bool(moved), "four steps moved nothing")
        frozen = {n for n, t in a.tensors().items() if not t.requires_grad}
        check.that(not moved & frozen, f"frozen tensors moved: {sorted(moved & frozen)}")
        a._get(None).engine.check()
        check.that(all(s.site.key in a._get(None).engine.reached for s in a.slots()), "a site was never reached by a gradient")


@pytest.mark.parametrize("method", subjects())
def test_a_bypassed_site_raises(method):
    check_bypass(method)


@pytest.mark.parametrize("method", subjects())
def test_another_optimizer_raises_where_ours_is_needed(method):
    check_own_update(method)


@pytest.mark.parametrize("method", subjects())
def test_steps_reach_every_site(method):
    check_steps(method)


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


FEED_FORWARD = ["*.linear1", "*.linear2"]


def check_fast_path():
    """torch's own encoder reads its weights in one fused call when nobody trains: repaired, so that adapters act there too."""
    with Checks("law 6, encoder fast path") as check:
        model, x = encoder(), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            base = model(x)
            a = rf.adapt(model, small("lora"), targets=FEED_FORWARD)
            try:
                check.close(model(x), base, 1e-5, "output at the start")
            except InactiveError as error:
                check.that(False, f"not repaired, but noticed: {error}")
            shake(a)
            fast = model(x)
            check.that(not torch.allclose(fast, base, atol=1e-3), "in eval mode the adapter does not act")
        check.close(model(x).detach(), fast, 1e-5, "with and without gradients")


def test_the_encoder_fast_path_is_repaired():
    check_fast_path()


class Pooled(nn.Module):
    """A pooler beside the output: it is called, and no loss depends on it."""

    def __init__(self):
        super().__init__()
        self.body, self.pooler, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        self.pooler(h)
        return self.head(h)


def check_no_gradient():
    """A site without gradient: dropped and listed where we chose it, refused where its name was given."""
    with Checks("law 6, no gradient") as check:
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
        loss = lambda model, batch: model(batch).square().mean()
        model = Pooled()
        a = rf.adapt(model, small("lora"), batches=[x], loss=loss)
        check.that([s.key for s in a.sites] == ["body", "head"], f"adapted {[s.key for s in a.sites]}")
        check.that(("pooler", "gets no gradient") in a.dropped, f"dropped, and listed as {a.dropped}")
        try:
            rf.adapt(Pooled(), small("lora"), targets=["body", "pooler"], batches=[x], loss=loss)
        except InactiveError as error:
            check.that("pooler" in str(error), f"the error does not name the site: {error}")
        else:
            check.that(False, "a named site without gradient was taken")


def test_a_site_without_gradient_is_dropped_or_refused():
    check_no_gradient()


def test_the_end_of_a_run_names_sites_that_never_had_a_gradient():
    with Checks("law 6, end of a run") as check:
        model, x = Pooled(), torch.randn(3, 8)
        a = rf.adapt(model, small("lora"))
        optimizer = a.optimizer(lr=0.1)
        model(x).square().mean().backward()
        optimizer.step()
        with pytest.raises(InactiveError, match="pooler"):
            a._get(None).engine.check()
        check.that(True, "idle sites are named")


def test_saving_never_raises_for_it(tmp_path):
    with Checks("law 6, saving") as check:
        a = rf.adapt(Pooled(), small("lora"))
        check.that(a.save(tmp_path / "adapter").exists(), "not saved")


# What the law must reject


def counts_nothing(monkeypatch):
    """Neither the probe nor the first forward pass looks at the counters."""
    monkeypatch.setattr(probing, "silent_sites", lambda *a: [])


def watches_no_update(monkeypatch):
    monkeypatch.setattr(OwnUpdate, "before_forward", lambda self, store: None)


def leaves_the_fast_path(monkeypatch):
    monkeypatch.setattr(readers, "FUSED", ())


def sees_no_gradient(monkeypatch):
    native = probing._without_gradient
    monkeypatch.setattr(probing, "_without_gradient", lambda *a: native(*a)[:0])


def skips_its_step(monkeypatch):
    """The update's optimizer steps nothing."""
    from rankfold.core import registry

    for entry in registry.entries("update"):
        monkeypatch.setattr(
            registry.resolve(entry),
            "optimizer",
            lambda self, tensors, lr, weight_decay=0.0, **o: torch.optim.SGD([t.param for t in tensors], lr=0.0),
        )


def reaches_nothing(monkeypatch):
    """The engine does not note which sites had a gradient."""
    native = Engine._look_for_gradients

    def look(self):
        native(self)
        self.reached.clear()

    monkeypatch.setattr(Engine, "_look_for_gradients", look)
    monkeypatch.setattr(Engine, "check", lambda self: None)


def own_update():
    return next(s for s in subjects() if small(s).update.own)


MUTANTS = [
    (counts_nothing, lambda: check_bypass("lora")),
    (watches_no_update, lambda: check_own_update(own_update())),
    (leaves_the_fast_path, check_fast_path),
    (sees_no_gradient, check_no_gradient),
    (skips_its_step, lambda: check_steps("lora")),
    (reaches_nothing, lambda: check_steps("lora")),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=lambda f: getattr(f, "__name__", ""))
def test_the_law_rejects(mutant, law, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="law 6"):
        law()


# an init that looks at inputs misses the site before the probe does
@pytest.mark.parametrize("method", [s for s in subjects() if "activations" not in small(s).init.needs])
def test_the_law_rejects_a_bypass_unseen_under_every_method(method, monkeypatch):
    counts_nothing(monkeypatch)
    with pytest.raises(AssertionError, match="law 6"):
        check_bypass(method)


@pytest.mark.parametrize("method", [s for s in subjects() if small(s).update.own or small(s).rank.steps])
def test_the_law_rejects_an_update_that_did_nothing(method, monkeypatch):
    watches_no_update(monkeypatch)
    with pytest.raises(AssertionError, match="law 6"):
        check_own_update(method)
