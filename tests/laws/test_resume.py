"""Law 4, second half: n + m steps are n steps, a checkpoint, a fresh model, and m steps; bitwise in float32.

Every method runs here within one process; `tests/training/test_checkpoints.py` runs three of them across two.
"""

from __future__ import annotations

import signal

import pytest
import torch

import rankfold as rf
from rankfold.training.checkpoints import ADAPTER
from rankfold.training.engine import Engine
from rankfold.training.loop import Interrupted, LoopSettings, _Run
from rankfold.training.loop import train as run_loop
from rankfold.training.saving import load

from .checks import Checks
from .models import BLOCK, tiny
from .subjects import adapt, small, subjects, train

STEPS, STOP = 6, 3


def check_resume(method, folder):
    m = small(method)
    with Checks(f"law 4, {m}, resume") as check:
        kind = BLOCK if m.is_side else "linear"
        draw = torch.Generator().manual_seed(11)
        batches = [torch.randn(4, 6 if m.is_side else 8, generator=draw) for _ in range(STEPS)]

        def run(case, a, resume=False, stop=None):
            settings = LoopSettings(lr=0.05, weight_decay=0.01, max_steps=STEPS, folder=folder, resume=resume, progress=False)
            pause = lambda record: record["step"] == stop and signal.raise_signal(signal.SIGINT)
            return run_loop(case.model, a, batches, case.loss, settings, on_step=pause)

        whole = tiny(kind, torch.float32)
        handle = adapt(whole, m)
        history = run(whole, handle)
        first = tiny(kind, torch.float32)
        with pytest.raises(Interrupted):
            run(first, adapt(first, m), stop=STOP)
        second = tiny(kind, torch.float32)
        resumed = load(second.model, folder / ADAPTER)
        again = run(second, resumed, resume=True)
        check.that(again.losses == history.losses, f"losses {again.losses}, never stopped {history.losses}")
        ours, theirs = handle.tensors(), resumed.tensors()
        check.that(list(ours) == list(theirs), f"tensors {sorted(theirs)}, never stopped {sorted(ours)}")
        for name, tensor in ours.items():
            check.bitwise(theirs[name].detach(), tensor.detach(), name)


@pytest.mark.parametrize("method", subjects())
def test_a_resumed_run_is_the_run_that_was_never_stopped(method, tmp_path):
    check_resume(method, tmp_path / "run")


# What the law must reject


def forgets_the_moments(monkeypatch):
    """The optimizer starts anew."""
    native = _Run._take_over

    def take_over(self, saved):
        native(self, saved)
        self.optimizer.state.clear()

    monkeypatch.setattr(_Run, "_take_over", take_over)


def forgets_the_step(monkeypatch):
    """The schedule of rates starts anew."""
    native = _Run._take_over

    def take_over(self, saved):
        native(self, saved)
        self.step = 0

    monkeypatch.setattr(_Run, "_take_over", take_over)


def forgets_the_policy(monkeypatch):
    """What the rank policy has gathered is lost."""
    monkeypatch.setattr(Engine, "load_state_dict", lambda self, saved: None)


def repeats_the_draws(monkeypatch):
    """Every step draws the numbers of the step before, counted from the start of the process."""
    native = _Run._seed
    count = {"calls": 0}

    def seed(self, k):
        count["calls"] += 1
        native(self, k)
        torch.manual_seed(count["calls"])

    monkeypatch.setattr(_Run, "_seed", seed)


MUTANTS = [
    (forgets_the_moments, "lora"),
    (forgets_the_step, "lora"),
    (repeats_the_draws, "dropout+lora"),
]


@pytest.mark.parametrize(("mutant", "method"), MUTANTS, ids=[f.__name__ for f, _ in MUTANTS])
def test_the_law_rejects(mutant, method, monkeypatch, tmp_path):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="law 4"):
        check_resume(method, tmp_path / "run")


@pytest.mark.parametrize("method", subjects())
def test_the_law_rejects_lost_moments_under_every_method(method, monkeypatch, tmp_path):
    forgets_the_moments(monkeypatch)
    with pytest.raises(AssertionError, match="law 4"):
        check_resume(method, tmp_path / "run")


def gathers(method):
    """Whether the rank policy keeps anything from step to step; one that goes by the step alone has nothing to lose."""
    case = tiny("linear")
    a = adapt(case, small(method))
    train(case, a)
    return any(a._get(None).engine.state.values())


@pytest.mark.parametrize("method", [s for s in subjects() if rf.method(s).rank.steps and gathers(s)])
def test_the_law_rejects_a_lost_policy(method, monkeypatch, tmp_path):
    forgets_the_policy(monkeypatch)
    with pytest.raises(AssertionError, match="law 4"):
        check_resume(method, tmp_path / "run")
