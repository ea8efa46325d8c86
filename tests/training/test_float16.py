"""The loop in float16: the loss is scaled for the backward pass alone; nothing else sees it, and no step is lost to an overflow."""

import signal
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import NumericError, OptionError
from rankfold.linalg.random import Random
from rankfold.training.contracts import POINTS, RankPolicy
from rankfold.training.loop import Interrupted, LoopSettings, train
from rankfold.training.saving import load


def network():
    layers = [nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)]
    for k, layer in enumerate(layers):
        layer.weight.data = Random("network", k).normal(tuple(layer.weight.shape), std=0.5)
    return nn.Sequential(*layers)


BATCHES = [(Random("x", k).normal((6, 4)), Random("y", k).normal((6, 3))) for k in range(3)]


def loss(model, batch, factor=1.0):
    return (model(batch[0]).float() - batch[1]).square().mean() * factor


def steep(model, batch):
    """Its gradient overflows float16 at the first scale, and not at a 64th of it."""
    return loss(model, batch, factor=64.0)


@dataclass(frozen=True, kw_only=True)
class Noting(RankPolicy):
    """Notes the norm of every site's gradient at its point."""

    name: ClassVar[str] = "noting"
    steps: ClassVar[bool] = True
    seen: ClassVar[list]

    def on_step(self, t, total, sites):
        self.seen.append([t, *(float(s.grad("B").norm()) for s in sites)])
        return []


def run(point="after_backward", function=loss, adaptation=None, **settings):
    kind = type("Noting", (Noting,), {"point": point, "seen": []})
    adaptation = adaptation or rf.adapt(network(), replace(rf.method("lora", rank=2), rank=kind()), seed=1)
    defaults = {"lr": 0.01, "epochs": 2, "clip": 0.05, "schedule": "constant", "warmup": 0.0, "progress": False}
    history = train(adaptation.model, adaptation, BATCHES, function, LoopSettings(**{**defaults, **settings}))
    return history, torch.tensor(kind.seen), adaptation


@pytest.mark.parametrize("point", POINTS)
def test_policies_and_clipping_see_gradients_without_the_scale(point):
    exact, plain, _ = run(point)
    half, seen, adaptation = run(point, fp16=True)
    assert half.losses == pytest.approx(exact.losses, rel=5e-3)
    assert [r["norm"] for r in half.steps] == pytest.approx([r["norm"] for r in exact.steps], rel=2e-2)
    torch.testing.assert_close(seen, plain, rtol=5e-2, atol=1e-4)
    assert {p.dtype for p in adaptation.parameters()} == {torch.float32}


def test_the_update_sees_gradients_without_the_scale():
    """Plain descent, whose steps have the gradient's size: a scale of 65536 would be far off."""

    def moved(**settings):
        adaptation = rf.adapt(network(), "lora", rank=2, seed=1)
        adaptation.optimizer = _plain(adaptation)
        start = [p.detach().clone() for p in adaptation.parameters()]
        run(adaptation=adaptation, clip=0.0, max_steps=1, lr=0.1, **settings)
        return torch.cat([(p.detach() - s).flatten() for p, s in zip(adaptation.parameters(), start)])

    exact = moved()
    assert exact.norm() > 1e-3
    assert (moved(fp16=True) - exact).norm() < 1e-2 * exact.norm()


def _plain(adaptation):
    native = adaptation.optimizer

    def optimizer(lr, weight_decay=0.0, **options):
        native(lr, weight_decay, **options)
        made = torch.optim.SGD(adaptation.parameters(), lr=lr)
        adaptation._get(None).engine.install(made, options["total_steps"])
        return made

    return optimizer


def test_a_step_that_overflows_is_done_again_and_the_policy_never_sees_it():
    exact, plain, _ = run(function=steep)
    half, seen, adaptation = run(function=steep, fp16=True)
    engine = adaptation._get(None).engine
    assert half.repeats > 0
    assert exact.repeats == 0
    assert (engine.step, engine.calls, len(half.steps)) == (6, 6, 6)
    assert half.losses == pytest.approx(exact.losses, rel=5e-3)
    torch.testing.assert_close(seen, plain, rtol=5e-2, atol=1e-3)


def test_what_no_scale_cures_is_said_and_the_state_is_the_one_before():
    adaptation = rf.adapt(network(), "lora", rank=2, seed=1)
    before = {k: t.detach().clone() for k, t in adaptation.tensors().items()}

    def broken(model, batch):
        return loss(model, batch) + (model(batch[0]).float() * 0).sum().sqrt()  # 0 at an infinite slope

    with pytest.raises(NumericError, match="the gradient became nan at step 1 of 6"):
        run(function=broken, adaptation=adaptation, fp16=True)
    assert all(torch.equal(t, before[k]) for k, t in adaptation.tensors().items())
    assert adaptation._get(None).engine.step == 0


def test_a_resumed_run_goes_on_at_the_scale_where_it_was(tmp_path):
    whole, _, expected = run(function=steep, fp16=True, adaptation=rf.adapt(network(), "lora", rank=2, seed=1))
    part = rf.adapt(network(), "lora", rank=2, seed=1)
    calls = []

    def stops(model, batch):
        calls.append(1)
        if len(calls) == 8 + whole.repeats // 2:
            signal.raise_signal(signal.SIGINT)
        return steep(model, batch)

    with pytest.raises(Interrupted):
        run(function=stops, fp16=True, adaptation=part, folder=tmp_path / "run")
    model = network()
    again = load(model, tmp_path / "run" / "adapter")
    history, _, _ = run(function=steep, fp16=True, adaptation=again, folder=tmp_path / "run", resume=True)
    assert 0 < history.repeats == whole.repeats  # a scale that started anew would overflow once more
    assert history.losses == whole.losses
    assert all(torch.equal(t, expected.tensors()[k]) for k, t in again.tensors().items())


def test_one_of_the_two_half_precisions_is_chosen():
    with pytest.raises(OptionError, match="choose one"):
        LoopSettings(bf16=True, fp16=True)


def test_the_scale_is_seen_to_matter(monkeypatch):
    """Gradients that nobody scales back are far off."""
    exact, plain, _ = run()
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", lambda self, optimizer: None)
    monkeypatch.setattr(torch.amp.GradScaler, "update", lambda self: None)
    _, seen, _ = run(fp16=True)
    assert (seen[:, 1:] > 1000 * plain[:, 1:]).any()
