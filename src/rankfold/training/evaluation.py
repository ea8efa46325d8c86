"""Evaluations during a run: when they are due, which state is the best so far, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from rankfold.errors import OptionError

from .adaptation import Adaptation
from .settings import History, LoopSettings

__all__ = ["Evaluation", "Evaluations"]

Evaluation = Callable[[nn.Module], dict[str, float]]
"""model -> {name: figure}."""


class Evaluations:
    """What `evaluate` has said in a run.

    Attributes:
        best: {"step", "value", "tensors", "ranks"} of the best state so far, or nothing.
        enough: patience is at its end.
    """

    def __init__(self, function: Evaluation | None, settings: LoopSettings, adaptation: Adaptation, name: str | None) -> None:
        self.function, self.settings, self.adaptation, self.name = function, settings, adaptation, name
        self.best: dict[str, Any] = {}
        self.enough = False

    def due(self, step: int, total: int, epoch_steps: int) -> bool:
        """After every epoch, or evenly over the run; after the last step always."""
        if self.function is None:
            return False
        count = self.settings.evaluations
        if step == total:
            return True
        if count == 0:
            return step % epoch_steps == 0
        return step * count // total > (step - 1) * count // total

    def run(self, history: History, step: int, autocast: AbstractContextManager[Any], counts: bool = True) -> None:
        """Evaluate; keep the state if it is the best. One that does not count is only recorded.

        Raises:
            OptionError: `metric` is none of the figures.
        """
        assert self.function is not None
        began = time.monotonic()
        self.adaptation.model.eval()
        with torch.no_grad(), autocast:
            figures = self.function(self.adaptation.model)
        history.evaluation_seconds += time.monotonic() - began
        history.evaluations.append({"step": step, **figures})
        if not counts:
            return
        s = self.settings
        if s.metric not in figures:
            raise OptionError(f"metric {s.metric!r}: evaluate gives {', '.join(figures)}")
        value = figures[s.metric]
        sign = 1 if s.better == "higher" else -1
        ranks = self._ranks()
        fits = self.best and self.best["ranks"] == ranks  # a state of other ranks can't be put back into these tensors
        if math.isfinite(value) and (not fits or sign * value > sign * self.best["value"]):
            tensors = {k: t.detach().clone() for k, t in self.adaptation.tensors(self.name).items()} if s.keep_best else {}
            self.best = {"step": step, "value": value, "tensors": tensors, "ranks": ranks}
        since = [e for e in history.evaluations if self.best and e["step"] > self.best["step"]]
        self.enough = s.patience is not None and len(since) >= s.patience

    def put_back_best(self, history: History, step: int) -> None:
        """The tensors of the best evaluation, where they still fit."""
        if not self.best or not self.settings.keep_best or self.best["ranks"] != self._ranks():
            return
        history.best_step = self.best["step"]
        if self.best["step"] == step:
            return
        with torch.no_grad():
            for key, value in self.best["tensors"].items():
                self.adaptation.store.tensor(key).copy_(value)
        self._engine.moved = True  # it was us

    @property
    def _engine(self) -> Any:
        return self.adaptation._get(self.name).engine

    def _ranks(self) -> dict[str, int]:
        return dict(self._engine.history[-1][1])
