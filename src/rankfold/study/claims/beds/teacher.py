"""A two-layer ReLU network, to be tuned towards a teacher: the same network with a change of low rank in both weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.linalg.random import Random

__all__ = ["Task", "make_task", "tune"]

IN, HIDDEN, OUT = 64, 128, 32
RANK, SIZE = 4, 0.25


@dataclass(frozen=True)
class Task:
    """The frozen network, rows to train and test on, and the teacher's answers to them."""

    model: nn.Module
    layers: tuple[nn.Linear, nn.Linear]
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def make_task(seed: int, *, decay: float, rows: int = 1024) -> Task:
    """Inputs are Gaussian with standard deviations k^−decay along random directions, of mean square one; decay 0 is isotropic.

    Each weight of the teacher differs by a random matrix of rank 4, a quarter as long as the weight itself.
    """
    random = Random(seed, "claims", "teacher")
    layers, changed = ((nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)) for _ in range(2))
    model, teacher = (nn.Sequential(first, nn.ReLU(), second) for first, second in (layers, changed))
    with torch.no_grad():
        for k, (layer, new) in enumerate(zip(layers, changed)):
            out, in_ = layer.weight.shape
            W = random.child("weight", k).normal((out, in_)) * math.sqrt(2 / in_)
            shift = random.child("left", k).normal((out, RANK)) @ random.child("right", k).normal((RANK, in_))
            layer.weight.copy_(W)
            new.weight.copy_(W + shift * (SIZE * W.norm() / shift.norm()))
            layer.bias.zero_()
            new.bias.zero_()
        spread = torch.arange(1, IN + 1) ** -decay
        axes = random.child("axes").haar(IN, IN) * (spread / spread.square().mean().sqrt())
        x = random.child("x").normal((2 * rows, IN)) @ axes.mT
        y = teacher(x)
    return Task(model, layers, x[:rows], y[:rows], x[rows:], y[rows:])


def tune(task: Task, method: str, seed: int, lr: float, steps: int, **options: Any) -> float:
    """Σ‖f − teacher‖² on unseen rows after AdamW steps on batches of 64, as a share of what it was before."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    random = Random(seed, "claims", "batches")
    seen = [(task.x[i : i + 64], task.y[i : i + 64]) for i in range(0, 512, 64)]  # for inits that look at data
    with torch.no_grad():
        before = float(loss(task.model, (task.test_x, task.test_y)))
    model = task.model
    adaptation = rf.adapt(model, method, targets="all", seed=seed, batches=seen, loss=loss, **options)
    optimizer = adaptation.optimizer(lr=lr)
    for batch in _batches(task, random, steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss(model, (task.test_x, task.test_y))) / before


def _batches(task: Task, random: Random, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        rows = random.child(step).choice(len(task.x), 64)
        yield task.x[rows], task.y[rows]
