"""What a run will need, before it runs: one batch forward with every tensor counted that the backward pass would keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.base import stored_tensors
from rankfold.core.bases import is_packed
from rankfold.kernels import watching
from rankfold.training.adaptation import Adaptation

__all__ = ["MemoryPlan", "plan_memory", "size_of"]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the frozen base, of the adapter, of its gradients and Adam's two moments, and of one batch's activations."""

    base: int
    adapter: int
    training: int
    activations: int

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.training + self.activations


def size_of(model: nn.Module) -> tuple[int, int]:
    """(numbers that the base's parameters stand for, bytes that they take): of a packed weight [out, in] they are out·in.

    >>> size_of(torch.nn.Linear(4, 3, dtype=torch.bfloat16))
    (15, 30)
    """
    counts: dict[int, int] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items() if path.partition(".")[0] != "rankfold" else ():
            linear: Any = module
            packed = name == "weight" and is_packed(module) and hasattr(module, "in_features")
            if p is not None:
                counts[id(p)] = linear.out_features * linear.in_features if packed else p.numel()
    return sum(counts.values()), sum(t.nbytes for t in stored_tensors(model))


def plan_memory(model: nn.Module, adaptation: Adaptation, loss: Callable[[], Tensor]) -> MemoryPlan:
    """Run `loss()` once in train mode, without a backward pass, and count.

    >>> import rankfold as rf
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
    >>> adaptation = rf.adapt(model, "lora", rank=1)
    >>> plan = plan_memory(model, adaptation, lambda: model(torch.ones(5, 4)).sum())
    >>> plan.base, plan.adapter, plan.training
    (48, 28, 84)
    """
    own = {t.data_ptr() for t in adaptation.tensors().values()}
    base = {t.data_ptr(): t.nbytes for t in stored_tensors(model)}
    fixed = own | base.keys()
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()

    mode = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=[]), watching(count):
            value = loss()  # alive while counting, so that no address is used twice
            del value
    finally:
        model.train(mode)
    trained = sum(p.nbytes for p in adaptation.parameters())
    adapter = sum(t.nbytes for t in adaptation.tensors().values())
    return MemoryPlan(sum(base.values()), adapter, 3 * trained, sum(kept.values()))
