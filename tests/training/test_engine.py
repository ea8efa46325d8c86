"""The engine: policies act in a plain loop, once per point and step; what is inactive raises; a resume is exact."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import FileError, InactiveError, OptionError
from rankfold.training.checkpoints import take_up
from rankfold.training.contracts import POINTS, RankPolicy
from rankfold.training.edits import Freeze, Mask
from rankfold.training.engine import Engine

X = torch.randn(16, 10, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True, kw_only=True)
class Watch(RankPolicy):
    """Notes when it is asked, in the state of the first site."""

    steps: ClassVar[bool] = True

    def on_step(self, t, total, sites):
        seen = sites[0].state.get("seen", torch.zeros(0, dtype=torch.int64))
        sites[0].state["seen"] = torch.cat([seen, torch.tensor([t])])
        return [Mask(sites[0].key, "A", torch.tensor([0]))]


def policy_at(where):
    return type("At", (Watch,), {"point": where})()


def small(method="lora", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))
    return model, rf.adapt(model, method, rank=4, **options)


def engine_of(handle, policy):
    return Engine(policy, (), handle.store, handle._get(None).member)


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("point", POINTS)
def test_a_policy_acts_in_a_plain_loop_once_per_step(point):
    model, handle = small()
    engine = engine_of(handle, policy_at(point))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
    engine.install(optimizer, total_steps=3)
    for _ in range(3):
        step(model, optimizer)
    assert engine.state["0"]["seen"].tolist() == [1, 2, 3]
    assert engine.touched == {"mask": 3}


@pytest.mark.parametrize("point", POINTS)
def test_what_the_loop_ran_itself_is_not_run_again(point):
    model, handle = small()
    engine = engine_of(handle, policy_at(point))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
    engine.install(optimizer, total_steps=3)
    for t in (1, 2, 3):
        engine.run("before_forward", t, 3, optimizer)
        optimizer.zero_grad()
        model(X).square().mean().backward()
        for where in ("after_backward", "after_clip"):
            engine.run(where, t, 3, optimizer)
        optimizer.step()
        for where in ("after_step", "between_steps"):
            engine.run(where, t, 3, optimizer)
    assert engine.state["0"]["seen"].tolist() == [1, 2, 3]


def test_masks_before_and_after_the_step_are_seen_at_the_right_side():
    """After the step the masked row is zero in the next pass; before it, the optimizer has moved it again."""
    for point, zero in [("after_step", True), ("after_clip", False)]:
        model, handle = small()
        engine = engine_of(handle, policy_at(point))
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.5)
        engine.install(optimizer, total_steps=5)
        for _ in range(2):
            step(model, optimizer)
        assert (engine.views()[0].tensors["A"][0].abs().sum() == 0) == zero


def test_hooks_fire_once_beside_a_plain_adamw():
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # from here on torch's own class has hooks in its step
    model, handle = small()
    optimizer = handle.optimizer(lr=0.01, total_steps=4)
    for _ in range(4):
        step(model, optimizer)
    assert handle._get(None).engine.step == 4


def test_a_second_install_lets_the_first_go():
    model, handle = small()
    engine = engine_of(handle, policy_at("after_step"))
    first = torch.optim.SGD(handle.parameters(), lr=0.1)
    engine.install(first, 5)
    second = torch.optim.SGD(handle.parameters(), lr=0.1)
    engine.install(second, 5)
    step(model, first)
    assert engine.step == 0
    step(model, second)
    assert engine.step == 1


def test_a_second_optimizer_is_a_run_of_its_own():
    """The policy starts anew, the first optimizer acts no more, and the change of hands is no foreign optimizer."""
    model, handle = small("adalora")
    model.train()
    first = handle.optimizer(lr=0.01, total_steps=4)
    for _ in range(4):
        step(model, first)
    before = handle._get(None).engine
    assert (before.step, before.calls) == (4, 4)
    second = handle.optimizer(lr=0.01, total_steps=6)
    engine = handle._get(None).engine
    assert engine is not before
    assert (engine.step, engine.calls, engine.state["0"], engine.history[0][0]) == (0, 0, {}, 0)
    for _ in range(2):
        step(model, second)
    assert (engine.step, engine.calls) == (2, 2)
    assert before.step == 4
    step(model, first)
    assert (before.step, engine.step) == (4, 2)
    with pytest.raises(InactiveError, match="another optimizer"):
        model(X)


def test_only_what_was_restored_goes_on():
    model, handle = small("adalora")
    optimizer = handle.optimizer(lr=0.01, total_steps=8)
    for _ in range(3):
        step(model, optimizer)
    take_up(handle, handle._get(None).engine.state_dict())
    optimizer = handle.optimizer(lr=0.01, total_steps=8)
    assert handle._get(None).engine.step == 3
    step(model, optimizer)
    assert (handle._get(None).engine.step, handle._get(None).engine.calls) == (4, 4)


def test_no_gradient_at_all_raises_at_the_first_step():
    model, handle = small()
    optimizer = handle.optimizer(lr=0.01)
    handle.store.switch({})
    model(X.requires_grad_()).sum().backward()
    X.requires_grad_(False)
    with pytest.raises(InactiveError, match="switched on"):
        optimizer.step()


def test_an_idle_site_and_an_idle_policy_are_named_at_the_end():
    model, handle = small()
    optimizer = handle.optimizer(lr=0.01)
    loss = handle.store.tensor("default/0/B").square().sum()
    loss.backward()
    optimizer.step()
    engine = handle._get(None).engine
    with pytest.raises(InactiveError, match=r"exclude=\['2'\]"):
        engine.check()
    step(model, optimizer)
    engine.check()
    model, handle = small()
    never = engine_of(handle, policy_at("after_step"))
    never.step, never.reached = 3, {"0", "2"}
    with pytest.raises(InactiveError, match="never asked"):
        never.check()


def test_an_unknown_point_is_refused():
    _, handle = small()
    with pytest.raises(OptionError, match="before_forward, after_backward"):
        engine_of(handle, Watch()).run("later", 1, 2)


def test_views_have_tensors_gradients_rank_and_scale():
    model, handle = small("pissa", alpha=8)
    engine = engine_of(handle, Watch())
    model(X).sum().backward()
    view = engine.views()[0]
    assert set(view.tensors) == {"B", "A"}, "starts are frozen: no policy's business"
    assert (view.rank, view.scale) == (4, 2.0)
    assert view.grad("B").abs().sum() > 0
    view.state["x"] = torch.ones(1)
    assert engine.views()[0].state["x"] == 1


def run(steps, saved=None, total=24):
    """Train with a policy that masks, and one frozen row; from the start, or from what an earlier run saved."""
    options = {"adalora.interval": 2, "adalora.target": 2, "final": 0.25}
    model, handle = small("adalora", **options)
    optimizer = handle.optimizer(lr=0.05, weight_decay=0.05, total_steps=total)
    engine = handle._get(None).engine
    if saved is None:
        engine._apply([Freeze("0", "A", torch.tensor([1]))], 0, optimizer)
    else:
        with torch.no_grad():
            for key, value in saved["tensors"].items():
                handle.store.tensor(key).copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        engine.load_state_dict(saved["engine"])
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X).square().mean() + sum(handle.objectives().values())).backward()
        optimizer.step()
    tensors = {k: v.detach().clone() for k, v in handle.tensors().items()}
    return {"tensors": tensors, "optimizer": optimizer.state_dict(), "engine": engine.state_dict()}


@pytest.mark.parametrize("at", [1, 7, 19])
def test_resume_is_exact(at):
    whole, half = run(24), run(at)
    resumed = run(24 - at, half)
    assert all(torch.equal(resumed["tensors"][k], v) for k, v in whole["tensors"].items())
    assert resumed["engine"]["values"] == whole["engine"]["values"]
    assert all(torch.equal(resumed["engine"]["tensors"][k], v) for k, v in whole["engine"]["tensors"].items())


def test_a_resumed_engine_knows_which_points_it_has_passed():
    _, handle = small()
    first = engine_of(handle, policy_at("before_forward"))
    first.run("before_forward", 8, 20)
    second = engine_of(handle, policy_at("before_forward"))
    second.load_state_dict(first.state_dict())
    assert second.run("before_forward", 8, 20) == []
    assert second.run("before_forward", 9, 20) != []
    assert second.state["0"]["seen"].tolist() == [8, 9]


def test_the_state_is_json_and_tensors():
    import json

    state = run(3)["engine"]
    assert json.loads(json.dumps(state["values"])) == state["values"]
    assert state["tensors"]
    assert all(isinstance(t, torch.Tensor) for t in state["tensors"].values())


def test_a_state_of_another_run_is_refused():
    state = run(2)["engine"]
    _, handle = small("adalora", targets=["0"])
    with pytest.raises(FileError, match="sites or ranks"):
        engine_of(handle, handle.method.rank).load_state_dict(state)
