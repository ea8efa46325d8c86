"""The Trainer in float16 with a loss scale: what acts in a step sees gradients without it, and a step left out is no step.

On a processor accelerate makes no scaler, so the tests give it torch's.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from small_models import arguments, llama, losses, rows

import rankfold as rf
from rankfold.integrations.transformers import Trainer
from rankfold.training.contracts import POINTS, RankPolicy


@dataclass(frozen=True, kw_only=True)
class Noting(RankPolicy):
    """Notes the step and the gradient of every site at its point."""

    name: ClassVar[str] = "noting"
    steps: ClassVar[bool] = True
    seen: ClassVar[list]

    def on_step(self, t, total, sites):
        self.seen.append([t, *(float(s.grad("B").norm()) for s in sites)])
        return []


class Steep(Trainer):
    """A loss whose gradients overflow float16 at the first scales."""

    def compute_loss(self, *args, **options):
        return 2.0**12 * super().compute_loss(*args, **options)


def run(folder, monkeypatch, half, point="after_backward", kind=Trainer, **options):
    policy = type("Noting", (Noting,), {"point": point, "seen": []})
    adaptation = rf.adapt(llama(), replace(rf.method("lora", rank=2), rank=policy()), seed=1)
    trainer = kind(adaptation.model, arguments(folder, **options), train_dataset=rows(8))
    if half:
        monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", property(lambda self: "fp16"))
        monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
        trainer.accelerator.scaler, trainer.accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    trainer.train()
    return trainer, torch.tensor(policy.seen)


@pytest.mark.parametrize("point", ["after_backward", "after_clip", "after_step"])
def test_policies_clipping_and_updates_see_gradients_without_the_scale(point, tmp_path, monkeypatch):
    assert point in POINTS
    options = {"max_grad_norm": 0.05, "max_steps": 3}
    exact, plain = run(tmp_path, monkeypatch, False, point, **options)
    half, seen = run(tmp_path, monkeypatch, True, point, **options)
    assert half.accelerator.scaler.get_scale() == 65536
    assert losses(half) == pytest.approx(losses(exact), rel=5e-3)
    assert plain[:, 1:].max() > 1e-3
    torch.testing.assert_close(seen, plain, rtol=0.1, atol=1e-4)
    for key, value in exact.adaptation.tensors().items():
        assert (half.adaptation.tensors()[key] - value).norm() <= 0.1 * value.norm(), key


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_step_that_is_left_out_moves_nothing(clip, tmp_path, monkeypatch):
    trainer, seen = run(tmp_path, monkeypatch, True, kind=Steep, max_steps=12, max_grad_norm=clip)
    engine = trainer.adaptation._get(None).engine
    left_out = round(16 - torch.tensor(trainer.accelerator.scaler.get_scale()).log2().item())
    assert 0 < left_out < 12
    assert trainer.state.global_step == 12
    assert engine.step == engine.calls == 12 - left_out
    assert seen[:, 0].tolist() == list(range(1, engine.step + 1))
    assert seen.isfinite().all()
    assert all(t.isfinite().all() for t in trainer.adaptation.tensors().values())


def test_a_scaled_gradient_is_seen_to_be_far_off(tmp_path, monkeypatch):
    _, plain = run(tmp_path, monkeypatch, False, max_steps=1)
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", lambda self, optimizer: None)
    monkeypatch.setattr(torch.amp.GradScaler, "step", lambda self, optimizer, *a: optimizer.step())
    monkeypatch.setattr(torch.amp.GradScaler, "update", lambda self: None)
    _, seen = run(tmp_path, monkeypatch, True, max_steps=1)
    assert (seen[:, 1:] > 1000 * plain[:, 1:]).any()
