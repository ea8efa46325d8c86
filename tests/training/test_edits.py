"""Edits: tensors, optimizer state and groups change together; what an edit does not name stays bitwise."""

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import CompositionError, LayoutError, OptionError, UnknownName
from rankfold.training.edits import Freeze, Gate, Grow, LrScale, Mask, Replace, Restart, Slice, apply, keys_by_role
from rankfold.training.engine import Engine

X = torch.randn(16, 10, generator=torch.Generator().manual_seed(3))


def adapted(method="lora", rank=4, steps=3, decay=0.1, **options):
    """(model, handle, optimizer, engine) of a small net after a few steps, so that there are moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))
    handle = rf.adapt(model, method, rank=rank, batches=[X, X], loss=lambda m, b: m(b).square().mean(), **options)
    optimizer = handle.optimizer(lr=0.02, weight_decay=decay, total_steps=1000)
    engine = handle.attached["default"].engine
    train(model, optimizer, steps)
    return model, handle, optimizer, engine


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def tensor(handle, site, role):
    return handle.store.tensor(keys_by_role(handle._get(None).member.slots[site])[role])


def do(handle, optimizer, engine, *edits):
    return apply(edits, handle.store, handle._get(None).member, optimizer, engine.paces)


def consistent(handle, optimizer):
    """Every trainable tensor stands once in the optimizer, with moments of its own shape."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in handle.parameters()}
    assert len(held) == len(handle.parameters())
    assert set(map(id, optimizer.state)) <= {id(p) for p in held}
    for p, state in optimizer.state.items():
        assert all(v.shape == p.shape for v in state.values() if v.numel() > 1)


EDITS = {
    "mask": lambda h: [Mask("0", "B", torch.tensor([1]), dim=-1), Mask("0", "A", torch.tensor([1]))],
    "gate": lambda h: [Gate("0", "A", torch.ones_like(tensor(h, "0", "A")))],
    "slice": lambda h: [Slice("0", torch.tensor([0, 2]))],
    "grow": lambda h: [Grow("0", 2, {"A": torch.ones(2, 10)})],
    "replace": lambda h: [Replace("0", {"B": torch.ones(8, 3), "A": torch.ones(3, 10)}, rank=3)],
    "freeze": lambda h: [Freeze("0", "A", torch.tensor([0]))],
    "restart": lambda h: [Restart("0")],
    "lr_scale": lambda h: [LrScale("0", 0.5)],
}


# Another rank of an offset needs its start too: tested apart.
PAIRS = [(m, e) for m in ("lora", "pissa", "dora", "loraplus") for e in EDITS if (m, e) != ("pissa", "replace")]


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_optimizer_and_tensors_agree_after_every_edit(method, name):
    model, handle, optimizer, engine = adapted(method)
    touched = do(handle, optimizer, engine, *EDITS[name](handle))
    assert touched["0"] > 0
    consistent(handle, optimizer)
    other = tensor(handle, "2", "A").detach().clone()
    train(model, optimizer, 2)
    consistent(handle, optimizer)
    assert not torch.equal(other, tensor(handle, "2", "A")), "training goes on"
    assert torch.isfinite(model(X)).all()


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_slices_take_moments_along_and_keep_step_and_scale(method):
    _model, handle, optimizer, engine = adapted(method, alpha=8)
    slot = handle._get(None).member.slots["0"]
    keep = torch.tensor([0, 3])
    before = {role: tensor(handle, "0", role).detach().clone() for role in keys_by_role(slot)}
    moments = {role: optimizer.state[tensor(handle, "0", role)]["exp_avg"].clone() for role in ("A", "B")}
    scale = slot.structure.scale
    do(handle, optimizer, engine, Slice("0", keep))
    for role, old in before.items():
        dim = 0 if role.startswith("A") else 1
        assert torch.equal(tensor(handle, "0", role), old.index_select(dim, keep)), role
    for role, old in moments.items():
        state = optimizer.state[tensor(handle, "0", role)]
        assert torch.equal(state["exp_avg"], old.index_select(0 if role == "A" else 1, keep))
        assert float(state["step"]) == 3
    assert slot.structure.core.rank == 2
    assert slot.structure.scale == scale == 2.0
    if method == "pissa":
        assert optimizer.starts[tensor(handle, "0", "B")] is tensor(handle, "0", "B0")


def test_slicing_what_is_off_changes_nothing():
    model, handle, optimizer, engine = adapted("pissa")
    off = torch.tensor([1, 2])
    do(handle, optimizer, engine, Mask("0", "B", off, dim=-1), Mask("0", "A", off, dim=-2))
    before = model(X)
    do(handle, optimizer, engine, Slice("0", torch.tensor([0, 3])))
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "pissa", "lora-ga", "eva", "dora+init:pissa"])
def test_masking_everything_is_the_base(method):
    model, handle, optimizer, engine = adapted(method, targets=["0", "2"])
    assert not torch.allclose(model(X), base(model, handle), atol=1e-4)
    for site in handle.sites:
        rank = handle._get(None).member.slots[site.key].structure.core.rank
        every = torch.arange(rank)
        do(handle, optimizer, engine, Mask(site.key, "B", every, dim=-1), Mask(site.key, "A", every, dim=-2))
        if method.startswith("dora"):
            norms = model[int(site.key)].weight.norm(dim=1)
            do(handle, optimizer, engine, Gate(site.key, "magnitude", norms))
    torch.testing.assert_close(model(X), base(model, handle), rtol=0, atol=1e-6 if method.startswith("dora") else 0)


def base(model, handle):
    with handle.disabled():
        return model(X)


def test_a_mask_leaves_the_moments():
    _, handle, optimizer, engine = adapted()
    kept = optimizer.state[tensor(handle, "0", "A")]["exp_avg"].clone()
    do(handle, optimizer, engine, Mask("0", "A", torch.tensor([0, 1])))
    assert torch.equal(optimizer.state[tensor(handle, "0", "A")]["exp_avg"], kept)
    assert tensor(handle, "0", "A")[:2].abs().sum() == 0
    assert tensor(handle, "0", "A")[2:].abs().min() > 0


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_growth_does_not_change_the_function(method):
    model, handle, optimizer, engine = adapted(method)
    before = model(X)
    moments = optimizer.state[tensor(handle, "0", "A")]["exp_avg"].clone()
    more = {"A": torch.ones(2, 10)} if method == "lora" else {"A": torch.ones(2, 10), "B": torch.ones(8, 2)}
    do(handle, optimizer, engine, Grow("0", 2, more))
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-6)
    assert tensor(handle, "0", "A").shape == (6, 10)
    state = optimizer.state[tensor(handle, "0", "A")]["exp_avg"]
    assert torch.equal(state[:4], moments)
    assert state[4:].abs().sum() == 0
    train(model, optimizer, 1)
    assert tensor(handle, "0", "B")[:, 4:].abs().sum() > 0, "what grew trains"


def test_replace_at_another_rank_of_an_offset_needs_its_start():
    model, handle, optimizer, engine = adapted("pissa")
    new = {"B": torch.ones(8, 3), "A": torch.ones(3, 10)}
    with pytest.raises(OptionError, match="A0, B0"):
        do(handle, optimizer, engine, Replace("0", new, rank=3))
    do(handle, optimizer, engine, Replace("0", {**new, "B0": new["B"], "A0": new["A"]}, rank=3))
    do(handle, optimizer, engine, Replace("2", {r: tensor(handle, "2", r + "0").detach() for r in ("B", "A")}))
    assert torch.equal(model(X), base(model, handle))
    assert tensor(handle, "0", "A") not in optimizer.state


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_frozen_entries_are_bitwise_constant(decay):
    model, handle, optimizer, engine = adapted(decay=decay)
    do(handle, optimizer, engine, Freeze("0", "A", torch.tensor([1, 2])), Freeze("2", "B"))
    rows = tensor(handle, "0", "A").detach().clone()
    whole = tensor(handle, "2", "B").detach().clone()
    train(model, optimizer, 5)
    assert torch.equal(tensor(handle, "0", "A")[1:3], rows[1:3])
    assert torch.equal(tensor(handle, "2", "B"), whole)
    assert not torch.isclose(tensor(handle, "0", "A")[[0, 3]], rows[[0, 3]], rtol=0, atol=1e-6).any()
    assert optimizer.state[tensor(handle, "0", "A")]["exp_avg"][1:3].abs().sum() == 0
    do(handle, optimizer, engine, LrScale("0", 1.0, ("A",)))
    train(model, optimizer, 1)
    assert not torch.equal(tensor(handle, "0", "A")[1:3], rows[1:3])


def test_freezing_survives_a_slice():
    model, handle, optimizer, engine = adapted()
    do(handle, optimizer, engine, Freeze("0", "A", torch.tensor([3])))
    do(handle, optimizer, engine, Slice("0", torch.tensor([1, 3])))
    before = tensor(handle, "0", "A").detach().clone()
    train(model, optimizer, 3)
    assert torch.equal(tensor(handle, "0", "A")[1], before[1])
    assert not torch.equal(tensor(handle, "0", "A")[0], before[0])
    do(handle, optimizer, engine, Grow("0", 1, {}))
    assert engine.paces[keys_by_role(handle._get(None).member.slots["0"])["A"]][2].eq(1).all(), "what grows later moves"


def test_lr_scale_scales_the_step():
    results = []
    for factor in (1.0, 0.25):
        model, handle, optimizer, engine = adapted(decay=0.0)
        do(handle, optimizer, engine, LrScale("0", factor, ("B",)))
        before = {r: tensor(handle, "0", r).detach().clone() for r in ("A", "B")}
        train(model, optimizer, 1)
        results.append({r: tensor(handle, "0", r).detach() - before[r] for r in before})
    torch.testing.assert_close(results[1]["B"], 0.25 * results[0]["B"], rtol=1e-4, atol=1e-8)
    assert torch.equal(results[1]["A"], results[0]["A"])


def test_restart_makes_the_next_step_a_first_one():
    model, handle, optimizer, engine = adapted(decay=0.0)
    do(handle, optimizer, engine, Restart("0", ("B",)))
    before = tensor(handle, "0", "B").detach().clone()
    train(model, optimizer, 1)
    moved = (tensor(handle, "0", "B").detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.02), rtol=1e-2, atol=0)  # Adam's first step has the size of lr


def test_moments_of_another_shape_start_anew():
    _model, handle, optimizer, engine = adapted()
    A = tensor(handle, "0", "A")
    optimizer.state[A]["factored"] = torch.ones(4)
    do(handle, optimizer, engine, Slice("0", torch.tensor([0])))
    assert tensor(handle, "0", "A") not in optimizer.state


def test_edits_without_an_optimizer():
    model, handle, _, _ = adapted()
    apply([Slice("0", torch.tensor([0]))], handle.store, handle._get(None).member)
    assert tensor(handle, "0", "A").shape == (1, 10)
    assert torch.isfinite(model(X)).all()


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (Mask("00", "A", torch.tensor([0])), UnknownName, "nearest: 0"),
        (Mask("0", "C", torch.tensor([0])), UnknownName, "role"),
        (Gate("0", "A", torch.ones(3)), OptionError, "needs shape"),
        (Grow("0", 1, {"A": torch.ones(2, 10)}), OptionError, "grow at 0: A needs shape"),
        (Replace("0", {"A": torch.ones(2, 10)}, rank=2), OptionError, "changes B too"),
        (Freeze("0", "A"), LayoutError, "adaptation.optimizer"),
    ],
)
def test_impossible_edits_say_why(edit, error, words):
    _, handle, optimizer, _ = adapted()
    with pytest.raises(error, match=words):
        apply([edit], handle.store, handle._get(None).member, optimizer)


def test_a_structure_without_a_rank_cannot_be_sliced():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8))
    handle = rf.adapt(model, "full")
    with pytest.raises(CompositionError, match="no rank"):
        apply([Slice("0", torch.tensor([0]))], handle.store, handle._get(None).member)


def test_the_engine_clears_what_a_policy_held_of_an_old_shape():
    _, handle, optimizer, _ = adapted()
    a = handle._get(None)
    engine = Engine(a.method.rank, (), handle.store, a.member)
    engine.state["0"]["seen"] = torch.ones(4)
    engine.state["2"]["seen"] = torch.ones(4)
    engine._apply([Slice("0", torch.tensor([0]))], 1, optimizer)
    assert engine.state["0"] == {}
    assert "seen" in engine.state["2"]
    assert engine.history == [(0, {"0": 4, "2": 4}), (1, {"0": 1, "2": 4})]
