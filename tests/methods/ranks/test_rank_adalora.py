"""AdaLoRA: schedule, scores by brute force and by peft, masks, compaction, the base when everything is off."""

import itertools

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import CompositionError, OptionError
from rankfold.methods.ranks.adalora import AdaLoRA

X = torch.randn(32, 10, generator=torch.Generator().manual_seed(3))
Y = torch.randn(32, 6, generator=torch.Generator().manual_seed(4))


def adapted(method="adalora", rank=4, total=40, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))
    handle = rf.adapt(model, method, rank=rank, batches=[X], loss=lambda m, b: (m(b) - Y).square().mean(), **options)
    optimizer = handle.optimizer(lr=0.02, total_steps=total)
    return model, handle, optimizer, handle._get(None).engine


def step(model, handle, optimizer):
    optimizer.zero_grad()
    ((model(X) - Y).square().mean() + sum(handle.objectives().values())).backward()
    optimizer.step()


def gates(handle):
    return torch.cat([handle.tensors()[f"default/{s}/gate"].detach() for s in "02"])


def test_the_schedule_falls_from_the_start_to_the_target():
    policy = AdaLoRA(target=2, warmup=0.1, final=0.3)
    values = [policy.budget(t, 100, 24, 6) for t in range(1, 101)]
    assert values[:10] == [24] * 10
    assert values[69:] == [6] * 31
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert values[39] == int(18 * 0.5**3 + 6)


def test_the_schedule_is_peft_s():
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=12, target_r=4, tinit=10, tfinal=30, deltaT=10, total_step=100)
    allocator = peft.tuners.adalora.layer.RankAllocator(nn.Sequential(), config, "default")
    allocator.init_bgt, allocator.target_bgt = 24, 8
    ours = AdaLoRA(target=4, warmup=0.1, final=0.3)
    assert [ours.budget(t, 100, 24, 8) for t in range(1, 101)] == [allocator.budget_schedule(t)[0] for t in range(1, 101)]


def brute_force(history, beta1, beta2):
    """Score of one component from [(g, ∂g, row of A, ∂, column of B, ∂)] by plain floats, entry by entry."""

    def entry(pairs):
        mean = spread = 0.0
        for p, g in pairs:
            now = abs(p * g)
            mean = beta1 * mean + (1 - beta1) * now
            spread = beta2 * spread + (1 - beta2) * abs(now - mean)
        return mean * spread

    def average(k):
        width = len(history[0][k])
        return sum(entry([(float(h[k][j]), float(h[k + 1][j])) for h in history]) for j in range(width)) / width

    return entry([(float(h[0]), float(h[1])) for h in history]) + average(2) + average(4)


def test_scores_are_the_brute_force_ones():
    model, handle, optimizer, engine = adapted(total=1000)
    history = []
    for _ in range(5):
        step(model, handle, optimizer)
        t = {r: handle.store.tensor(f"default/2/{r}") for r in ("gate", "A", "B")}
        history.append({r: (p.detach().clone(), p.grad.clone()) for r, p in t.items()})
    view = next(v for v in engine.views() if v.key == "2")
    scores = engine.policy.scores(view)
    for k in range(4):
        rows = [(h["gate"][0][k], h["gate"][1][k], h["A"][0][k], h["A"][1][k], h["B"][0][:, k], h["B"][1][:, k]) for h in history]
        assert float(scores[k]) == pytest.approx(brute_force(rows, 0.85, 0.85), rel=1e-4)


def test_scores_are_peft_s():
    peft = pytest.importorskip("peft")
    model, handle, optimizer, engine = adapted(total=1000)
    allocator = peft.tuners.adalora.layer.RankAllocator(nn.Sequential(), peft.AdaLoraConfig(total_step=1000), "default")
    names = {"gate": "2.lora_E.default", "A": "2.lora_A.default", "B": "2.lora_B.default"}
    for _ in range(6):
        step(model, handle, optimizer)
        theirs = nn.Module()
        theirs.named_parameters = lambda: [(n, handle.store.tensor(f"default/2/{r}")) for r, n in names.items()]
        allocator.update_ipt(theirs)
    element = {r: allocator._element_score(n) for r, n in names.items()}
    expected = element["gate"] + element["A"].mean(1) + element["B"].mean(0)
    view = next(v for v in engine.views() if v.key == "2")
    torch.testing.assert_close(engine.policy.scores(view), expected, rtol=1e-4, atol=0)


def test_as_many_are_on_as_the_budget_says():
    model, handle, optimizer, engine = adapted(**{"adalora.target": 1, "interval": 3, "warmup": 0.2, "final": 0.4})
    for t in range(1, 41):
        step(model, handle, optimizer)
        on = int((gates(handle) != 0).sum())
        if t > 24 or (t > 8 and t % 3 == 0):
            assert on == engine.policy.budget(t, 40, 8, 2), t
        elif t <= 8:
            assert on == 8


def test_what_was_off_may_come_back_until_the_choice_stands():
    model, handle, optimizer, _engine = adapted(**{"adalora.target": 1, "interval": 4, "warmup": 0.1, "final": 0.5})
    masks, between = [], 0
    for t in range(1, 41):
        step(model, handle, optimizer)
        masks.append(gates(handle) != 0)
        between += int(t % 4 == 1 and 4 < t < 20 and bool(masks[-1].all()))
    assert between, "a masked gate moves again with the next step"
    assert all(torch.equal(m, masks[19]) for m in masks[19:]), "the choice of step 20 stands"


def test_compaction_keeps_the_function():
    model, handle, optimizer, engine = adapted(**{"adalora.target": 2})
    for _ in range(40):
        step(model, handle, optimizer)
    before, scale = model(X), handle.slots()[0].structure.scale
    engine.finalise(optimizer)
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-6)
    ranks = engine.ranks()
    assert sum(max(r, 1) for r in ranks.values()) == 4 or min(ranks.values()) == 1
    assert sum(ranks.values()) < 8
    assert handle.slots()[0].structure.scale == scale
    assert engine.history[-1] == (40, ranks)
    step(model, handle, optimizer)
    assert torch.isfinite(model(X)).all()


def test_a_target_of_the_start_is_training_without_a_policy():
    results = []
    for method, options in [("adalora", {"adalora.target": 4, "orthogonality": 0.0}), ("gate+lora+init:gaussian", {})]:
        presets = {"gate.per": "rank", "gate.start": 0.0, "gaussian.std": 0.02, "gaussian.std_b": 0.02}
        model, handle, optimizer, engine = adapted(method, **(options if method == "adalora" else presets))
        for _ in range(40):
            step(model, handle, optimizer)
        engine.finalise(optimizer)
        results.append(model(X))
    assert torch.equal(*results)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "eva", "lora-ga", "gaussian"])
def test_everything_off_is_the_base(init):
    model, handle, optimizer, engine = adapted(f"gate+lora+init:{init}+rank:adalora", **{"gate.per": "rank"})
    for _ in range(10):
        step(model, handle, optimizer)
    with handle.disabled():
        base = model(X)
    assert not torch.allclose(model(X), base, atol=1e-4)
    from rankfold.training.edits import Mask

    engine._apply([Mask(v.key, "gate", torch.arange(v.rank)) for v in engine.views()], 10, optimizer)
    assert torch.equal(model(X), base)


def test_orthogonality_is_the_mean_distance_of_all_factors():
    _model, handle, _, _engine = adapted(**{"adalora.orthogonality": 0.1})
    t = handle.tensors()
    off = [
        (M @ M.mT - torch.eye(4)).norm() for s in "02" for M in (t[f"default/{s}/A"].detach(), t[f"default/{s}/B"].detach().mT)
    ]
    assert float(handle.objectives()["orthogonality"].detach()) == pytest.approx(0.1 * float(sum(off)) / 4, rel=1e-6)
    handle.objectives()["orthogonality"].backward()
    assert handle.store.tensor("default/0/A").grad.abs().sum() > 0


def test_ties_take_exactly_as_many_as_allowed():
    _model, _handle, _optimizer, engine = adapted(**{"adalora.target": 1, "warmup": 0.0, "final": 0.0})
    views = engine.views()
    edits = engine.policy.on_step(40, 40, views)  # nothing observed: all scores are zero
    assert sum(len(e.index) for e in edits) == 8 - 2


def test_what_it_cannot_work_with():
    with pytest.raises(CompositionError, match="gate"):
        rf.method("lora+rank:adalora")
    model, handle, optimizer, _ = adapted(**{"adalora.target": 5})
    with pytest.raises(OptionError, match="mean rank 4"):
        step(model, handle, optimizer)
