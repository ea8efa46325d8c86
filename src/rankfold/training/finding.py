"""Where NaN or Inf first appears: a tensor of the adapter, the batch, a module's output, the loss, or on the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .adaptation import Adaptation

__all__ = ["first_bad_place"]


def first_bad_place(adaptation: Adaptation, batch: Any, loss: Callable[[], Tensor], name: str | None = None) -> str:
    """Run `loss()` once more, watching every module; says in words where the first value that is not finite stands.

    >>> import rankfold as rf
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> adaptation = rf.adapt(model, "lora", rank=1)
    >>> _ = adaptation.tensors()["default/1/B"].data.fill_(float("inf"))
    >>> first_bad_place(adaptation, None, lambda: model(torch.ones(1, 2)).sum())
    'tensor B of site 1'
    """
    for key, slot in adaptation._get(name).member.slots.items():
        for tensor_name, (stored, _) in slot.binding.items():
            if _bad(adaptation.store.tensor(stored)):
                return f"tensor {tensor_name} of site {key}"
    for extra in adaptation._get(name).member.extras.values():
        if _bad(adaptation.store.tensor(extra.key)):
            return f"tensor {extra.name}"
    path = _bad_input(batch)
    if path is not None:
        return f"the batch itself{path}"
    return _while_running(adaptation, loss, name)


def _while_running(adaptation: Adaptation, loss: Callable[[], Tensor], name: str | None) -> str:
    forward: list[str] = []
    backward: list[str] = []
    modules = {n: m for n, m in adaptation.model.named_modules() if n and n.partition(".")[0] != "rankfold"}
    hooks = [m.register_forward_hook(_watch(n, forward, backward)) for n, m in modules.items()]
    try:
        with torch.enable_grad():
            value = loss()
            if forward:
                return f"the output of {forward[0]}"
            if _bad(value):
                return "the loss itself; every module's output is finite"
            grads = torch.autograd.grad(value, adaptation.parameters(name), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    if backward:
        return f"the gradient at the output of {backward[0]}"
    for parameter, grad in zip(adaptation.parameters(name), grads):
        if grad is not None and _bad(grad):
            return f"the gradient of {_name_of(adaptation, parameter, name)}"
    return "no module of a second run with the same numbers: the first run's value came from a random choice or from outside"


def _watch(name: str, forward: list[str], backward: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if _bad(tensor):
                forward.append(name)
            if tensor.requires_grad:
                tensor.register_hook(lambda g: backward.append(name) if _bad(g) else None)

    return hook


def _name_of(adaptation: Adaptation, parameter: Tensor, name: str | None) -> str:
    key = next((k for k, t in adaptation.tensors(name).items() if t is parameter), "a tensor")
    return key.partition("/")[2] or key


def _bad_input(batch: Any, path: str = "") -> str | None:
    if isinstance(batch, Tensor):
        return (path or "") if _bad(batch) else None
    items = batch.items() if hasattr(batch, "items") else enumerate(batch) if isinstance(batch, tuple | list) else ()
    for key, value in items:
        found = _bad_input(value, f", at {path.removeprefix(', at ') + '.' if path else ''}{key}")
        if found is not None:
            return found
    return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if hasattr(value, "values") else value if isinstance(value, tuple | list) else ()
    return [t for item in items for t in _tensors(item)]


def _bad(value: Tensor) -> bool:
    return value.is_floating_point() and not bool(torch.isfinite(value).all())
