"""The definition of an adapted model: W' formed entry by entry in float64, then the model's own forward on it, by autograd alone.

Neither hosts nor the planner nor a kernel takes part: `torch.func.functional_call` runs the model as it was before adapting with
W' in the place of W. W' comes from the structure's expression by `dense()`; `test_definition.py` holds that against formulas
of the papers written in plain torch. What depends on the input has no W' and runs one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.core.store import Slot
from rankfold.core.structure import Context, trait
from rankfold.linalg import Dense

from .models import Case

__all__ = ["Definition", "as_map", "double"]


AS_IS = (nn.Linear, nn.MultiheadAttention)
"""Modules that store [out, in]."""


def double(module: nn.Module) -> nn.Module:
    """The module in float64; what was tied stays tied."""
    return module.double()


def as_map(module: nn.Module, stored: Tensor) -> Tensor:
    """The stored weight as [out, in], or as a stack of such maps: groups of a convolution, experts."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return stored.flatten(1) if module.groups == 1 else stored.reshape(module.groups, -1, stored[0].numel())
    return stored if isinstance(module, AS_IS) or stored.ndim == 3 else stored.mT


def as_stored(module: nn.Module, W: Tensor, stored: Tensor) -> Tensor:
    """The way back."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return W.reshape(stored.shape)
    return W if isinstance(module, AS_IS) or stored.ndim == 3 else W.mT


class Definition:
    """y = f(x; W') for the adapters that are on, each with its weight: W' = W + Σ_k w_k (W_k − W).

    `leaves` holds every tensor of the adapters in float64, those that train with gradients; `oracle(slot, W, t)` replaces the
    structure's own expression where given.
    """

    def __init__(
        self,
        case: Case,
        adaptation: rf.Adaptation,
        oracle: Callable[[Slot, Tensor, Any], Tensor] | None = None,
        **context: Tensor,
    ) -> None:
        self.model = double(case.pristine())
        self.adaptation = adaptation
        self.store = adaptation.store
        self.context = context
        self.oracle = oracle
        self.leaves: dict[str, Tensor] = {}
        for name in adaptation.active:
            for key, tensor in adaptation.tensors(name).items():
                value = tensor.detach().clone()
                if value.is_floating_point():
                    value = value.double().requires_grad_(tensor.requires_grad)
                self.leaves[key] = value

    def slots(self) -> dict[str, list[tuple[Slot, float | Tensor]]]:
        found: dict[str, list[tuple[Slot, float | Tensor]]] = {}
        for name, weight in self.adaptation.active.items():
            for slot in self.adaptation.slots(name):
                found.setdefault(slot.site.name, []).append((slot, weight))
        return found

    def tensors(self, slot: Slot) -> object:
        values = []
        for field in slot.fields:
            key, slices = slot.binding[field]
            values.append(self.leaves[key] if slices is None else self.leaves[key][slices])
        return type(slot.t(self.store))(*values)

    def changed(self, slot: Slot, W: Tensor, x: Tensor | None = None) -> Tensor:
        """W' [out, in] of one adapter alone at one site."""
        t = self.tensors(slot)
        if self.oracle is not None:
            return self.oracle(slot, W, t)
        return slot.structure.weight(Dense(W), t, slot.site, Context(x=x, **self.context)).dense()

    def weights(self) -> dict[str, Tensor]:
        """{parameter: its value under the adapters}, in the layout of its storage."""
        values: dict[str, Tensor] = {}
        for slots in self.slots().values():
            site = slots[0][0].site
            module = self.model.get_submodule(site.module)
            if any(slot.base is None or trait(slot.structure, "input_dependent") for slot, _ in slots):
                continue
            stored = self.model.get_parameter(site.weight).detach()
            W = as_map(module, stored)
            whole = W
            for slot, weight in slots:
                rows = slice(*(slot.site.rows or (0, W.shape[-2])))
                change = torch.zeros_like(W)
                change[..., rows, :] = weight * (self.changed(slot, W[..., rows, :]) - W[..., rows, :])
                whole = whole + change
            values[site.weight] = as_stored(module, whole, stored)
        for name in self.adaptation.active:
            for extra in self.store.members[name].extras.values():
                for path, module in self.model.named_modules():  # a tied parameter is replaced in every module that has it
                    owner = self.model.get_submodule(extra.module)._parameters[extra.param]
                    whole = self.leaves[extra.key]
                    if extra.rows is not None:
                        whole = owner.detach().index_put((torch.tensor(extra.rows),), whole)
                    values |= {f"{path}.{n}" if path else n: whole for n, p in module._parameters.items() if p is owner}
        return values

    def __call__(self, x: Tensor) -> Tensor:
        handles = []
        for slots in self.slots().values():
            module = self.model.get_submodule(slots[0][0].site.module)
            if any(trait(slot.structure, "input_dependent") for slot, _ in slots):
                handles.append(module.register_forward_hook(lambda m, args, y, slots=slots: self._by_token(m, slots, args[0])))
            elif slots[0][0].base is None:
                handles.append(module.register_forward_hook(lambda m, args, y, slots=slots: self._beside(slots, y)))
        try:
            return torch.func.functional_call(self.model, self.weights(), (x,), tie_weights=False)
        finally:
            for handle in handles:
                handle.remove()

    def _beside(self, slots: list[tuple[Slot, float | Tensor]], h: Tensor) -> Tensor:
        for slot, weight in slots:
            h = h + weight * (slot.structure.forward(h, self.tensors(slot), slot.site, Context()) - h)
        return h

    def _by_token(self, module: nn.Module, slots: list[tuple[Slot, float | Tensor]], x: Tensor) -> Tensor:
        """A change that differs from token to token, one token after the other."""
        W = as_map(module, module.weight.detach())
        if isinstance(module, nn.Conv2d):  # a token is a patch
            like = torch.nn.functional.conv2d(x, module.weight, None, module.stride, module.padding, module.dilation)
            x = torch.nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
        flat = x.reshape(-1, x.shape[-1])
        rows_out = []
        for token in flat:
            y = W @ token
            for slot, weight in slots:
                rows = slice(*(slot.site.rows or (0, W.shape[0])))
                expr = slot.structure.weight(
                    Dense(W[rows]), self.tensors(slot), slot.site, Context(x=token[None], **self.context)
                )
                change = torch.zeros_like(y)
                change[rows] = weight * (expr.matmul(token[None])[0] - W[rows] @ token)
                y = y + change
            rows_out.append(y)
        y = torch.stack(rows_out).reshape(*x.shape[:-1], W.shape[0]) if rows_out else x @ W.mT
        bias = getattr(module, "bias", None)
        y = y if bias is None else y + bias
        return y.mT.reshape(like.shape) if isinstance(module, nn.Conv2d) else y


def gradients(y: Tensor, probe: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """∂⟨y, probe⟩/∂t by name; zeros where y doesn't depend on t."""
    found = torch.autograd.grad((y * probe.to(y.dtype)).sum(), list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), found)}


__all__ += ["gradients"]
